"""Scores for KV-cache eviction: recency, norms, and the attention that keys receive or are expected to receive."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import HIDDEN, WeightedKV, check_floating, in_blocks, scaled_queries, squared_norm

# SnapKV's defaults: attention of the last 32 queries, averaged over 5 neighbouring keys.
SNAP_QUERIES, SNAP_POOL = 32, 5


class Queries(NamedTuple):
    """Queries of the G query heads that share the keys of one head.

    Attributes:
        rows: queries ``[T, G, D]`` in order of positions.
        seen: number of keys that each query sees, from the first on, ``[T]``; 0 for padding.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.decoding import Queries
        >>> Queries.last(jnp.ones((3, 2)), num_keys=10).seen.tolist()
        [8, 9, 10]
    """

    rows: Array
    seen: Array

    @classmethod
    def last(cls, queries: Array, num_keys: int, after: int | Array = 0) -> Self:
        """Make queries of the last T positions, each of which sees the keys up to its position.

        Args:
            queries: ``[T, D]``, or ``[T, G, D]`` for G query heads.
            num_keys: the number S of keys.
            after: the number of positions after the last key, which see all keys.
        """
        position = jnp.arange(queries.shape[0], dtype=jnp.int32) + (num_keys - queries.shape[0] + after)
        return cls(_grouped(queries), jnp.clip(position + 1, 0, num_keys))

    @classmethod
    def later(cls, queries: Array, num_keys: int) -> Self:
        """Make queries of any positions after all keys, which see all of them.

        Args:
            queries: ``[T, D]``, or ``[T, G, D]`` for G query heads.
            num_keys: the number S of keys.
        """
        return cls(_grouped(queries), jnp.full(queries.shape[0], num_keys, jnp.int32))

    def recent(self, count: int) -> Self:
        """The last ``count`` queries."""
        return type(self)(self.rows[-count:], self.seen[-count:])

    @property
    def flat(self) -> tuple[Array, Array]:
        """Rows ``[T * G, D]``, and the number of keys that each sees."""
        return self.rows.reshape(-1, self.rows.shape[2]), jnp.repeat(self.seen, self.rows.shape[1])


def _grouped(queries: Array) -> Array:
    return queries if queries.ndim == 3 else queries[:, None]


def check_queries(queries: Any, k: Array, most: int | None) -> None:
    """Raise unless queries are rows for the last keys.

    Args:
        queries: ``[T, D]``, or ``[T, G, D]`` for G query heads.
        k: keys ``[S, D]``, of which only D counts.
        most: the largest T; None for any.

    Raises:
        TypeError: queries that are not floating point.
        ValueError: another shape, an empty axis, or too many rows.
    """
    check_floating("queries", queries)
    shape, channels = queries.shape, k.shape[-1]
    if queries.ndim not in (2, 3) or shape[-1] != channels or 0 in shape or (most is not None and shape[0] > most):
        rows, said = ("1 or more", "") if most is None else (f"1 to {most}", ", those of the last keys")
        raise ValueError(
            f"queries must be [T, D] = [{rows}, {channels}]{said}, or [T, G, D] for G query heads; got shape {shape}"
        )


def attention_received(tokens: WeightedKV, queries: Array) -> Array:
    r"""Sum the attention weights that each key receives from causal queries at the last positions.

    .. math:: \mathrm{received}_j = \sum_{t \ge j} \frac{m_j e^{q_t \cdot k_j}}{\sum_{i \le t} m_i e^{q_t \cdot k_i}}

    Args:
        tokens: S tokens; hidden ones have mass 0.
        queries: the queries of the last T positions ``[T, D]``, or ``[T, G, D]`` for G query heads; in scaled space,
            or unscaled if the tokens carry a scale.

    Returns:
        Sums ``[S]``; their total is the number of queries that see a key.

    Raises:
        TypeError: not a `WeightedKV`, queries that are not floating point.
        ValueError: queries have another shape, or more than S positions.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.decoding import attention_received
        >>> tokens = WeightedKV.of_tokens(jnp.zeros((4, 2)), jnp.zeros((4, 1)))
        >>> attention_received(tokens, jnp.ones((2, 2))).round(2).tolist()  # 1/3 from one query, 1/4 from the other
        [0.58, 0.58, 0.58, 0.25]

    Reference:
        :cite:p:`zhang2023h2o`; for a window of the last queries: :cite:p:`li2024snapkv`.
    """
    if not isinstance(tokens, WeightedKV):
        raise TypeError(f"attention_received needs a WeightedKV, got {type(tokens).__name__}")
    num_keys = tokens.k.shape[0]
    check_queries(queries, tokens.k, num_keys)
    return received(tokens, Queries.last(queries, num_keys))


def received(tokens: WeightedKV, queries: Queries) -> Array:
    """`attention_received` for `Queries`.

    Args:
        tokens: S tokens; hidden ones have mass 0.
        queries: queries with the number of keys that each sees.

    Returns:
        Sums of attention weights ``[S]``.
    """
    return _over_weights(tokens, queries, lambda total, weights: total + jnp.sum(weights, axis=0))


def _most_received(tokens: WeightedKV, queries: Queries) -> Array:
    """The largest attention weight that each key receives from a query."""
    return _over_weights(tokens, queries, lambda most, weights: jnp.maximum(most, jnp.max(weights, axis=0)))


def _over_weights(tokens: WeightedKV, queries: Queries, add: Callable[[Array, Array], Array]) -> Array:
    """Accumulate the attention weights ``[t, S]`` of all queries, block by block, from zeros ``[S]``."""
    num_keys = tokens.k.shape[0]
    number = jnp.arange(num_keys, dtype=jnp.int32)
    rows, seen = queries.flat
    rows = scaled_queries(rows.astype(tokens.k.dtype), tokens)

    def of_block(block: tuple[Array, Array]) -> Array:
        q, count = block
        there = (number[None, :] < count[:, None]) & (tokens.mass > 0)[None, :]
        logits = q @ tokens.k.T + tokens.log_mass[None, :]
        # HIDDEN instead of -inf: a query that sees no key would give NaN. Its uniform weights are set to 0 afterwards.
        return jnp.where(there, jax.nn.softmax(jnp.where(there, logits, HIDDEN), axis=-1), 0)

    # 2^22 logits per block, 16 MB in float32: more would not be faster, and all T S logits might not fit in memory.
    # Padded rows of the last block see no key.
    size = min(rows.shape[0], max(1, 2**22 // num_keys))
    blocks = in_blocks(rows, size), in_blocks(seen, size)
    none = jnp.zeros(num_keys, tokens.k.dtype)
    return lax.scan(lambda total, block: (add(total, of_block(block)), None), none, blocks)[0]


def _expected(tokens: WeightedKV, queries: Queries) -> Array:
    r"""Logarithm of the attention that each key receives from Gaussian queries, times the norm of its value.

    .. math:: \log \Big( \|v_j\|\, \frac1G \sum_g \frac{m_j e^{\mu_g \cdot k_j + k_j^\top \Sigma_g k_j / 2}}
              {\sum_i m_i e^{\mu_g \cdot k_i + k_i^\top \Sigma_g k_i / 2}} \Big)

    with the mean and the covariance of each query head; numerator and normaliser use :math:`E[e^{q \cdot k}]`.
    """
    asked = (queries.seen > 0)[:, None, None]
    rows = scaled_queries(jnp.where(asked, queries.rows, 0).astype(tokens.k.dtype), tokens)
    count = jnp.maximum(jnp.sum(asked), 1).astype(rows.dtype)
    mean = jnp.sum(rows, axis=0) / count
    centred = jnp.where(asked, rows - mean[None], 0)
    covariance = jnp.einsum("tgd,tge->gde", centred, centred) / count
    linear = jnp.einsum("gd,sd->gs", mean, tokens.k)
    quadratic = jnp.einsum("gde,sd,se->gs", covariance, tokens.k, tokens.k)
    share = jax.nn.log_softmax(linear + quadratic / 2 + tokens.log_mass[None, :], axis=-1)
    mean_share = jax.nn.logsumexp(share, axis=0) - jnp.log(jnp.asarray(share.shape[0], share.dtype))
    # In the log domain, because in sharp heads the shares of most keys are 0 in float32 and would tie.
    return mean_share + jnp.log(squared_norm(tokens.values)[:, 0]) / 2


def _recency(tokens: WeightedKV, queries: Queries) -> Array:
    return jnp.arange(tokens.k.shape[0]).astype(tokens.k.dtype)


def _small_norm(tokens: WeightedKV, queries: Queries) -> Array:
    return -squared_norm(tokens.k)[:, 0]


def _unlike_the_mean(tokens: WeightedKV, queries: Queries) -> Array:
    norm = jnp.sqrt(squared_norm(tokens.k))
    unit = tokens.k / jnp.where(norm > 0, norm, 1)
    # The sum of unit keys instead of their normalised mean: a positive factor does not change the ranking.
    return -(unit @ (tokens.mass @ unit))


def _snap(tokens: WeightedKV, queries: Queries) -> Array:
    attention = received(tokens, queries.recent(SNAP_QUERIES))
    # Neighbours of a key with much attention are kept with it, so that phrases stay together.
    # Padded here, because the mode "same" returns as many numbers as the longer of both arrays.
    padded = jnp.pad(attention, SNAP_POOL // 2)
    return jnp.convolve(padded, jnp.full((SNAP_POOL,), 1 / SNAP_POOL, attention.dtype), mode="valid")


@dataclasses.dataclass(frozen=True)
class Heuristic:
    """An eviction heuristic: the score of keys, and the queries that it needs.

    Attributes:
        score: ``(tokens [S], queries) -> [S]``; keys with the largest scores are kept.
        needs_queries: false if ``score`` ignores its second argument.
        later: true if queries come after all keys, in any number; else they belong to the last positions.
    """

    score: Callable[[WeightedKV, Queries], Array]
    needs_queries: bool = False
    later: bool = False


HEURISTICS: Mapping[str, Heuristic] = {
    "streaming_llm": Heuristic(_recency),
    "knorm": Heuristic(_small_norm),
    "keydiff": Heuristic(_unlike_the_mean),
    "h2o": Heuristic(received, True),
    "snapkv": Heuristic(_snap, True),
    "tova": Heuristic(lambda tokens, queries: received(tokens, queries.recent(1)), True),
    "expected_attention": Heuristic(_expected, True),
    "kvzip": Heuristic(_most_received, True, later=True),
}
