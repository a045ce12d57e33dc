"""Scores by which KV-cache eviction keeps keys: recency, norms, and the attention that keys receive."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import HIDDEN, WeightedKV, check_floating, in_blocks, scaled_queries, squared_norm

# SnapKV's defaults: attention of the last 32 queries, averaged over 5 neighbouring keys.
SNAP_QUERIES, SNAP_POOL = 32, 5


def check_queries(queries: Any, k: Array) -> None:
    """Raises unless ``queries`` are ``[T, D]``, those of the last T of the keys."""
    check_floating("queries", queries)
    if queries.ndim != 2 or queries.shape[1:] != k.shape[1:] or not 0 < queries.shape[0] <= k.shape[0]:
        raise ValueError(
            f"queries must be [T, D] = [1 to {k.shape[0]}, {k.shape[-1]}], those of the last keys; got shape "
            f"{queries.shape}"
        )


def attention_received(tokens: WeightedKV, queries: Array) -> Array:
    r"""Sum of the attention weights that each key receives from causal queries at the last positions.

    .. math:: \mathrm{received}_j = \sum_{t \ge j} \frac{m_j e^{q_t \cdot k_j}}{\sum_{i \le t} m_i e^{q_t \cdot k_i}}

    Args:
        tokens: S tokens, the hidden ones of mass 0.
        queries: the queries of the last T positions ``[T, D]``, in the space of the keys that the tokens were made from
            (scaled space, unless they carry a scale).

    Returns:
        Sums ``[S]``, which add up to the number of queries that see a key.

    Raises:
        TypeError: not a `WeightedKV`, queries that are not floating point.
        ValueError: queries that are not ``[T, D]`` with at most S rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.decoding import attention_received
        >>> tokens = WeightedKV.of_tokens(jnp.zeros((4, 2)), jnp.zeros((4, 1)))
        >>> attention_received(tokens, jnp.ones((2, 2))).round(2).tolist()  # a third of one, a quarter of the other
        [0.58, 0.58, 0.58, 0.25]

    Reference:
        :cite:p:`zhang2023h2o`; of a window of the last queries: :cite:p:`li2024snapkv`.
    """
    if not isinstance(tokens, WeightedKV):
        raise TypeError(f"attention_received takes a WeightedKV, got {type(tokens).__name__}")
    check_queries(queries, tokens.k)
    num_keys, num_queries = tokens.k.shape[0], queries.shape[0]
    number = jnp.arange(num_keys, dtype=jnp.int32)
    position = jnp.arange(num_queries, dtype=jnp.int32) + (num_keys - num_queries)
    queries = scaled_queries(queries.astype(tokens.k.dtype), tokens)

    def of_block(rows: tuple[Array, Array]) -> Array:
        q, place = rows
        seen = (number[None, :] <= place[:, None]) & (tokens.mass > 0)[None, :]
        logits = q @ tokens.k.T + tokens.log_mass[None, :]
        # HIDDEN and not -inf: a query that sees no key would give NaN. Its uniform weights are cleared after.
        return jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, HIDDEN), axis=-1), 0)

    # 2^22 logits at a time, 16 MB in float32: more would not be faster, and all T S of them need not fit.
    block = min(num_queries, max(1, 2**22 // num_keys))
    # Padding of the last block gets position -1, before the first token, and so sees no key.
    rows = in_blocks(queries, block), in_blocks(position + 1, block) - 1
    none = jnp.zeros(num_keys, tokens.k.dtype)
    return lax.scan(lambda total, rows: (total + jnp.sum(of_block(rows), axis=0), None), none, rows)[0]


def _recency(tokens: WeightedKV, queries: Array) -> Array:
    return jnp.arange(tokens.k.shape[0]).astype(tokens.k.dtype)


def _small_norm(tokens: WeightedKV, queries: Array) -> Array:
    return -squared_norm(tokens.k)[:, 0]


def _unlike_the_mean(tokens: WeightedKV, queries: Array) -> Array:
    norm = jnp.sqrt(squared_norm(tokens.k))
    unit = tokens.k / jnp.where(norm > 0, norm, 1)
    # The sum of unit keys in place of their normalised mean: a positive factor leaves the ranking alone.
    return -(unit @ (tokens.mass @ unit))


def _snap(tokens: WeightedKV, queries: Array) -> Array:
    received = attention_received(tokens, queries[-SNAP_QUERIES:])
    # Neighbours of a key that is attended to are kept with it, so that phrases are not torn apart.
    return jnp.convolve(received, jnp.full((SNAP_POOL,), 1 / SNAP_POOL, received.dtype), mode="same")


@dataclasses.dataclass(frozen=True)
class Heuristic:
    """Eviction heuristic: the score of each key, and whether it reads queries.

    Attributes:
        score: ``(tokens [S], queries [T, D] of the last T positions) -> [S]``; keys with the greatest scores are kept.
        needs_queries: false if ``score`` ignores its second argument.
    """

    score: Callable[[WeightedKV, Array], Array]
    needs_queries: bool = False


HEURISTICS: Mapping[str, Heuristic] = {
    "streaming_llm": Heuristic(_recency),
    "knorm": Heuristic(_small_norm),
    "keydiff": Heuristic(_unlike_the_mean),
    "h2o": Heuristic(attention_received, True),
    "snapkv": Heuristic(_snap, True),
    "tova": Heuristic(lambda tokens, queries: attention_received(tokens, queries[-1:]), True),
}
