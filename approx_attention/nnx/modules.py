"""The learned parts of methods as Flax nnx modules: they own the arrays, the functions of this library use them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from approx_attention.api import attention, within
from approx_attention.core import (
    accumulation_dtype,
    as_pair,
    averaging_matrix,
    check_choice,
    check_counts,
    paired_means,
    shown,
)
from approx_attention.methods import chunk_means, eva, lara
from approx_attention.tensor import tensor_attention


class Adaptor(nnx.Module):
    """A linear map and a layer norm of pooled queries or keys, shared by the heads."""

    def __init__(self, head_dim: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(head_dim, head_dim, kernel_init=nnx.initializers.truncated_normal(0.02), rngs=rngs)
        self.norm = nnx.LayerNorm(head_dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps ``[..., D]`` to the same."""
        return self.norm(self.linear(x))


class Eva(nnx.Module):
    r"""EVA over batch and heads, with learned chunk keys and proposals, pooling vectors, or local biases.

    The presets `eva_official`, `eva_official_causal`, `evabyte` and `eva_dropin` make the known variants.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        options: static arguments of `approx_attention.eva`, such as ``window_size``.
        adaptors: learn the chunk keys :math:`\tilde k = A_k(\bar k)` and proposals from :math:`A_q(\bar q) + \tilde k`.
        half: take half of that sum as the proposal, as the authors' bidirectional code does.
        pooling_vectors: learn EvaByte's two per key head.
        local_bias: learn a bias of the logits within a window, one per pair of places, or per offset in an image.
        rngs: where adaptors and pooling vectors are drawn from; not needed without them.

    Raises:
        ValueError: no ``rngs`` for what is drawn.
    """

    def __init__(
        self,
        head_dim: int,
        num_kv_heads: int,
        *,
        options: Mapping[str, Any],
        adaptors: bool = False,
        half: bool = False,
        pooling_vectors: bool = False,
        local_bias: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        if rngs is None and (adaptors or pooling_vectors):
            raise ValueError("Eva draws its adaptors and pooling vectors: pass rngs, as in rngs=nnx.Rngs(0); got None")
        head_dim, num_kv_heads = check_counts(head_dim=head_dim, num_kv_heads=num_kv_heads)
        self.options, self.half = dict(options), half
        self.adapt_queries, self.adapt_keys = (
            Adaptor(head_dim, rngs=rngs) if adaptors and rngs is not None else None for _ in range(2)
        )
        drawn = None
        if pooling_vectors and rngs is not None:
            drawn = jnp.clip(jax.random.normal(rngs.params(), (num_kv_heads, 2, head_dim), jnp.float32), -1, 1)
        self.pooling_vectors = None if drawn is None else nnx.Param(drawn * head_dim**-0.5)
        self.bias = nnx.Param(jnp.zeros(self._bias_shape(), jnp.float32)) if local_bias else None

    def _bias_shape(self) -> tuple[int, ...]:
        side, overlap = check_counts(0, window_size=self.options["window_size"], overlap=self.options.get("overlap", 0))
        if self.options.get("spatial_shape") is not None:
            return (2 * side - 1, 2 * side - 1)
        return (side, side + overlap * (1 if self.options.get("is_causal") else 2))

    def local_bias(self) -> Array | None:
        """The learned bias ``[window, keys]`` of the logits within a window."""
        if self.bias is None or self.options.get("spatial_shape") is None:
            return None if self.bias is None else self.bias[...]
        side = np.arange(int(self.options["window_size"]))
        offset = side[:, None] - side[None, :] + len(side) - 1
        rows, columns = np.broadcast_arrays(offset[:, None, :, None], offset[None, :, None, :])
        return self.bias[...][rows, columns].reshape(len(side) ** 2, len(side) ** 2)

    @property
    def is_causal(self) -> bool:
        """Whether it was made causal."""
        return bool(self.options.get("is_causal"))

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        rng: Array | None = None,
        key_value_seq_lengths: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Attention in the layout of `approx_attention.attention`.

        Args:
            query: ``[..., T, N, D]``.
            key: ``[..., S, K, D]``.
            value: ``[..., S, K, Dv]``.
            rng: typed PRNG key of the noise; none for no noise, as in evaluation.
            key_value_seq_lengths: real keys per sequence, ``[...]``.
            mask: which keys are real, ``[..., 1, 1, S]``.

        Returns:
            ``[..., T, N, Dv]``.
        """
        layout = {
            name: self.options[name]
            for name in (
                "window_size", "chunk_size", "num_chunks", "is_causal", "exclude_local", "overlap", "spatial_shape",
            )
            if name in self.options
        }  # fmt: skip
        root = math.sqrt(1 / math.sqrt(query.shape[-1]))
        bias = self.local_bias()

        def head(
            q: Array, k: Array, v: Array, kv_mask: Array | None, vectors: Array | None, key: Array | None
        ) -> Array:
            learned: dict[str, Any] = {} if bias is None else {"local_bias": bias}
            if vectors is not None:
                learned["pooling_vectors"] = (vectors[0] / root, vectors[1] * root)
            if self.adapt_queries is not None and self.adapt_keys is not None:
                q_mean, k_mean = chunk_means(q, k, kv_mask=kv_mask, **layout)
                chunk_keys = self.adapt_keys(k_mean)
                learned["chunk_keys"] = root * chunk_keys
                learned["proposal_mean"] = root * (self.adapt_queries(q_mean) + chunk_keys) * (0.5 if self.half else 1)
            return cast(Array, eva(q, k, v, key, kv_mask=kv_mask, **self.options, **learned))

        vectors = None if self.pooling_vectors is None else self.pooling_vectors[...]
        return _over_heads(head, query, key, value, _real(key, key_value_seq_lengths, mask), vectors, rng)


def eva_official(
    head_dim: int,
    num_kv_heads: int,
    *,
    window_size: int,
    num_chunks: int,
    overlap: bool = False,
    spatial_shape: tuple[int, int] | None = None,
    local_bias: bool = False,
    rngs: nnx.Rngs,
) -> Eva:
    """EVA as the authors' bidirectional code has it: every token in a chunk, no counts, half proposals.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        window_size: queries per window, or its side.
        num_chunks: the number of chunks asked for.
        overlap: extend windows and chunks by half a window to each side.
        spatial_shape: height and width of an image.
        local_bias: learn a bias within windows.
        rngs: where the parameters are drawn from.
    """
    size: dict[str, Any] = {"num_chunks": num_chunks}
    if spatial_shape is not None:  # what is asked for is met by squares of about that number
        size = {"chunk_size": max(1, math.isqrt(math.prod(as_pair("spatial_shape", spatial_shape)) // num_chunks))}
    options = {
        "window_size": window_size,
        **size,
        "overlap": max(1, window_size // 2) if overlap else 0,
        "spatial_shape": spatial_shape,
        **_OFFICIAL,
    }
    return Eva(head_dim, num_kv_heads, options=options, adaptors=True, half=True, local_bias=local_bias, rngs=rngs)


def eva_official_causal(
    head_dim: int,
    num_kv_heads: int,
    *,
    window_size: int,
    chunk_size: int,
    overlap: bool = False,
    local_bias: bool = False,
    rngs: nnx.Rngs,
) -> Eva:
    """EVA as the authors' causal code has it: a query sees its window so far and every chunk before its own.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        window_size: queries per window.
        chunk_size: keys per chunk.
        overlap: let a window see the window before.
        local_bias: learn a bias within windows.
        rngs: where the parameters are drawn from.
    """
    options = {
        "window_size": window_size,
        "chunk_size": chunk_size,
        "overlap": window_size if overlap else 0,
        "is_causal": True,
        **_OFFICIAL,
    }
    return Eva(head_dim, num_kv_heads, options=options, adaptors=True, local_bias=local_bias, rngs=rngs)


def evabyte(head_dim: int, num_kv_heads: int, *, window_size: int, chunk_size: int, rngs: nnx.Rngs) -> Eva:
    """EvaByte: chunks pooled by two learned vectors, causal and streamable.

    Here a query sees the window before its own exactly too, as in every causal form of this library.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        window_size: tokens per window.
        chunk_size: tokens per chunk.
        rngs: where the parameters are drawn from.
    """
    options = {"window_size": window_size, "chunk_size": chunk_size, "is_causal": True, "count_correction": False}
    return Eva(head_dim, num_kv_heads, options=options, pooling_vectors=True, rngs=rngs)


def eva_dropin(head_dim: int, num_kv_heads: int, **options: Any) -> Eva:
    """EVA without a learned part, to stand in for the attention of a trained model.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        **options: arguments of `approx_attention.eva`.
    """
    return Eva(head_dim, num_kv_heads, options=options)


_OFFICIAL = {"exclude_local": False, "count_correction": False, "noise_scale": "official"}


class Lara(nnx.Module):
    r"""LARA over batch and heads with learned proposals :math:`\mu = A_q(\bar q) + A_k(\bar k)`.

    Args:
        head_dim: the number D of channels of a head.
        num_landmarks: the number C of proposals.
        spatial_shape: height and width of an image, as in `approx_attention.lara`.
        options: further static arguments of `approx_attention.lara`.
        rngs: where the parameters are drawn from.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        num_landmarks: int = 49,
        spatial_shape: tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        head_dim, self.num_landmarks = check_counts(head_dim=head_dim, num_landmarks=num_landmarks)
        self.spatial_shape, self.options = spatial_shape, dict(options or {})
        self.adapt_queries, self.adapt_keys = (Adaptor(head_dim, rngs=rngs) for _ in range(2))

    @property
    def is_causal(self) -> bool:
        """Whether it was made causal."""
        return bool(self.options.get("is_causal"))

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        rng: Array | None = None,
        key_value_seq_lengths: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Attention in the layout of `approx_attention.attention`, as in `Eva`."""
        root = math.sqrt(1 / math.sqrt(query.shape[-1]))

        def head(q: Array, k: Array, v: Array, kv_mask: Array | None, _: None, key: Array | None) -> Array:
            count = min(self.num_landmarks, q.shape[0], k.shape[0])
            q_mask = kv_mask if q.shape[0] == k.shape[0] else None
            q_mean, k_mean, _present = paired_means(q, k, count, q_mask, kv_mask, self.spatial_shape)
            q_bar = self.adapt_queries(q_mean)
            mu = q_bar + self.adapt_keys(k_mean)
            learned = {"proposal_mean": root * mu, "query_landmarks": root * q_bar}
            return cast(Array, lara(q, k, v, key, kv_mask=kv_mask, **learned, **self.options))

        return _over_heads(head, query, key, value, _real(key, key_value_seq_lengths, mask), None, rng)


def mean_pool_init(noise: float = 0.01) -> Callable[..., Array]:
    """An initialiser of projections ``[..., R, S]``: means of R segments, and noise that tells equal slots apart.

    Args:
        noise: its standard deviation times the root of S.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        if shape[-2] > shape[-1]:
            raise ValueError(f"there are no means of {shape[-2]} segments of {shape[-1]} places")
        means = jnp.broadcast_to(averaging_matrix(shape[-1], shape[-2], dtype), shape)
        return means + noise / math.sqrt(shape[-1]) * jax.random.normal(key, shape, dtype)

    return init


def scale_keeping_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """An initialiser of projections ``[..., R, S]``: N(0, 1/S), which leaves the scale of logits alone at any S."""
    return jax.random.normal(key, shape, dtype) / math.sqrt(shape[-1])


class LinformerAttention(nnx.Module):
    r"""Linformer over batch and heads, with learned projections of up to ``max_length`` keys.

    Sharing is whose projections are the same: with ``"none"`` every key head has its own E and F, with ``"headwise"``
    all heads of a layer share an E and an F, with ``"key_value"`` one E that is F too; layers share by handing the
    ``projections`` of one to the others.

    Args:
        num_kv_heads: the number K of key heads.
        max_length: the longest input; shorter ones use the first columns.
        num_slots: the number R of slots, 256 if None; layers may differ in it.
        sharing: ``"none"``, ``"headwise"`` (if None) or ``"key_value"``.
        projections: those of another layer, in place of new ones (layerwise sharing): slots, sharing and whether they
            are frozen are what they are there, and not to be given here.
        init: an initialiser ``(key, shape, dtype)`` of ``[R, max_length]``, or ``[K, R, max_length]`` with ``"none"``;
            `scale_keeping_init`, `mean_pool_init` or any of `flax.nnx.initializers`.
        frozen: keep the projections as they were drawn: no optimiser of `nnx.Param` sees them.
        is_causal: as in `approx_attention.linformer`.
        options: further static arguments of it.
        rngs: where the parameters are drawn from; not needed with ``projections``.
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
        self.is_causal, self.options = is_causal, dict(options or {})
        if projections is None:
            if rngs is None:
                raise ValueError("LinformerAttention draws its projections: pass rngs, or projections of another layer")
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
                "with projections given, num_slots, sharing and frozen are theirs: leave them out; "
                f"got num_slots = {num_slots}, sharing = {sharing!r} and frozen = {frozen}"
            )
        self.projections = projections
        self.per_head = projections["projection_k"][...].ndim == 3

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        rng: Array | None = None,
        key_value_seq_lengths: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Attention in the layout of `approx_attention.attention`, as in `Eva`; ``rng`` is ignored."""
        arrays = {name: x[...] for name, x in self.projections.items()}
        owned: dict[str, Any] = {"per_head": arrays} if self.per_head else arrays
        return attention(
            query, key, value, method="linformer", is_causal=self.is_causal,
            key_value_seq_lengths=key_value_seq_lengths, mask=mask, **owned, **self.options,
        )  # fmt: skip


class Rfa(nnx.Module):
    """Random feature attention over batch and heads, with a learned bandwidth per key head and channel, and gates.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        options: static arguments of `approx_attention.rfa`.
        gate_dim: channels of the input from which gates are made; None for no gates.
        rngs: where the parameters are drawn from.
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

    @property
    def is_causal(self) -> bool:
        """Whether it was made causal."""
        return bool(self.options.get("is_causal"))

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
        """Attention in the layout of `approx_attention.attention`.

        Args:
            query: ``[..., T, N, D]``.
            key: ``[..., S, K, D]``.
            value: ``[..., S, K, Dv]``.
            rng: typed PRNG key of the features; the same one for the same features.
            gate_input: ``[..., S, gate_dim]``, needed if there are gates.
            key_value_seq_lengths: real keys per sequence, ``[...]``.
            mask: which keys are real, ``[..., 1, 1, S]``.

        Returns:
            ``[..., T, N, Dv]``.
        """
        if (self.gate is None) != (gate_input is None):
            made = "no gates, gate_dim = None" if self.gate is None else f"gates, gate_dim = {self.gate.in_features}"
            given = "None" if gate_input is None else f"shape {gate_input.shape}"
            raise ValueError(f"gate_input goes with gates: this module has {made}, and gate_input is {given}")
        gates: dict[str, Any] = {}
        if self.gate is not None and gate_input is not None:
            gates["gate_logits"] = self.gate(gate_input)
        return attention(
            query, key, value, method="rfa", rng=rng, key_value_seq_lengths=key_value_seq_lengths, mask=mask,
            per_head={"bandwidth": self.bandwidth[...]}, **self.options, **gates,
        )  # fmt: skip


class TensorAttention(nnx.Module):
    r"""A layer of tensor attention: projections to one query, m - 1 keys and m - 1 values per head, and back.

    With a learned null token in every set of keys, which stands for "no such token", it contains attention of all lower
    orders: values of order 3 and more start at a bias of 1, the null token's at 1 too.

    With ``logit_bound``, queries and keys are divided by their root mean square and logits scaled by
    :math:`\beta / D^{m/2}`, so that no logit exceeds :math:`\beta`, whatever is learned: the polynomial method then has
    a certificate that holds throughout training. The price is that typical logits are far below the bound.

    Args:
        model_dim: channels of the input and of the output.
        num_heads: the number N of heads.
        head_dim: the number D of channels of a head.
        order: m, at least 2.
        method: `approx_attention.tensor_attention` or `approx_attention.tensor_polynomial`, with or without bound
            hyper-parameters (`functools.partial`).
        null_token: whether there is one.
        logit_bound: :math:`\beta`, or None for logits without bound.
        is_causal: ``"both"``, ``"ordered"`` or None, as in `approx_attention.tensor_attention`.
        rngs: where the parameters are drawn from.

    Raises:
        ValueError: a count that is too small, a bound that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import TensorAttention
        >>> layer = TensorAttention(8, num_heads=2, head_dim=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 5, 8))).shape
        (3, 5, 8)

    Reference:
        :cite:p:`clift2020logic`; :cite:p:`roy2025simplex`, for the biases.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        order: int = 3,
        method: Callable[..., Array] = tensor_attention,
        null_token: bool = True,
        logit_bound: float | None = None,
        is_causal: Literal["both", "ordered"] | None = None,
        rngs: nnx.Rngs,
    ):
        sets = check_counts(2, order=order)[0] - 1
        if logit_bound is not None and not logit_bound > 0:
            raise ValueError(f"logit_bound must be positive, got {logit_bound}")
        self.method, self.logit_bound, self.is_causal = method, logit_bound, is_causal
        model_dim, *shape = check_counts(model_dim=model_dim, num_heads=num_heads, head_dim=head_dim)
        value_bias = nnx.initializers.ones if order > 2 else nnx.initializers.zeros
        self.query = nnx.LinearGeneral(model_dim, shape, rngs=rngs)
        self.keys = nnx.List([nnx.LinearGeneral(model_dim, shape, rngs=rngs) for _ in range(sets)])
        self.values = nnx.List(
            [nnx.LinearGeneral(model_dim, shape, bias_init=value_bias, rngs=rngs) for _ in range(sets)]
        )
        self.null = nnx.data(None)
        if null_token:
            keys = 0.02 * jax.random.normal(rngs.params(), (sets, *shape), jnp.float32)
            values = jnp.full((sets, *shape), float(order > 2), jnp.float32)
            self.null = nnx.data(nnx.Dict(keys=nnx.Param(keys), values=nnx.Param(values)))
        self.out = nnx.LinearGeneral(shape, model_dim, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: Array, *, kv_mask: Array | None = None) -> Array:
        """Attention of tokens ``[B, T, C]`` to themselves, of which ``kv_mask [B, T]`` says which are real."""
        q = self.query(x)
        keys, values = ([project(x) for project in projections] for projections in (self.keys, self.values))
        mask = jnp.ones(x.shape[:2], bool) if kv_mask is None else kv_mask
        if self.null is not None:
            # It stands before the first token, where causal queries see it; a query beside it keeps places aligned.
            keys, values = (
                [_before(token, y) for token, y in zip(self.null[name][...], ys, strict=True)]
                for name, ys in (("keys", keys), ("values", values))
            )
            mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
            q = jnp.pad(q, ((0, 0), (1, 0), (0, 0), (0, 0)))
        options: dict[str, Any] = {"is_causal": self.is_causal}
        if self.logit_bound is not None:
            q, *keys = (_unit_rms(y) for y in (q, *keys))
            options["scale"] = self.logit_bound / q.shape[-1] ** ((len(keys) + 1) / 2)

        def head(q: Array, keys: tuple[Array, ...], values: tuple[Array, ...], mask: Array) -> Array:
            return self.method(q, keys, values, None, kv_mask=mask, **options)

        over_heads = jax.vmap(head, (1, 1, 1, None), 1)
        out = jax.vmap(over_heads)(q, tuple(keys), tuple(values), mask)
        return self.out(out[:, -x.shape[1] :])


def _before(token: Array, x: Array) -> Array:
    """Tokens ``[B, T, N, D]`` after one ``[N, D]`` that is the same in all sequences."""
    return jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, *token.shape)), x], axis=1)


def _unit_rms(x: Array) -> Array:
    """Rows divided by their root mean square, computed in float32 or wider; a row of zeros stays one."""
    wide = x.astype(accumulation_dtype(x))
    square = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.where(square > 0, square, 1))).astype(x.dtype)


def _real(key: Array, lengths: Array | None, mask: Array | None) -> Array | None:
    """Which keys ``[..., S]`` are real, by their number and by a padding mask ``[..., 1, 1, S]``; None for all."""
    if mask is not None:
        if getattr(mask, "dtype", None) != jnp.bool_ or mask.ndim < 3 or mask.shape[-3:-1] != (1, 1):
            raise ValueError(f"mask must be boolean [..., 1, 1, S], got {shown(mask)}")
        mask = jnp.broadcast_to(mask[..., 0, 0, :], key.shape[:-2])
    if lengths is None:
        return mask
    real = within(lengths, key.shape[-3], list(key.shape[:-3]), "key_value_seq_lengths")
    return real if mask is None else real & mask


def _over_heads(
    head: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    per_head: Array | None,
    rng: Array | None,
) -> Array:
    """Lifts ``head(q, k, v, kv_mask, own, key)``, where ``own`` is what the key head owns, over batch and heads."""
    batch, num_heads, num_kv_heads = query.shape[:-3], query.shape[-2], key.shape[-2]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    mask = None if mask is None else mask.reshape(-1, mask.shape[-1])
    own = np.arange(num_heads) // (num_heads // num_kv_heads)
    key, value = key[:, :, own], value[:, :, own]
    per_head = None if per_head is None else per_head[own]
    keys = None if rng is None else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.asarray(own))
    over_heads = jax.vmap(head, (1, 1, 1, None, None if per_head is None else 0, None if keys is None else 0), 1)
    over_batch = jax.vmap(over_heads, (0, 0, 0, None if mask is None else 0, None, None))
    out = over_batch(query, key, value, mask, per_head, keys)
    return out.reshape(*batch, *out.shape[1:])
