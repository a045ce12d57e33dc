"""Exact attention of one head, full or causal, in memory linear in the sequence."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention import kernels
from approx_attention.core.checks import real_keys
from approx_attention.kernels import AttentionState, Implementation, accumulation_dtype, mask_bias


def streamed_state(
    q: Array,
    k: Array,
    v: Array,
    kv_mask: Array | None = None,
    *,
    scale: float | Array = 1.0,
    is_causal: bool = False,
    logits_soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> AttentionState:
    r"""Softmax attention :math:`\mathrm{softmax}(s\, q k^T)\, v` by tiles; if causal, of query t over keys j <= t.

    Args:
        q: queries ``[T, D]``, of any floating dtype.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        kv_mask: true where a key is real, ``[S]``.
        scale: a positive factor of the logits.
        is_causal: query t sees keys j <= t; T and S may differ.
        logits_soft_cap: cap of the logits as in `kernels.state`.
        implementation: as in `kernels.state`.
    """
    options: Any = {"scale": scale, "logits_soft_cap": logits_soft_cap, "implementation": implementation}
    num_queries, num_keys = q.shape[0], k.shape[0]
    if is_causal and num_queries > num_keys:
        # The last queries see all keys.
        parts = (
            streamed_state(q[:num_keys], k, v, kv_mask, is_causal=True, **options),
            streamed_state(q[num_keys:], k, v, kv_mask, **options),
        )
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    if is_causal and num_queries < num_keys:
        k, v = k[:num_queries], v[:num_queries]
        kv_mask = None if kv_mask is None else kv_mask[:num_queries]
    bias = None if kv_mask is None else mask_bias(real_keys(kv_mask, k.shape[0]), accumulation_dtype(q, k, v))
    return kernels.state(q, k, v, bias, right=0 if is_causal else None, **options)
