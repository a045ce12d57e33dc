"""Top-k attention by hashing: every query over the largest logits among the keys that hash like it."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    check_count,
    checked_soft_cap,
    count_real,
    head_inputs,
    in_blocks,
    out_of_blocks,
    output_or_state,
    over_real_tokens,
    pad_rows,
)
from approx_attention.sparse import Buckets, Planes, gathered_state, rows_gathered


@output_or_state
def lsh_top_k(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    keys_per_query: int = 32,
    num_rounds: int = 4,
    num_hashes: int | None = None,
    projection: Float[Array, "N B D"] | None = None,
    is_causal: bool = False,
    logits_soft_cap: float | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Top-k attention among the keys that hash like the query.

    In each of N rounds the signs of b random projections put queries and keys into :math:`2^b` buckets. A query meets
    the K keys of its bucket that are nearest to its place, and K keys of the neighbouring bucket, which differs in the
    sign of the smallest projection. With :math:`C_t` all keys that it meets in any round, attention is over the K of
    them with the largest logits, with exact logits.

    .. math:: \mathrm{out}_t
              = \sum_{j \in S_t} e^{s\, q_t \cdot k_j}\, v_j \Big/ \sum_{j \in S_t} e^{s\, q_t \cdot k_j},
              \qquad S_t = \operatorname{arg\,top}_{K,\, j \in C_t}\; q_t \cdot k_j

    The cost is that of 2 N K gathered keys for each query, for any S. Signs see the angle between a query and a key,
    not the norm of the key: where norms differ much, the largest logits are missed more often. Reformer attends within
    chunks of the sorted sequence, in which later tokens move earlier ones. Here a causal query meets the last K keys of
    a bucket up to its place, and later keys change neither hash nor choice. A query that meets no key sees the one at
    its place. The choice of keys has no gradient.

    Shared arguments: see `approx_attention.methods`.

    Args:
        keys_per_query: the number K of keys; with K >= S the output is exact for the default ``num_hashes``.
        num_rounds: the number N of rounds; each adds 2 K keys to those that a query meets.
        num_hashes: the number b of signs, at most 24; by default the least with which a bucket contains no more than K
            real keys on average.
        projection: the directions ``[N, b, D]``; by default a random projection.

    Raises:
        ValueError: shapes that do not match, counts below 1, more than 24 signs, neither key nor projection.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import lsh_top_k, top_k
        >>> x, v = (jax.random.normal(jax.random.key(i), (256, 16)) for i in range(2))
        >>> q = 3 * x + 0.1 * v  # every query points at one key
        >>> out = lsh_top_k(q, x, v, jax.random.key(3), keys_per_query=8)
        >>> best = top_k(q, x, v, keys_per_query=8)
        >>> bool(jnp.linalg.norm(out - best) < 0.2 * jnp.linalg.norm(best))
        True

    Reference:
        :cite:p:`kitaev2020reformer`, section 2; the neighbour: :cite:p:`lv2007multiprobe`.
    """
    count = min(check_count("keys_per_query", keys_per_query), k.shape[0])
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    how: Any = {"num_rounds": num_rounds, "num_hashes": num_hashes, "projection": projection, "kv_mask": kv_mask}
    planes = Planes.of("lsh_top_k", key, k, count, **how)
    cap = checked_soft_cap(logits_soft_cap)

    def found(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        places = _found_by_hashing(q, k, Buckets.of(k, planes, kv_mask), count, is_causal, kv_mask)
        return gathered_state(q, k, v, *places, logits_soft_cap=cap)

    return over_real_tokens(found, q, k, v, kv_mask, is_causal=is_causal)


def _found_by_hashing(
    q: Array, k: Array, buckets: Buckets, count: int, is_causal: bool, kv_mask: Array | None
) -> tuple[Array, Array]:
    """The keys of the largest logits among those that each query meets ``[T, count]``, and which of them exist.

    The number of keys, ``nowhere``, stands for no key.
    """
    q, k = lax.stop_gradient((q, k))
    num_queries, nowhere = q.shape[0], k.shape[0]
    # Real keys come first.
    last = (nowhere if kv_mask is None else count_real(kv_mask)) - 1
    # A row of zeros for `nowhere`.
    k_padded = pad_rows(k, 1)
    rows = rows_gathered(num_queries, 2 * buckets.order.shape[0] * count)

    def of_rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        q, place = args
        # After sorting, repeated keys are adjacent, and all but the first are hidden.
        places = jnp.sort(buckets.met(q, place, count, is_causal), axis=1)
        again = jnp.pad(places[:, 1:] == places[:, :-1], ((0, 0), (1, 0)))
        # Gathered once: fused into the product, rows would be read once for each use.
        logits = jnp.einsum("td,tmd->tm", q, lax.optimization_barrier(k_padded[places]))
        logits, chosen = lax.top_k(jnp.where(again | (places == nowhere), -jnp.inf, logits), count)
        # Not `> -inf`, which is false of NaN: a NaN counts, so that it comes out.
        places, seen = jnp.take_along_axis(places, chosen, axis=1), logits != -jnp.inf
        # A query that meets no key in any round sees the one at its place, so that its weights sum to 1.
        alone, own = ~seen[:, 0], jnp.minimum(place, last)
        first = jnp.arange(count, dtype=jnp.int32)[None, :] == 0
        places = jnp.where(first & alone[:, None], jnp.maximum(own, 0)[:, None], places)
        return places, seen | (first & (alone & (own >= 0))[:, None])

    own_place = jnp.arange(num_queries, dtype=jnp.int32)
    found = lax.map(of_rows, (in_blocks(q, rows), in_blocks(own_place, rows)))
    return out_of_blocks(found, num_queries)
