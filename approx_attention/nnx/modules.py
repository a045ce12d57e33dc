"""Flax nnx modules with the learned parameters of methods."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from approx_attention.core import (
    averaging_matrix,
    check_choice,
    check_counts,
)
from approx_attention.nnx.learned import LearnedAttention


def mean_pool_init(noise: float = 0.01) -> Callable[..., Array]:
    """An initialiser of projections ``[..., R, S]``: means of R segments, and noise that tells equal slots apart.

    Args:
        noise: standard deviation of the noise times the root of S.

    Returns:
        ``(key, shape, dtype) -> projections``; it raises ``ValueError`` if R exceeds S.

    Example:
        >>> import jax
        >>> from approx_attention.nnx import mean_pool_init
        >>> mean_pool_init(noise=0.0)(jax.random.key(0), (2, 4)).tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        if shape[-2] > shape[-1]:
            raise ValueError(f"the number of slots, {shape[-2]}, must be at most the number of positions, {shape[-1]}")
        means = jnp.broadcast_to(averaging_matrix(shape[-1], shape[-2], dtype), shape)
        return means + noise / math.sqrt(shape[-1]) * jax.random.normal(key, shape, dtype)

    return init


def scale_keeping_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Initialise projections ``[..., R, S]`` with N(0, 1/S), which keeps the scale of logits for every S.

    Args:
        key: typed PRNG key.
        shape: ``(..., R, S)``.
        dtype: dtype of the projections.

    Returns:
        The projections.

    Example:
        >>> import jax
        >>> from approx_attention.nnx import scale_keeping_init
        >>> scale_keeping_init(jax.random.key(0), (2, 16, 64)).shape
        (2, 16, 64)
    """
    return jax.random.normal(key, shape, dtype) / math.sqrt(shape[-1])


class LinformerAttention(LearnedAttention):
    r"""Linformer with learned projections of up to ``max_length`` keys.

    Projections can be shared: with ``"none"`` every key head has its own E and F, with ``"headwise"`` all heads of a
    layer share E and F, with ``"key_value"`` also E = F. To share them between layers, pass the ``projections`` of one
    layer to the others.

    Args:
        num_kv_heads: the number K of key heads.
        max_length: the longest input; shorter ones use the first columns.
        num_slots: the number R of slots, 256 if None; it may differ between layers.
        sharing: ``"none"``, ``"headwise"`` (if None) or ``"key_value"``.
        projections: the projections of another layer (layerwise sharing), which determine slots, sharing and frozen;
            do not give these as well.
        init: an initialiser ``(key, shape, dtype)`` of ``[R, max_length]``, or ``[K, R, max_length]`` with ``"none"``;
            `scale_keeping_init`, `mean_pool_init` or any of `flax.nnx.initializers`.
        frozen: whether to exclude the random projections from training; they are then no `nnx.Param`.
        is_causal: as in `approx_attention.linformer`.
        options: further static arguments of `approx_attention.linformer`.
        rngs: streams for the parameters; not needed with ``projections``.

    Raises:
        ValueError: neither ``rngs`` nor ``projections``, arguments that ``projections`` determine, an unknown sharing,
            counts below 1.
        TypeError: ``is_causal`` among the options.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import LinformerAttention
        >>> module = LinformerAttention(2, max_length=16, num_slots=4, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((1, 16, 2, 8))
        >>> module(x, x, x).shape
        (1, 16, 2, 8)

    Reference:
        :cite:p:`wang2020linformer`, section 4.
    """

    def __init__(
        self,
        num_kv_heads: int,
        max_length: int,
        *,
        num_slots: int | None = None,
        sharing: Literal["none", "headwise", "key_value"] | None = None,
        projections: nnx.Dict | None = None,
        init: Callable[..., Array] = scale_keeping_init,
        frozen: bool = False,
        is_causal: bool = False,
        options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        if "is_causal" in (options or {}):
            raise TypeError("is_causal is an argument of LinformerAttention, not one of its options")
        self.options = {**(options or {}), "is_causal": is_causal}
        if projections is None:
            if rngs is None:
                raise ValueError("LinformerAttention samples projections: pass rngs, or projections of another layer")
            sharing = "headwise" if sharing is None else sharing
            sizes = check_counts(num_slots=256 if num_slots is None else num_slots, max_length=max_length)
            check_choice("sharing", sharing, ("none", "headwise", "key_value"))
            heads = check_counts(num_kv_heads=num_kv_heads) if sharing == "none" else ()
            shape = (*heads, min(sizes), sizes[1])
            names = ("projection_k",) if sharing == "key_value" else ("projection_k", "projection_v")
            kind = nnx.Variable if frozen else nnx.Param
            projections = nnx.Dict({name: kind(init(rngs.params(), shape, jnp.float32)) for name in names})
        elif num_slots is not None or sharing is not None or frozen:
            raise ValueError(
                "num_slots, sharing and frozen are determined by projections: leave them out; "
                f"got num_slots = {num_slots}, sharing = {sharing!r} and frozen = {frozen}"
            )
        self.projections = projections
        self.per_head = projections["projection_k"][...].ndim == 3

    def _arguments(self) -> dict[str, Any]:
        """The arguments of `approx_attention.attention`."""
        arrays = {name: x[...] for name, x in self.projections.items()}
        owned: dict[str, Any] = {"per_head": arrays} if self.per_head else arrays
        return {"method": "linformer", **owned, **self.options}


class Rfa(LearnedAttention):
    """Random feature attention with a learned bandwidth per key head and channel, and optional gates.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        options: static arguments of `approx_attention.rfa`.
        gate_dim: number of channels of the input of gates; None for no gates.
        rngs: streams for the parameters.

    Raises:
        ValueError: counts below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import Rfa
        >>> module = Rfa(8, 2, options={"num_features": 16}, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((1, 16, 2, 8))
        >>> module(x, x, x, rng=jax.random.key(0)).shape
        (1, 16, 2, 8)

    Reference:
        :cite:p:`peng2021random`, sections 3.1 and 3.2 (gates).
    """

    def __init__(
        self,
        head_dim: int,
        num_kv_heads: int,
        *,
        options: Mapping[str, Any] | None = None,
        gate_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.options = dict(options or {})
        self.bandwidth = nnx.Param(jnp.ones(check_counts(num_kv_heads=num_kv_heads, head_dim=head_dim), jnp.float32))
        self.gate = None if gate_dim is None else nnx.Linear(gate_dim, num_kv_heads, rngs=rngs)

    def _arguments(self) -> dict[str, Any]:
        return {"method": "rfa", "per_head": {"bandwidth": self.bandwidth[...]}, **self.options}

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        rng: Array,
        gate_input: Array | None = None,
        key_value_seq_lengths: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Attention in the layout of `approx_attention.attention`, with gates computed from the layer's input.

        Args:
            query: ``[..., T, N, D]``.
            key: ``[..., S, K, D]``.
            value: ``[..., S, K, Dv]``.
            rng: typed PRNG key of the features; use one key for equal features.
            gate_input: ``[..., S, gate_dim]``, required for gates.
            key_value_seq_lengths: real keys per sequence, ``[...]``.
            mask: true where a key is real, ``[..., 1, 1, S]``.

        Returns:
            ``[..., T, N, Dv]``.

        Raises:
            ValueError: ``gate_input`` without gates, or gates without it.
        """
        if (self.gate is None) != (gate_input is None):
            made = "no gates, gate_dim = None" if self.gate is None else f"gates, gate_dim = {self.gate.in_features}"
            given = "None" if gate_input is None else f"shape {gate_input.shape}"
            raise ValueError(f"gate_input is required for gates only: this module has {made}, gate_input is {given}")
        gates = {} if self.gate is None or gate_input is None else {"gate_logits": self.gate(gate_input)}
        masks = {"key_value_seq_lengths": key_value_seq_lengths, "mask": mask}
        return self._attend(query, key, value, rng=rng, **masks, **gates)
