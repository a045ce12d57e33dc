"""Token budgets: from bytes, over layers, and over heads."""

import bisect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Float

from approx_attention.core import (
    QUANTIZED_GROUP,
    check_bits,
    check_count,
    check_floating,
    check_number,
    floating_dtype,
    quantized_bytes,
)


def token_budget(
    num_bytes: int, head_dim: int, value_dim: int, *, dtype: Any = jnp.float32, bits: int | None = None
) -> int:
    """Compute the number of weighted tokens of one head that fit into a number of bytes.

    Args:
        num_bytes: the budget in bytes.
        head_dim: channels D of keys.
        value_dim: channels Dv of values.
        dtype: dtype of keys, values and masses.
        bits: 8 or 4 for quantised tokens (`quantize`), whose steps, masses and centres are in ``dtype``.

    Returns:
        The number of tokens. A token has D + Dv numbers and a mass; a quantised one also has two steps, and a share of
        the centre of its group.

    Raises:
        ValueError: a budget below one token, counts below 1, other bits.
        TypeError: counts that are not integers, a dtype that is not floating point.

    Example:
        >>> from approx_attention.decoding import token_budget
        >>> token_budget(2**20, 64, 64)  # 129 numbers of 4 bytes each
        2032
        >>> token_budget(2**20, 64, 64, bits=4)
        13081
    """
    head_dim = check_count("head_dim", head_dim)
    value_dim = check_count("value_dim", value_dim)
    num_bytes = check_count("num_bytes", num_bytes, most=None)
    dtype = floating_dtype("dtype", dtype)

    def size(num_tokens: int) -> int:
        if bits is None:
            return num_tokens * (head_dim + value_dim + 1) * dtype.itemsize
        return quantized_bytes(num_tokens, head_dim, value_dim, bits=check_bits("bits", bits), dtype=dtype)

    if num_bytes < size(1):
        raise ValueError(f"a weighted token takes {size(1)} bytes, more than the budget of {num_bytes}")
    # All whole groups have the same size; within a group bytes grow with the number of tokens.
    whole = QUANTIZED_GROUP * (num_bytes // size(QUANTIZED_GROUP))
    return whole + bisect.bisect_right(range(whole + 1, whole + QUANTIZED_GROUP + 1), num_bytes, key=size)


def pyramid_budgets(num_layers: int, budget: int, *, steepness: float = 20.0, least: int = 40) -> list[int]:
    r"""Compute budgets that fall linearly from the first layer to the last, with mean ``budget``.

    .. math:: b_l = b_0 + (b_{L-1} - b_0) \frac{l}{L - 1}, \qquad b_{L-1} = b / \beta, \quad b_0 = 2 b - b_{L-1}

    Args:
        num_layers: the number L of layers.
        budget: mean tokens per layer.
        steepness: :math:`\beta`, the ratio of the mean budget to that of the last layer.
        least: lower limit for every layer, unless the mean is smaller; the default covers the 4 sinks and 32
            recent tokens of `compress_tokens`.

    Returns:
        One budget per layer, in tokens; their sum is ``num_layers * budget`` up to rounding.

    Raises:
        ValueError: counts or a steepness below 1, a least budget below 0.

    Example:
        >>> from approx_attention.decoding import pyramid_budgets
        >>> pyramid_budgets(5, 100)
        [160, 130, 100, 70, 40]

    Reference:
        :cite:p:`cai2024pyramidkv`.
    """
    least = check_count("least", least, least=0)
    num_layers = check_count("num_layers", num_layers)
    budget = check_count("budget", budget)
    check_number("steepness", steepness)
    if not 1 <= steepness < math.inf:
        raise ValueError(f"steepness must be at least 1 and finite, got {steepness}")
    last = min(budget, max(least, round(budget / steepness)))
    first = 2 * budget - last
    if num_layers == 1:
        return [budget]
    return [round(first + (last - first) * layer / (num_layers - 1)) for layer in range(num_layers)]


def shared_sizes(scores: Float[Array, "H S"], budget: int, *, least: int = 0, most: int | None = None) -> Array:
    """Share a budget between heads: the heads together keep the ``H * budget`` keys with the largest scores.

    Args:
        scores: scores of the keys of every head ``[H, S]``, comparable between heads, such as shares of attention. NaN
            in traced scores ranks last.
        budget: mean tokens per head.
        least: lower limit for every head, for example ``sinks + recent + 1`` of `compress_tokens`.
        most: upper limit for every head; by default twice the mean, and at most S.

    Returns:
        The number of keys of each head ``[H]``, int32; their sum is at most ``H * budget``.

    Raises:
        ValueError: a budget that is not between ``least`` and ``most``, scores that are not ``[H, S]`` or NaN.
        TypeError: scores that are not floating point.

    Example:
        >>> import functools, jax
        >>> from approx_attention import WeightedKV, compress_tokens, fold_scale
        >>> from approx_attention.decoding import attention_received, shared_sizes
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, 8)) for i in range(3))
        >>> scaled_q, scaled_k = fold_scale(q[:, -32:], k)
        >>> score = jax.vmap(lambda k, v, q: attention_received(WeightedKV.of_tokens(k, v), q))
        >>> sizes = shared_sizes(score(scaled_k, v, scaled_q), 64, least=37)
        >>> compress = functools.partial(compress_tokens, budget=128, policy="h2o")
        >>> small = jax.vmap(lambda k, v, q, size: compress(k, v, queries=q, size=size))(k, v, q, sizes)
        >>> bool(((small.mass > 0).sum(1) == sizes).all())
        True

    Reference:
        :cite:p:`feng2024adakv`.
    """
    check_floating("scores", scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be [H, S] with at least one head and one key, got shape {scores.shape}")
    if not isinstance(scores, Tracer) and np.isnan(np.asarray(scores)).any():
        raise ValueError(f"scores must be numbers, got {np.isnan(np.asarray(scores)).sum()} NaN")
    # Traced scores cannot be checked; `top_k` would rank NaN above every number.
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    num_heads, num_keys = scores.shape
    budget = check_count("budget", budget)
    least = check_count("least", least, least=0)
    most = 2 * budget if most is None else check_count("most", most)
    if not least <= budget <= most:
        raise ValueError(f"budget must be from least = {least} to most = {most} tokens per head, got {budget}")
    least, budget, most = (min(count, num_keys) for count in (least, budget, most))
    total = num_heads * (budget - least)
    # The best ``least`` keys of every head are fixed; ranks least..most of all heads compete for the rest.
    best = lax.top_k(scores, most)[0][:, least:]
    chosen = lax.top_k(best.reshape(-1), total)[1]
    return least + jax.ops.segment_sum(jnp.ones_like(chosen), chosen // max(1, most - least), num_heads)
