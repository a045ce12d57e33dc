"""The two forms of a method with a summary: over all keys at once, and causal."""

from collections.abc import Callable
from typing import Any

from jax import Array

from approx_attention.core.causal import RunningSummary, causal_state
from approx_attention.core.checks import check_count, check_flag, checked_inputs, head_inputs, logit_scale
from approx_attention.core.quantized import Summary
from approx_attention.core.reading import attend
from approx_attention.kernels import AttentionState


def state_by_summary(
    q: Array,
    k: Array,
    v: Array,
    summarize: Callable[..., Summary],
    running: Callable[[int], RunningSummary],
    *,
    is_causal: bool,
    block_size: int,
    kv_mask: Array | None,
    scale: float | Array | None,
) -> AttentionState:
    """Compute attention of one head through a summary of its keys, causal or not.

    Args:
        q: unscaled queries ``[T, D]``.
        k: unscaled keys ``[S, D]``.
        v: values ``[S, Dv]``.
        summarize: ``(k, v, kv_mask=...) -> summary`` of all keys, in scaled space.
        running: ``head_dim -> RunningSummary`` of a growing prefix of keys with ``head_dim`` channels.
        is_causal: use the running summary, with exact attention nearby (`causal_state`).
        block_size: tokens per block of the causal form.
        kv_mask: true where a key is real, ``[S]``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.

    Returns:
        The `AttentionState` of the queries.

    Raises:
        ValueError: shapes that do not match, a block size below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from approx_attention import exact
        >>> from approx_attention.core import state_by_summary
        >>> from approx_attention.methods import running_exact, summarize_exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (8, 4)) for i in range(3))
        >>> running = functools.partial(running_exact, max_length=8)
        >>> options = {"is_causal": True, "block_size": 2, "kv_mask": None, "scale": None}
        >>> state = state_by_summary(q, k, v, summarize_exact, running, **options)
        >>> bool(jnp.allclose(state.out, exact(q, k, v, is_causal=True), atol=1e-5))
        True
    """
    block_size = check_count("block_size", block_size)
    # Each form is built only if it is used, because a random method samples its projection when it is built.
    if check_flag("is_causal", is_causal):
        q, k, v = checked_inputs(q, k, v, kv_mask=kv_mask, is_causal=is_causal)
        options: Any = {"block_size": block_size, "kv_mask": kv_mask, "scale": logit_scale(scale, q.shape[-1])}
        return causal_state(q, k, v, running(q.shape[-1]), **options)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    return attend(q, summarize(k, v, kv_mask=kv_mask))
