"""Attention over batch and heads by a method whose arrays are learned."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from approx_attention.api import attention
from approx_attention.registry import BoundMethod


class Adaptor(nnx.Module):
    """A linear map and a layer norm of pooled queries or keys, shared by the heads."""

    def __init__(self, head_dim: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(head_dim, head_dim, kernel_init=nnx.initializers.truncated_normal(0.02), rngs=rngs)
        self.norm = nnx.LayerNorm(head_dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps ``[..., D]`` to the same."""
        return self.norm(self.linear(x))


class LearnedAttention(nnx.Module):
    """Base of the modules that own learned arrays of a method: the call that layers make.

    A subclass says in ``_arguments`` which method is called and with what. Where the learned arrays of a method are
    functions of a head's queries and keys, these are ``_by_head``, and the subclass has a method ``_head``.
    """

    options: dict[str, Any]

    @property
    def is_causal(self) -> bool:
        """True if it was made causal."""
        return bool(self.options.get("is_causal"))

    def _arguments(self) -> dict[str, Any]:
        """The arguments ``method`` of `approx_attention.attention` and those of the method."""
        raise NotImplementedError

    def _by_head(self, own: Array | None = None) -> dict[str, Any]:
        """The arguments that have ``_head`` called for each head, with the arrays ``[K, ...]`` that a key head owns."""
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
            rng: typed PRNG key of the noise; none for no noise, as in evaluation.
            key_value_seq_lengths: real keys per sequence, ``[...]``.
            mask: which keys are real, ``[..., 1, 1, S]``.

        Returns:
            ``[..., T, N, Dv]``.
        """
        return self._attend(query, key, value, rng=rng, key_value_seq_lengths=key_value_seq_lengths, mask=mask)

    def _attend(self, query: Array, key: Array, value: Array, **others: Any) -> Array:
        return attention(query, key, value, **self._arguments(), **others)


def _is_array(path: Any, x: Any) -> bool:
    """True for what may change between calls; functions that stand in a layer's place are structure."""
    return isinstance(x, nnx.Variable | jax.Array | np.ndarray)


@dataclasses.dataclass(frozen=True)
class _Structure:
    """A module without its arrays, as static data: graphs with mappings compare, but have no hash."""

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
    """One head of a module. Its arrays are arguments: a program compiled with them inside would not see them change."""
    others = jax.tree.unflatten(structure.tree_of_others, structure.others)
    module = nnx.merge(structure.graphdef, nnx.State({}) if state is None else state, others)
    return module._head(q, k, v, key, kv_mask, own)
