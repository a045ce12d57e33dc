"""Tokens lifted by a random number each: sums over all of them from the few that a query finds first."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import (
    AttentionState,
    ChosenTokens,
    joined,
    kept,
    keys_as_of,
    merge,
    out_of_blocks,
    require_same_kind,
    token_sums_inputs,
)
from approx_attention.sparse.gathered import gathered_state, rows_gathered
from approx_attention.sparse.retrieval import is_found, largest_logits, tile_shape

# Of a token that has no number: its lift is infinite, so that every query finds it, and gets NaN.
NO_NUMBER = -1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LiftedKV(ChosenTokens):
    r"""A summary that keeps every token with a random number u, and of which a query reads K by a priority sample.

    A query reads the K keys with the largest lifted logits :math:`q \cdot k_j - \log u_j`. Numerator and normaliser
    are then unbiased estimates of those over all tokens (`priority`).

    Attributes:
        k: keys ``[M, D]`` in scaled space.
        v: values ``[M, Dv]``.
        u: numbers in (0, 1] ``[M]``; 0 for an absent token, and negative for a token without a number, which makes
            every output NaN.
        keys_per_query: the number K of keys that a query reads.
        scale: as in `WeightedKV`.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import attend
        >>> from approx_attention.sparse import LiftedKV
        >>> k = jnp.array([[0.0], [1.0], [2.0]])
        >>> tokens = LiftedKV.of_tokens(k, k, jnp.array([1.0, 0.5, 0.1]), jnp.ones(3, bool), keys_per_query=3)
        >>> out = attend(jnp.zeros((1, 1)), tokens).out  # K = M: exact
        >>> float(out[0, 0])
        1.0

    Reference:
        :cite:p:`zharkov2026priority`; :cite:p:`duffield2007priority`.
    """

    k: Array
    v: Array
    u: Array
    keys_per_query: int = dataclasses.field(metadata={"static": True})
    scale: Array | None = None

    @classmethod
    def of_tokens(cls, k: Array, v: Array, noise: Array, kv_mask: Array, keys_per_query: int) -> Self:
        """Keep the real tokens with their numbers.

        Args:
            k: keys ``[M, D]``.
            v: values ``[M, Dv]``.
            noise: the numbers u ``[M]`` in (0, 1]; a token whose number is not positive has none.
            kv_mask: true where a token is real ``[M]``.
            keys_per_query: the number K of keys that a query reads.

        Raises:
            TypeError: keys or values that are not floating point, a mask that is not boolean.
            ValueError: different numbers of keys, values and mask entries.
        """
        k, v = token_sums_inputs(k, v, kv_mask)
        u = lax.stop_gradient(noise).astype(k.dtype)
        return cls(k, v, jnp.where(kv_mask, jnp.where(u > 0, u, NO_NUMBER), 0), keys_per_query)

    @property
    def mass(self) -> Array:
        """1 for each token, and 0 for an absent one ``[M]``."""
        return (self.u != 0).astype(self.k.dtype)

    @property
    def lift(self) -> Array:
        """The bias of the logits of each key, ``-log(u)`` ``[M]``; infinite for a token without a number."""
        return jnp.where(self.u > 0, -jnp.log(jnp.where(self.u > 0, self.u, 1)), jnp.inf)

    def numbers_at_once(self, num_queries: int) -> int:
        """Gathered keys and values and their cotangents, a tile of logits, and u with its bias and mask."""
        num_tokens, count = self.k.shape[0], min(self.keys_per_query, self.k.shape[0])
        gathered = rows_gathered(num_queries, count) * count * (self.k.shape[1] + self.v.shape[1])
        return 2 * gathered + math.prod(tile_shape(num_queries, num_tokens)) + 3 * num_tokens

    def state(self, q: Array) -> AttentionState:
        """Attention of queries ``[T, D]`` in scaled space, each over its K keys with the largest lifted logits."""
        count = min(self.keys_per_query, self.k.shape[0])
        found = largest_logits(q, self.k, count + 1, key_bias=self.lift, kv_mask=self.u != 0)
        return self.sampled(q, *found)

    def sampled(self, q: Array, lifted: Array, places: Array) -> AttentionState:
        r"""Attention of each query over K keys that are given, with the weights of a priority sample.

        .. math:: \hat w_{tj} = \max(e^{q_t \cdot k_j}, e^{\tau_t}), \qquad
                  \tau_t = \text{the } (K + 1)\text{-th of the largest } q_t \cdot k_j - \log u_j

        Args:
            q: queries ``[T, D]`` in scaled space.
            lifted: the K + 1 largest lifted logits of each query ``[T, K + 1]``, in falling order; -inf for no key.
            places: the positions of these keys ``[T, K + 1]``.

        Returns:
            The `AttentionState` of the queries.
        """
        lifted, places = kept(lifted), kept(places)
        # Without a (K + 1)-th key it is -inf, and every weight the key's own.
        threshold, lifted, places = lifted[:, -1:], lifted[:, :-1], places[:, :-1]
        seen = is_found(lifted)
        # The factor of a weight, not the maximum of both: a constant factor leaves its gradient unbiased. It is at most
        # 1/u, as all that are chosen pass the threshold.
        log_factor = jnp.where(seen, jnp.maximum(threshold - lifted + self.lift[places], 0), 0)
        return gathered_state(q, self.k, self.v, places, seen, log_factor)


@merge.register
def _merge_lifted(a: LiftedKV, b: Any) -> LiftedKV:
    require_same_kind(a, b)
    kinds = [(x.keys_per_query, x.k.shape[1], x.v.shape[1]) for x in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"merge takes lifted tokens of one (keys_per_query, D, Dv), got {kinds[0]} and {kinds[1]}")
    k, v, u = (joined(x, y) for x, y in ((a.k, keys_as_of(a, b)), (a.v, b.v), (a.u, b.u)))
    return LiftedKV(k, v, u, a.keys_per_query, a.scale)


def first_lifted(blocks: LiftedKV, count: Array) -> LiftedKV:
    """The tokens of the first blocks of a sequence; those of other blocks are absent, with their keys kept.

    Args:
        blocks: the tokens of n blocks of b, every array stacked ``[n, b, ...]``.
        count: the number of blocks to keep, int32.

    Returns:
        The `LiftedKV` of n b tokens.
    """
    seen = (jnp.arange(blocks.u.shape[0], dtype=jnp.int32) < count)[:, None]
    return out_of_blocks(dataclasses.replace(blocks, u=jnp.where(seen, blocks.u, 0)))


def uniform_numbers(key: Array, num_keys: int) -> Array:
    """Sample uniform numbers in (0, 1], float32 ``[num_keys]``, for `LiftedKV`.

    `jax.random.uniform` has steps of 2^-23 and includes 0, which has no logarithm; these have steps of 2^-32.
    """
    return (jax.random.bits(key, (num_keys,), jnp.uint32).astype(jnp.float32) + 0.5) * 2.0**-32
