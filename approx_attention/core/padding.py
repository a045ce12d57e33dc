"""Moves real tokens before padding, so that methods that cut or rank tokens by position see real tokens only."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention.core.checks import check_mask
from approx_attention.kernels import AttentionState, pad_rows


class RealFirst(NamedTuple):
    """A stable order with real tokens before padding.

    Attributes:
        order: the old positions of the tokens in the new order ``[n]``.
        position: the new position of each token ``[n]``; for a real token, its rank among the real ones.
        real: mask of the real tokens in the new order ``[n]``.
    """

    order: Array
    position: Array
    real: Array

    @classmethod
    def of(cls, mask: Array) -> Self:
        """The order for a mask ``[n]`` that is true for real tokens."""
        places = jnp.arange(mask.shape[0], dtype=jnp.int32)
        rank = jnp.cumsum(mask, dtype=jnp.int32) - 1
        num_real = rank[-1] + 1
        # A cumulative sum gives the ranks, and a scatter inverts them; unlike a sort this is linear. Padding at
        # position j has j - rank - 1 padded positions before it.
        position = jnp.where(mask, rank, num_real + places - rank - 1)
        order = jnp.zeros_like(places).at[position].set(places, unique_indices=True)
        return cls(order, position, places < num_real)

    def front(self, tree: Any) -> Any:
        """The rows of every array ``[n, ...]`` in the new order."""
        return _permuted(tree, self.order)

    def back(self, tree: Any) -> Any:
        """The rows of every array ``[n, ...]``, moved back to their old positions."""
        return _permuted(tree, self.position)


def _permuted(tree: Any, places: Array) -> Any:
    """Permute the rows of every array. The derivative is a permutation too, not a scatter-add."""
    return jax.tree.map(lambda x: x.at[places].get(unique_indices=True, mode="promise_in_bounds"), tree)


def count_real(mask: Array) -> Array:
    """The number of real tokens, int32."""
    return jnp.sum(mask, dtype=jnp.int32)


def query_mask(q_mask: Array | None, kv_mask: Array | None, num_queries: int) -> Array | None:
    """The mask of real queries: the given one, or in self-attention that of the keys.

    Args:
        q_mask: true where a query is real ``[T]``, or None.
        kv_mask: true where a key is real ``[S]``, or None; only used without a ``q_mask``, if T = S.
        num_queries: the number T of queries.

    Returns:
        The mask ``[T]``; None if all queries count as real.

    Raises:
        TypeError: a ``q_mask`` that is not boolean.
        ValueError: a ``q_mask`` that is not ``[T]``.
    """
    if q_mask is None:
        return query_places(kv_mask, num_queries, is_causal=False)
    check_mask("q_mask", q_mask, num_queries)
    return q_mask


def query_places(kv_mask: Array | None, num_queries: int, is_causal: bool) -> Array | None:
    """The mask of queries at positions of real keys.

    Args:
        kv_mask: true where a key is real ``[S]``, or None.
        num_queries: the number T of queries.
        is_causal: whether query t is at the position of key t also for T != S. Queries after the last key are not in
            padding.

    Returns:
        The mask ``[T]``; None without a ``kv_mask``, and where queries have independent positions (T != S, not causal).
    """
    if kv_mask is None or (kv_mask.shape[0] != num_queries and not is_causal):
        return None
    # Queries after the last key are not in padding.
    return jnp.pad(kv_mask[:num_queries], (0, max(0, num_queries - kv_mask.shape[0])), constant_values=True)


def placed_queries(kv_mask: Array | None, num_queries: int, is_causal: bool) -> Array | None:
    """The mask of queries with a position among the real tokens.

    Args:
        kv_mask: true where a key is real ``[S]``, or None.
        num_queries: the number T of queries.
        is_causal: as in ``query_places``. Queries after the last real key then have a position, also in padding.

    Returns:
        The mask ``[T]``; None as in ``query_places``.
    """
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
    """Call ``state(q, k, v, kv_mask)`` with real tokens moved to the front, so that padding takes no position.

    In self-attention (T = S) queries move with their keys. In the causal form they do so for other lengths too: query t
    is at the position of key t, or after all keys, and sees the real keys at positions j <= t. Then a query in padding
    has no position among the real tokens: it gives 0 unless no real key comes after it.

    Args:
        state: ``(q, k, v, kv_mask) -> AttentionState``, called with real keys first.
        q: queries ``[T, D]``, or a pytree of arrays with one row per query.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        kv_mask: true where a key is real ``[S]``; with None nothing is moved.
        is_causal: query t sees keys j <= t.

    Returns:
        The `AttentionState` of the queries in their original order.
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
    """Ranks of tokens among the real ones.

    Args:
        mask: true where a token is real ``[S]``; None if all are.
        num_tokens: the number S of tokens.

    Returns:
        The ranks, int32 ``[S]``. Padding has the rank of the last real token before it, or 0.

    Example:
        >>> import jax.numpy as jnp
        >>> ranks(jnp.array([False, True, False, True]), 4).tolist()
        [0, 0, 0, 1]
    """
    if mask is None:
        return jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.maximum(jnp.cumsum(mask, dtype=jnp.int32) - 1, 0)


def draw_of_size(noise: Array, size: Array | int) -> Array:
    """Rearrange noise ``[R, n, ...]`` so that its first columns equal noise for fewer columns.

    A padded sequence thus gets the noise of the sequence without padding. The numbers of a counter-based generator
    (JAX's default, with ``jax_threefry_partitionable``) depend only on their position in the flat array; with other
    generators only the distributions are equal.

    Args:
        noise: independent numbers ``[R, n, ...]``.
        size: the number of columns that count, at most n; an int or a traced int32.

    Returns:
        Noise ``[R, n, ...]``, whose first ``size`` columns equal noise ``[R, size, ...]`` of the same PRNG key. The
        other columns contain further numbers of the given noise.

    Example:
        >>> import jax
        >>> key = jax.random.key(0)
        >>> noise = draw_of_size(jax.random.uniform(key, (2, 8)), 5)
        >>> bool((noise[:, :5] == jax.random.uniform(key, (2, 5))).all())
        True
    """
    rows, length = noise.shape[:2]
    if rows == 1:
        return noise
    place = jnp.arange(rows, dtype=jnp.int32)[:, None] * size + jnp.arange(length, dtype=jnp.int32)[None, :]
    return noise.reshape(rows * length, *noise.shape[2:])[place]


def floor_of_share(number: Array, times: Array, over: Array) -> tuple[Array, Array]:
    r""":math:`\lfloor a b / c \rfloor` and the remainder for :math:`0 \le a \le c`, where the product may exceed 2^31.

    The quotient is estimated in floating point. The remainder of the estimate is small, and therefore exact in wrapping
    integer arithmetic, for :math:`b c \le 2^{51}` and :math:`c \le 2^{29}`.

    Args:
        number: a, int32 of any shape.
        times: b, int32, not negative.
        over: c, int32, positive.

    Returns:
        The quotient and the remainder, int32.

    Example:
        >>> import jax.numpy as jnp
        >>> [int(x) for x in floor_of_share(jnp.int32(99_999), jnp.int32(70_000), jnp.int32(100_000))]
        [69999, 30000]
    """
    quotient = (number.astype(jnp.float32) * (times.astype(jnp.float32) / over.astype(jnp.float32))).astype(jnp.int32)
    missing = number * times - quotient * over
    return quotient + missing // over, missing % over
