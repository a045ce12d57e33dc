"""Top-k attention: every query over the keys of its largest logits."""

from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    check_count,
    checked_soft_cap,
    head_inputs,
    output_or_state,
)
from approx_attention.sparse import gathered_state, is_found, largest_logits


@output_or_state
def top_k(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    keys_per_query: int = 32,
    is_causal: bool = False,
    logits_soft_cap: float | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Softmax attention of every query over the K keys with the largest logits.

    .. math:: \mathrm{out}_t
              = \sum_{j \in S_t} e^{s\, q_t \cdot k_j}\, v_j \Big/ \sum_{j \in S_t} e^{s\, q_t \cdot k_j},
              \qquad S_t = \operatorname{arg\,top}_K\; q_t \cdot k_j

    The keys are found exactly, block by block, with the best so far. Memory is linear; time is not, since every logit
    is computed. This saves the memory of the weights and the products with the values, and shows the best that a search
    for the largest logits can reach. The total variation to softmax is the weight left out. The choice of keys has no
    gradient; of equal logits the first keys are chosen.

    Shared arguments: see `approx_attention.methods`.

    Args:
        keys_per_query: the number K of keys; with K >= S the output is exact.

    Raises:
        ValueError: shapes that do not match, a count below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import top_k
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> best = jnp.argmax(q @ k.T, axis=1)
        >>> bool(jnp.allclose(top_k(q, k, v, keys_per_query=1), v[best], atol=1e-6))
        True

    Reference:
        :cite:p:`gupta2021topk`, section 3.
    """
    count = min(check_count("keys_per_query", keys_per_query), k.shape[0])
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    logits, places = largest_logits(q, k, count, is_causal=is_causal, kv_mask=kv_mask)
    # The logits are computed again, from the gathered keys alone: the search has no gradient.
    return gathered_state(q, k, v, places, is_found(logits), logits_soft_cap=checked_soft_cap(logits_soft_cap))
