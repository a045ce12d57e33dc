"""Real tokens before padding: methods that cut or rank tokens by position see the sequence of the real ones alone."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention.core.checks import check_mask
from approx_attention.kernels import AttentionState, pad_rows


class RealFirst(NamedTuple):
    """Stable order with real tokens first and padding after them.

    Attributes:
        order: the places of the tokens in that order ``[n]``.
        position: the new place of each token ``[n]``: of a real one, its rank among the real ones.
        real: which tokens are real, in that order ``[n]``.
    """

    order: Array
    position: Array
    real: Array

    @classmethod
    def of(cls, mask: Array) -> Self:
        """The order of tokens whose ``mask [n]`` is true where they are real."""
        places = jnp.arange(mask.shape[0], dtype=jnp.int32)
        rank = jnp.cumsum(mask, dtype=jnp.int32) - 1
        num_real = rank[-1] + 1
        # A cumulative sum gives the ranks, and a scatter inverts them: linear, where a sort is not. Padding at place j
        # has j - rank - 1 padded places before it.
        position = jnp.where(mask, rank, num_real + places - rank - 1)
        order = jnp.zeros_like(places).at[position].set(places, unique_indices=True)
        return cls(order, position, places < num_real)

    def front(self, tree: Any) -> Any:
        """The rows of every array ``[n, ...]``, real ones first."""
        return _permuted(tree, self.order)

    def back(self, tree: Any) -> Any:
        """Rows in that order, moved back to their original places."""
        return _permuted(tree, self.position)


def _permuted(tree: Any, places: Array) -> Any:
    """Rows of every array in a given order; as each is read once, the derivative is a permutation and no sum."""
    return jax.tree.map(lambda x: x.at[places].get(unique_indices=True, mode="promise_in_bounds"), tree)


def count_real(mask: Array) -> Array:
    """The number of real tokens, int32."""
    return jnp.sum(mask, dtype=jnp.int32)


def query_mask(q_mask: Array | None, kv_mask: Array | None, num_queries: int) -> Array | None:
    """The mask of real queries ``[T]``: ``q_mask`` if given, or in self-attention (T = S) that of the keys."""
    if q_mask is None:
        return query_places(kv_mask, num_queries, is_causal=False)
    check_mask("q_mask", q_mask, num_queries)
    return q_mask


def query_places(kv_mask: Array | None, num_queries: int, is_causal: bool) -> Array | None:
    """The mask of queries at the places of real keys ``[T]``; None where queries have places apart from the keys'."""
    if kv_mask is None or (kv_mask.shape[0] != num_queries and not is_causal):
        return None
    # Queries beyond the keys stand where no padding is.
    return jnp.pad(kv_mask[:num_queries], (0, max(0, num_queries - kv_mask.shape[0])), constant_values=True)


def placed_queries(kv_mask: Array | None, num_queries: int, is_causal: bool) -> Array | None:
    """The mask of queries with a place among the real tokens: causally those behind the last real key too."""
    own = query_places(kv_mask, num_queries, is_causal)
    if own is None or kv_mask is None or not is_causal:
        return own
    seen = jnp.cumsum(pad_rows(kv_mask[:num_queries], max(0, num_queries - kv_mask.shape[0])), dtype=jnp.int32)
    return own | (seen == count_real(kv_mask))


def over_real_tokens(
    state: Callable[[Any, Array, Array, Array | None], AttentionState],
    q: Any,
    k: Array,
    v: Array,
    kv_mask: Array | None,
    *,
    is_causal: bool = False,
) -> AttentionState:
    """The state ``state(q, k, v, kv_mask)`` of real tokens moved to the front, so that padding takes no place.

    In self-attention (T = S) queries move with their keys. Causally they do so for other lengths too: query t stands at
    the place of key t, those after the last key behind all, and it sees the real keys at places j <= t. Then a query in
    padding has no place among the real tokens: it gives 0 unless no real key comes after it.

    Args:
        state: ``(q, k, v, kv_mask) -> AttentionState``, called with real keys first.
        q: queries ``[T, D]``, or a tree of arrays with a row for each.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        kv_mask: true where a key is real ``[S]``, or None: then nothing is moved.
        is_causal: query t sees keys j <= t.

    Returns:
        The `AttentionState` of the queries at their own places.
    """
    if kv_mask is None:
        return state(q, k, v, None)
    keys = RealFirst.of(kv_mask)
    k, v = keys.front((k, v))
    placed = placed_queries(kv_mask, jax.tree.leaves(q)[0].shape[0], is_causal)
    if placed is None:
        return state(q, k, v, keys.real)
    queries = RealFirst.of(placed)
    answer = queries.back(state(queries.front(q), k, v, keys.real))
    if not is_causal:
        return answer
    out = jnp.where(placed[:, None], answer.out, jnp.zeros_like(answer.out))
    return AttentionState(out, jnp.where(placed, answer.lse, -jnp.inf))


def ranks(mask: Array | None, num_tokens: int) -> Array:
    """Ranks of tokens among the real ones; padding has that of the last real token before it, or 0."""
    if mask is None:
        return jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.maximum(jnp.cumsum(mask, dtype=jnp.int32) - 1, 0)


def draw_of_size(noise: Array, size: Array | int) -> Array:
    """Rearranges noise ``[R, n, ...]`` so that its first ``size <= n`` columns are a random array ``[R, size, ...]``.

    So a padded sequence gets the noise of the sequence without its padding. The numbers of a counter-based generator
    (JAX's default, with ``jax_threefry_partitionable``) depend on their place in the flat array alone; with another
    generator the distributions are equal, not the numbers.
    """
    rows, length = noise.shape[:2]
    if rows == 1:
        return noise
    place = jnp.arange(rows, dtype=jnp.int32)[:, None] * size + jnp.arange(length, dtype=jnp.int32)[None, :]
    return noise.reshape(rows * length, *noise.shape[2:])[place]


def floor_of_share(number: Array, times: Array, over: Array) -> tuple[Array, Array]:
    r""":math:`\lfloor a b / c \rfloor` and the remainder, for :math:`0 \le a \le c`, where the product may pass 2^31.

    The quotient is estimated in floating point. The remainder of the estimate is small, and so exact in integers that
    wrap around.
    """
    quotient = (number.astype(jnp.float32) * (times.astype(jnp.float32) / over.astype(jnp.float32))).astype(jnp.int32)
    missing = number * times - quotient * over
    return quotient + missing // over, missing % over
