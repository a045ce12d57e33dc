"""Priority attention by hashing: the sample of each query is found in less time than all pairs take."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    RealFirst,
    along_with,
    check_count,
    check_key,
    check_noise,
    count_real,
    head_inputs,
    in_blocks,
    out_of_blocks,
    output_or_state,
    over_real_tokens,
    pad_rows,
    real_keys,
)
from approx_attention.sparse import Buckets, LiftedKV, Planes, rows_gathered, uniform_numbers

# Keys of the largest lifts that a query looks at, in units of K + 1, and keys of a step of the loop that finds them.
LISTED, LIST_BLOCK = 4, 64


@output_or_state
def lsh_priority(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    keys_per_query: int = 64,
    num_rounds: int = 4,
    num_hashes: int | None = None,
    projection: Float[Array, "N B D"] | None = None,
    noise: Float[Array, " S"] | None = None,
    is_causal: bool = False,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Priority attention among the keys that hash like the query and those of the largest lifts.

    .. math:: \mathrm{out}_t = \sum_{j \in S_t} \hat w_{tj}\, v_j \Big/ \sum_{j \in S_t} \hat w_{tj}, \qquad
              \hat w_{tj} = \max(e^{s\, q_t \cdot k_j}, e^{\tau_t}), \qquad
              S_t = \operatorname{arg\,top}_{K,\, j \in C_t}\; s\, q_t \cdot k_j - \log u_j,

    where :math:`\tau_t` is the (K + 1)-th largest perturbed logit in :math:`C_t`. A lifted logit is large where the
    logit is, or the lift :math:`-\log u_j`, or both. The first is found by hashing, as in `lsh_top_k`, with K + 1 keys
    of a bucket. The second is the same for all queries: the 4 (K + 1) keys of the largest lifts, causally those before
    a block of 64 keys and the keys of that block, are in all :math:`C_t`.

    This is `priority` where :math:`C_t` has the K + 1 keys of the largest lifted logits. Keys that it misses are
    missing from the sums, which are then too small: the bound of `priority` does not hold. Hashing misses most where
    queries are long and heads are sharp. The cost per query is that of (2 N + 4) (K + 1) gathered keys, for any S. All
    keys of a causal query are sampled: no block is exact, and there is no decoding.

    Shared arguments: see `approx_attention.methods`.

    Args:
        keys_per_query: the number K of keys; with K >= S the output is exact.
        num_rounds: the number N of rounds; each adds 2 (K + 1) candidate keys per query.
        num_hashes: the number b of signs, at most 24; by default the smallest number for which a bucket contains at
            most K + 1 real keys on average.
        projection: the directions ``[N, b, D]``; by default a random projection.
        noise: the numbers u in (0, 1], ``[S]``; by default uniform. Numbers that are not positive give NaN.

    Raises:
        ValueError: shapes that do not match, counts below 1, more than 24 signs, neither key nor projection and noise.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, lsh_priority, lsh_top_k
        >>> q, k = (jax.random.normal(jax.random.key(i), (1024, 16)) for i in range(2))
        >>> methods = (lsh_priority, lsh_top_k)
        >>> errors = [method(q, k, k, jax.random.key(3), keys_per_query=64) - exact(q, k, k) for method in methods]
        >>> bool(jnp.linalg.norm(errors[0]) < jnp.linalg.norm(errors[1]) / 2)
        True

    Reference:
        :cite:p:`zharkov2026priority`; hashing: :cite:p:`kitaev2020reformer`, section 2. The search in two parts is a
        construction of this library.
    """
    count = min(check_count("keys_per_query", keys_per_query), k.shape[0])
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    check_noise(noise, k.shape[0])
    key_planes, key_noise = (None, None) if key is None else jax.random.split(check_key("lsh_priority", key))
    how: Any = {"num_rounds": num_rounds, "num_hashes": num_hashes, "projection": projection, "kv_mask": kv_mask}
    planes = Planes.of("lsh_priority", key_planes, k, count + 1, **how)
    # Numbers are assigned to real keys in order, so that padding does not change them.
    if noise is None:
        numbers = uniform_numbers(check_key("lsh_priority", key_noise), k.shape[0])
    else:
        numbers = noise if kv_mask is None else RealFirst.of(kv_mask).front(noise)

    def sampled(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        tokens = LiftedKV.of_tokens(k, v, numbers, real_keys(kv_mask, k.shape[0]), count)
        found = _found_in_parts(q, tokens, Buckets.of(k, planes, kv_mask), is_causal, kv_mask)
        return tokens.sampled(q, *found)

    return over_real_tokens(sampled, q, k, v, kv_mask, is_causal=is_causal)


def _found_in_parts(
    q: Array, tokens: LiftedKV, buckets: Buckets, is_causal: bool, kv_mask: Array | None
) -> tuple[Array, Array]:
    """The K + 1 largest lifted logits of each query, among the keys that it looks at, and those keys ``[T, K + 1]``."""
    q, tokens = lax.stop_gradient((q, tokens))
    count, nowhere = tokens.keys_per_query + 1, tokens.k.shape[0]
    num_real = jnp.asarray(nowhere, jnp.int32) if kv_mask is None else count_real(kv_mask)
    lists = _least_numbers(tokens.u, min(LISTED * count, nowhere), in_prefixes=is_causal)
    k, lift = pad_rows(tokens.k, 1), pad_rows(tokens.lift, 1)  # a row for `nowhere`
    per_query = 2 * buckets.order.shape[0] * count + lists.shape[1] + LIST_BLOCK * is_causal
    rows = rows_gathered(q.shape[0], per_query)

    def of_rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        q, place = args
        looked_at = [buckets.met(q, place, count, is_causal)]
        if is_causal:
            block = jnp.minimum(place // LIST_BLOCK, lists.shape[0] - 1)
            near = block[:, None] * LIST_BLOCK + jnp.arange(LIST_BLOCK, dtype=jnp.int32)[None, :]
            looked_at += [lists[block], jnp.where(near <= place[:, None], near, nowhere)]
        else:
            looked_at += [jnp.broadcast_to(lists, (rows, lists.shape[1]))]
        # After sorting, repeated keys are adjacent, and all but the first are hidden. Real keys come first.
        places = jnp.sort(jnp.concatenate(looked_at, axis=1), axis=1)
        again = jnp.pad(places[:, 1:] == places[:, :-1], ((0, 0), (1, 0)))
        hidden = again | (places >= num_real)
        places = jnp.minimum(places, nowhere)
        # The barrier keeps the gather separate: fused into the product, rows would be read once for each use.
        lifted = jnp.einsum("td,tmd->tm", q, lax.optimization_barrier(k[places])) + lift[places]
        lifted, chosen = lax.top_k(jnp.where(hidden, -jnp.inf, lifted), count)
        return lifted, jnp.take_along_axis(places, chosen, axis=1)

    places = jnp.arange(q.shape[0], dtype=jnp.int32)
    return out_of_blocks(lax.map(of_rows, (in_blocks(q, rows), in_blocks(places, rows))), q.shape[0])


def _least_numbers(u: Array, count: int, *, in_prefixes: bool) -> Array:
    """The places of the least numbers ``[1, count]``, or those before each block of keys ``[n, count]``; S for none."""
    nowhere = u.shape[0]
    # 0 is the number of an absent token, also of one that fills the last block.
    u = jnp.where(u == 0, jnp.inf, u)
    if not in_prefixes:
        return lax.top_k(-u, count)[1].astype(jnp.int32)[None, :]

    def step(least: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        both, place = (jnp.concatenate(parts) for parts in zip(least, block, strict=True))
        negative, chosen = lax.top_k(-both, count)
        return (-negative, place[chosen]), least[1]

    filled = jnp.pad(u, (0, -nowhere % LIST_BLOCK), constant_values=jnp.inf)
    blocks = filled.reshape(-1, LIST_BLOCK), jnp.arange(filled.shape[0], dtype=jnp.int32).reshape(-1, LIST_BLOCK)
    none = jnp.full(count, jnp.inf, u.dtype), jnp.full(count, nowhere, jnp.int32)
    return lax.scan(step, along_with(none, u), blocks)[1]
