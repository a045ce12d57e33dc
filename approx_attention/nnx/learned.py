"""Base of attention modules with learned arrays."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from approx_attention.api import attention
from approx_attention.registry import BoundMethod


class Adaptor(nnx.Module):
    """A linear map and a layer norm of pooled queries or keys, shared by the heads.

    Args:
        head_dim: the number D of channels of a head.
        rngs: streams for the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import Adaptor
        >>> Adaptor(8, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 8))).shape
        (2, 3, 8)
    """

    def __init__(self, head_dim: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(head_dim, head_dim, kernel_init=nnx.initializers.truncated_normal(0.02), rngs=rngs)
        self.norm = nnx.LayerNorm(head_dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map ``[..., D]`` to ``[..., D]``."""
        return self.norm(self.linear(x))


class LearnedAttention(nnx.Module):
    """Base class of modules with learned arrays of a method.

    A subclass defines the method and its arguments in ``_arguments``. If learned arrays depend on a head's queries and
    keys, the subclass defines ``_head``, and its arguments are ``_by_head``.
    """

    options: dict[str, Any]

    @property
    def is_causal(self) -> bool:
        """Whether the module is causal."""
        return bool(self.options.get("is_causal"))

    def _arguments(self) -> dict[str, Any]:
        """The arguments ``method`` of `approx_attention.attention` and those of the method."""
        raise NotImplementedError

    def _by_head(self, own: Array | None = None) -> dict[str, Any]:
        """The arguments that call ``_head`` for each head, with the arrays ``[K, ...]`` of key heads."""
        graphdef, state, others = nnx.split(self, _is_array, ...)
        leaves, tree = jax.tree.flatten(others)
        arguments: dict[str, Any] = {"structure": _Structure(graphdef, tuple(leaves), tree)}
        if jax.tree.leaves(state):
            arguments["state"] = state
        bound = BoundMethod(type(self).__name__, _call_head, arguments)
        return {"method": bound, "per_head": {} if own is None else {"own": own}}

    def _head(self, q: Array, k: Array, v: Array, key: Array | None, kv_mask: Array | None, own: Array | None) -> Array:
        """The output of one head, from queries ``[T, D]`` and keys and values ``[S, .]``."""
        raise NotImplementedError

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
            rng: typed PRNG key of the noise; None for no noise, as in evaluation.
            key_value_seq_lengths: real keys per sequence, ``[...]``.
            mask: true where a key is real, ``[..., 1, 1, S]``.

        Returns:
            ``[..., T, N, Dv]``.
        """
        return self._attend(query, key, value, rng=rng, key_value_seq_lengths=key_value_seq_lengths, mask=mask)

    def _attend(self, query: Array, key: Array, value: Array, **others: Any) -> Array:
        return attention(query, key, value, **self._arguments(), **others)


def _is_array(path: Any, x: Any) -> bool:
    """Whether a leaf may change between calls; functions in place of layers are structure."""
    return isinstance(x, nnx.Variable | jax.Array | np.ndarray)


@dataclasses.dataclass(frozen=True)
class _Structure:
    """A module without its arrays, as static data. Graphs with mappings are comparable, but not hashable."""

    graphdef: Any
    others: tuple[Any, ...]
    tree_of_others: Any

    def __hash__(self) -> int:
        return hash(type(self))


def _call_head(
    q: Array,
    k: Array,
    v: Array,
    key: Array | None = None,
    *,
    structure: _Structure,
    state: nnx.State | None = None,
    own: Array | None = None,
    kv_mask: Array | None = None,
) -> Array:
    """Call one head of a module. Its arrays are arguments, not constants, so that a compiled program sees changes."""
    others = jax.tree.unflatten(structure.tree_of_others, structure.others)
    module = nnx.merge(structure.graphdef, nnx.State({}) if state is None else state, others)
    return module._head(q, k, v, key, kv_mask, own)
