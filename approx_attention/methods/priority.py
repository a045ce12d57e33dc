"""Priority attention: a few keys for each query, chosen at random so that sums over them are unbiased."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    RealFirst,
    RunningSummary,
    check_count,
    check_counts,
    check_key,
    check_noise,
    output_or_state,
    ranks,
    real_keys,
    state_by_summary,
    token_sums_inputs,
)
from approx_attention.sparse import NO_NUMBER, LiftedKV, first_lifted, uniform_numbers


@output_or_state
def priority(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    keys_per_query: int = 64,
    noise: Float[Array, " S"] | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Softmax attention from K keys of a priority sample, with an error that does not grow with the number of keys.

    .. math:: \mathrm{out}_t = \sum_{j \in S_t} \hat w_{tj}\, v_j \Big/ \sum_{j \in S_t} \hat w_{tj}, \qquad
              \hat w_{tj} = \max(e^{s\, q_t \cdot k_j}, e^{\tau_t}), \qquad
              S_t = \operatorname{arg\,top}_K\; s\, q_t \cdot k_j - \log u_j,

    where :math:`u_j` is uniform in (0, 1) and :math:`\tau_t` is the (K + 1)-th largest perturbed logit. A query that
    sees at most K keys has exact attention. The keys are found exactly, block by block, as by `top_k`: memory is
    linear, time is not. An index of dot products can find them too, over the lifted keys :math:`(k_j, -\log u_j)` and
    queries :math:`(s\, q_t, 1)`, since one u per key serves all queries. Causally the sample is of the keys before the
    two blocks that a query sees exactly; in decoding each key keeps its u in the cache.

    Numerator and normaliser are unbiased; their ratio is not. For any queries, keys and number of keys, the root mean
    square of the error of the normaliser is at most :math:`1/\sqrt{K - 1}` of it, and that of the numerator the same
    share of the normaliser times the largest norm of a value. `top_k` has no such bound: what it leaves out grows with
    the number of keys. Errors of different queries are not independent, as they share u. With fresh numbers for each
    query they are: map over queries and keys, ``jax.vmap(lambda q, key: priority(q[None], k, v, key)[0])(q, keys)``.

    Gradients are those of the logits and values of the chosen keys. The choice and the factor
    :math:`\max(1, e^{\tau_t - s\, q_t \cdot k_j})` have none, and so the gradients of numerator and normaliser are
    unbiased too.

    Shared arguments: see `approx_attention.methods`.

    Args:
        keys_per_query: the number K of keys per query; with K >= S the output is exact.
        noise: the numbers u in (0, 1], ``[S]``; by default uniform. Numbers that are not positive give NaN.

    Raises:
        ValueError: shapes that do not match, a count below 1, neither key nor noise.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, priority, top_k
        >>> q, k = (jax.random.normal(jax.random.key(i), (1024, 16)) for i in range(2))
        >>> out, best = priority(q, k, k, jax.random.key(3)), top_k(q, k, k, keys_per_query=64)
        >>> truth = exact(q, k, k)
        >>> bool(jnp.linalg.norm(out - truth) < jnp.linalg.norm(best - truth) / 2)
        True

    Reference:
        :cite:p:`zharkov2026priority`; unbiased sums: :cite:p:`duffield2007priority`; their variance:
        :cite:p:`szegedy2006priority`.
    """

    def running(head_dim: int) -> RunningSummary:
        check_noise(noise, k.shape[0])
        # The causal form moves real keys to the front, and their random numbers must move with them.
        moved = noise if noise is None or kv_mask is None else RealFirst.of(kv_mask).front(noise)
        return running_priority(head_dim, key, keys_per_query=keys_per_query, noise=moved, max_length=q.shape[0])

    return state_by_summary(
        q,
        k,
        v,
        functools.partial(summarize_priority, key=key, keys_per_query=keys_per_query, noise=noise),
        running,
        is_causal=is_causal,
        block_size=block_size,
        kv_mask=kv_mask,
        scale=scale,
    )


def summarize_priority(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    keys_per_query: int = 64,
    noise: Float[Array, " S"] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> LiftedKV:
    """Keep every token with its number u: a summary of the same size, of which a query reads K tokens.

    Arguments are those of `priority`, with keys in scaled space (`approx_attention.methods`).

    Returns:
        A `LiftedKV` of S tokens.

    Raises:
        ValueError: shapes that do not match, a count below 1, neither key nor noise.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import attend, summarize_priority
        >>> k = jnp.array([[0.0], [1.0], [2.0]])
        >>> summary = summarize_priority(k, k, noise=jnp.array([1.0, 0.5, 0.1]), keys_per_query=1)
        >>> float(attend(jnp.ones((1, 1)), summary).out[0, 0])  # the largest k - log u
        2.0

    Reference:
        :cite:p:`zharkov2026priority`.
    """
    keys_per_query = check_count("keys_per_query", keys_per_query)
    k, v = token_sums_inputs(k, v, kv_mask)
    check_noise(noise, k.shape[0])
    if noise is None:
        noise = uniform_numbers(check_key("priority", key), k.shape[0])
        # Noise by rank among the real keys: padding changes no choice.
        noise = noise if kv_mask is None else noise[ranks(kv_mask, k.shape[0])]
    return LiftedKV.of_tokens(k, v, noise, real_keys(kv_mask, k.shape[0]), keys_per_query)


def running_priority(
    head_dim: int,
    key: Array | None = None,
    *,
    keys_per_query: int = 64,
    noise: Float[Array, " S"] | None = None,
    max_length: int,
) -> RunningSummary:
    """Keep every token of a prefix of at most ``max_length`` tokens, each with its number u.

    Arguments are those of `priority`, for keys in scaled space (`approx_attention.methods`), ``head_dim``, the number
    D of channels, and ``max_length``. A longer prefix, and with ``noise [S]`` one longer than S, cannot raise an error
    inside a compiled program; its outputs turn to NaN.

    Returns:
        The `RunningSummary`, for a `Decoder`; it takes ``max_length`` tokens of memory.

    Raises:
        ValueError: counts below 1; for the first block, neither key nor noise.
        TypeError: noise that is not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import attend
        >>> from approx_attention.methods import running_priority
        >>> noise = jnp.array([1.0, 0.5, 0.1, 1.0])
        >>> running = running_priority(1, keys_per_query=1, noise=noise, max_length=4)
        >>> k, prefix = jnp.arange(4.0)[:, None], running.init(1, jnp.float32)
        >>> prefix = running.append(prefix, jnp.int32(0), k, k, jnp.ones(4, bool))
        >>> float(attend(jnp.ones((1, 1)), running.read(prefix)).out[0, 0])  # the largest k - log u
        2.0

    Reference:
        :cite:p:`zharkov2026priority`.
    """
    head_dim, max_length = check_counts(head_dim=head_dim, max_length=max_length)
    keys_per_query = check_count("keys_per_query", keys_per_query)
    check_noise(noise)

    def numbers(start: Array, count: int) -> Array:
        """u of a block of tokens from ``start`` on."""
        if noise is None:
            return uniform_numbers(jax.random.fold_in(check_key("priority", key), start), count)
        place = start + jnp.arange(count, dtype=jnp.int32)
        return jnp.where(place < noise.shape[0], noise[jnp.minimum(place, noise.shape[0] - 1)], NO_NUMBER)

    def of_block(start: Array, k: Array, v: Array, kv_mask: Array) -> LiftedKV:
        return LiftedKV.of_tokens(k, v, numbers(start, k.shape[0]), kv_mask, keys_per_query)

    def init(value_dim: int, dtype: Any) -> LiftedKV:
        k, v = (jnp.zeros((max_length, channels), dtype) for channels in (head_dim, value_dim))
        return LiftedKV(k, v, jnp.zeros(max_length, dtype), keys_per_query)

    def append(tokens: LiftedKV, start: Array, k: Array, v: Array, kv_mask: Array) -> LiftedKV:
        if k.shape[0] > max_length:  # more than the room for all blocks
            return dataclasses.replace(tokens, u=jnp.where(jnp.any(kv_mask), NO_NUMBER, tokens.u))
        block = of_block(start, k, v, kv_mask)
        # `dynamic_update_slice` would move a block past the end back over earlier tokens: its NaN shows that.
        block = dataclasses.replace(block, u=jnp.where(kv_mask & (start + k.shape[0] > max_length), NO_NUMBER, block.u))
        return jax.tree.map(lambda room, x: lax.dynamic_update_slice_in_dim(room, x, start, 0), tokens, block)

    def of_sequence(k: Array, v: Array, kv_mask: Array) -> Callable[[Array], LiftedKV] | None:
        if kv_mask.size > max_length:
            return None
        starts = jnp.arange(kv_mask.shape[0], dtype=jnp.int32) * kv_mask.shape[1]
        return jax.tree_util.Partial(first_lifted, jax.vmap(of_block)(starts, k, v, kv_mask))

    return RunningSummary(init, append, read=lambda tokens: tokens, of_sequence=of_sequence)
