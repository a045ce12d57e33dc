"""A layer of tree attention."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from approx_attention.core import check_counts, check_flag
from approx_attention.nnx.streams import layer_stream
from approx_attention.registry import BoundMethod, bind
from approx_attention.trees import children_of, tree_attention


class TreeAttention(nnx.Module):
    r"""A layer of tree attention: projections to one query, and to keys and values of each node, per head, and back.

    Nodes with children also have queries. With more than one node the biases of values are initialised to 1, so that
    products of values are initially close to sums. A random method keeps the random projections of its first call.

    Args:
        model_dim: channels of the input and of the output.
        num_heads: the number N of heads.
        head_dim: the number D of channels of a head.
        parents: the parent of each node, -1 for a child of the query, as in `approx_attention.tree_attention`.
        method: as in `approx_attention.tree_attention`.
        is_causal: tokens see tokens at their position and before.
        rngs: streams for the parameters; a random method forks ``attention``.
        **hyperparameters: static arguments of the method.

    Raises:
        ValueError: a count is too small, the parents are not a tree, or the method is unknown.
        TypeError: the method has no such argument.
        NotImplementedError: the method does not support a bias of its keys.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import TreeAttention
        >>> layer = TreeAttention(8, num_heads=2, head_dim=4, parents=(-1, 0), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 5, 8))).shape
        (3, 5, 8)

    Reference:
        :cite:p:`chakrabarti2026poly`; :cite:p:`roy2025simplex`, for the biases.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        parents: Sequence[int] = (-1, 0),
        method: str | Callable[..., Array] | BoundMethod = "exact",
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **hyperparameters: Any,
    ):
        bound = bind(method, hyperparameters, options=("scale",))
        bound.require_key_bias()
        children = children_of(parents)
        model_dim, *shape = check_counts(model_dim=model_dim, num_heads=num_heads, head_dim=head_dim)
        value_bias = nnx.initializers.ones if len(parents) > 1 else nnx.initializers.zeros
        self.bound, self.parents = nnx.static(bound), tuple(parents)
        self.is_causal = check_flag("is_causal", is_causal)
        self.stream = nnx.data(layer_stream(rngs) if bound.is_random else None)
        self.query = nnx.LinearGeneral(model_dim, shape, rngs=rngs)
        self.keys = nnx.List([nnx.LinearGeneral(model_dim, shape, rngs=rngs) for _ in parents])
        self.values = nnx.List([nnx.LinearGeneral(model_dim, shape, bias_init=value_bias, rngs=rngs) for _ in parents])
        asking = [node for node in range(len(parents)) if children[node]]
        self.node_queries = nnx.List([nnx.LinearGeneral(model_dim, shape, rngs=rngs) for _ in asking])
        self.asking = tuple(asking)
        self.out = nnx.LinearGeneral(shape, model_dim, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: Array, *, kv_mask: Array | None = None) -> Array:
        """Self-attention over trees of tokens.

        Args:
            x: tokens ``[B, T, C]``, C the ``model_dim``.
            kv_mask: true where a token is real ``[B, T]``; by default all are.

        Returns:
            ``[B, T, C]``.
        """
        q = self.query(x)
        keys, values = (jnp.stack([project(x) for project in of]) for of in (self.keys, self.values))
        # Leaves have no queries: their keys are placeholders.
        asking = dict(zip(self.asking, self.node_queries, strict=True))
        node_queries = jnp.stack([asking[node](x) if node in asking else k for node, k in enumerate(keys)])
        random = None if self.stream is None else jax.random.split(self.stream.key[...], q.shape[2])

        def head(key: Array | None, q: Array, k: Array, v: Array, u: Array, mask: Array | None) -> Array:
            options: Any = {"parents": self.parents, "method": self.bound, "is_causal": self.is_causal}
            return tree_attention(q, k, v, key, node_queries=u, kv_mask=mask, **options)

        over_heads = jax.vmap(head, (0, 1, 2, 2, 2, None), 1)
        out = jax.vmap(over_heads, (None, 0, 1, 1, 1, 0))(random, q, keys, values, node_queries, kv_mask)
        return self.out(out)
