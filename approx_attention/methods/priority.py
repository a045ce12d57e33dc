"""Priority attention: a few keys for each query, chosen at random so that sums over them are unbiased."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    check_count,
    check_key,
    check_noise,
    head_inputs,
    output_or_state,
    ranks,
)
from approx_attention.methods.top_k import is_found, largest_logits
from approx_attention.sparse import gathered_state


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
    queries :math:`(s\, q_t, 1)`, since one u per key serves all queries.

    Numerator and normaliser are unbiased; their ratio is not. For any queries, keys and number of keys, the root mean
    square of the error of the normaliser is at most :math:`1/\sqrt{K - 1}` of it, and that of the numerator the same
    share of the normaliser times the largest norm of a value. `top_k` has no such bound: what it leaves out grows with
    the number of keys. Errors of different queries are not independent, as they share u.

    Gradients are those of the logits and values of the chosen keys. The choice and the factor
    :math:`\max(1, e^{\tau_t - s\, q_t \cdot k_j})` have none, and so the gradients of numerator and normaliser are
    unbiased too.

    Shared arguments: see `approx_attention.methods`.

    Args:
        keys_per_query: the number K of keys per query; with K >= S the output is exact.
        noise: the numbers u in (0, 1], ``[S]``; by default uniform. Numbers that are not positive give NaN.

    Raises:
        ValueError: shapes that do not fit, a count below 1, neither key nor noise.
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
    count = min(check_count("keys_per_query", keys_per_query), k.shape[0])
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    check_noise(noise, k.shape[0])
    if noise is None:
        noise = _uniform(check_key("priority", key), k.shape[0])
        # Noise by rank among the real keys: padding changes no choice.
        noise = noise if kv_mask is None else noise[ranks(kv_mask, k.shape[0])]
    lift = -jnp.log(lax.stop_gradient(noise).astype(q.dtype))
    lifted, places = largest_logits(q, k, count + 1, key_bias=lift, is_causal=is_causal, kv_mask=kv_mask)
    # Without a (K + 1)-th key it is -inf, and every weight the key's own.
    threshold, lifted, places = lifted[:, -1:], lifted[:, :-1], places[:, :-1]
    seen = is_found(lifted)
    # The factor of a weight, not the maximum of both: a constant factor leaves its gradient unbiased. It is at most
    # 1/u, as all that are chosen pass the threshold.
    log_factor = jnp.where(seen, jnp.maximum(threshold - lifted + lift[places], 0), 0)
    return gathered_state(q, k, v, places, seen, log_factor)


def _uniform(key: Array, num_keys: int) -> Array:
    """Uniform numbers in (0, 1]: `jax.random.uniform` has steps of 2^-23 and gives 0, which has no logarithm."""
    return (jax.random.bits(key, (num_keys,), jnp.uint32).astype(jnp.float32) + 0.5) * 2.0**-32
