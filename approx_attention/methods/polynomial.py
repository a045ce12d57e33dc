"""Ordinary attention by the polynomial method: monomials of queries and keys as features."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    FeatureMoments,
    RunningSummary,
    accumulation_dtype,
    attend,
    causal_state,
    check_count,
    check_tokens,
    head_inputs,
    output_or_state,
    running_moments,
)
from approx_attention.tensor import (
    Coefficients,
    IndexSet,
    Kernel,
)


@output_or_state
def polynomial_attention(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: IndexSet | tuple[Any, ...] | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Ordinary attention by the polynomial method: monomials of queries and keys as features.

    .. math:: P(s\, q \cdot k) = \sum_{|\alpha| \le g} w_\alpha\, q^\alpha k^\alpha, \qquad
              \mathrm{out}_t = \frac{\sum_\alpha w_\alpha q_t^\alpha \sum_j k_j^\alpha v_j}
                                    {\sum_\alpha w_\alpha q_t^\alpha \sum_j k_j^\alpha}.

    It is certified where logits are bounded (`approx_attention.bounds.tensor_certificate`); the number of features
    :math:`\binom{D + g}{g}` leaves degrees up to 2 for D = 64 and 4 for D = 16. Taylor polynomials of even degree, the
    default, are positive.

    Shared arguments: see `approx_attention.methods`.

    Args:
        degree: g, 2 by default, or that of ``coefficients`` or ``features``.
        coefficients: as in `tensor_polynomial`.
        bound: as there.
        rms: as there.
        features: an `IndexSet` of monomials in place of all up to a degree, or two maps, as in `tensor_polynomial`.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by moments.

    Raises:
        ValueError: shapes that do not fit, coefficients and a bound that do not go together.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, polynomial_attention
        >>> q, k, v = (0.5 * jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> bool(jnp.allclose(polynomial_attention(q, k, v, degree=4), exact(q, k, v), atol=1e-3))
        True

    Reference:
        :cite:p:`alman2023fast`, theorem 3.8.
    """
    head_dim = q.shape[-1]
    block_size = check_count("block_size", block_size)
    kernel: Any = {"degree": degree, "coefficients": coefficients, "bound": bound, "rms": rms, "features": features}
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    if is_causal:
        running = running_polynomial(head_dim, **kernel)
        state = causal_state(q, k, v, running, block_size=block_size, kv_mask=kv_mask)
    else:
        state = attend(q, summarize_polynomial(k, v, **kernel, kv_mask=kv_mask))
    return state


def summarize_polynomial(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: IndexSet | tuple[Any, ...] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> FeatureMoments:
    """The moments of the monomials of keys, times their weights in the polynomial.

    Shared arguments: see `approx_attention.methods`.

    Args:
        degree: as in `polynomial_attention`, like all that follow.
        coefficients: as there.
        bound: as there.
        rms: as there.
        features: as there.

    Returns:
        A `FeatureMoments`.
    """
    check_tokens(k, v, kv_mask)
    kernel = Kernel.of(k.shape[-1], 1, degree, coefficients, bound, rms, features, accumulation_dtype(k, v))
    moments = FeatureMoments.of_tokens(kernel.key_maps[0], k, v, kv_mask)
    return moments.reweighted(kernel.weights, kernel.query_map)


def running_polynomial(
    head_dim: int,
    key: Array | None = None,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: IndexSet | tuple[Any, ...] | None = None,
) -> RunningSummary:
    """The moments of the monomials of a growing prefix.

    Shared arguments: see `approx_attention.methods`.

    Args:
        degree: as in `polynomial_attention`, like all that follow.
        coefficients: as there.
        bound: as there.
        rms: as there.
        features: as there.
    """
    of_dtype = functools.partial(Kernel.of, head_dim, 1, degree, coefficients, bound, rms, features)
    maps = of_dtype(jnp.float32)
    running = running_moments(maps.key_maps[0])

    def read(state: Any) -> FeatureMoments:
        moments: Any = running.read(state)
        return moments.reweighted(of_dtype(moments.mass.dtype).weights, maps.query_map)

    return running._replace(read=read)
