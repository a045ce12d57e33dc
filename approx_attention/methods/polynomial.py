"""The polynomial method for ordinary attention: monomials of queries and keys as features."""

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
    check_tokens,
    output_or_state,
    running_moments,
    state_by_summary,
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
    r"""Approximate softmax attention by the polynomial method: monomials of queries and keys as features.

    .. math:: P(s\, q \cdot k) = \sum_{|\alpha| \le g} w_\alpha\, q^\alpha k^\alpha, \qquad
              \mathrm{out}_t = \frac{\sum_\alpha w_\alpha q_t^\alpha \sum_j k_j^\alpha v_j}
                                    {\sum_\alpha w_\alpha q_t^\alpha \sum_j k_j^\alpha}.

    The error is certified where logits are bounded (`approx_attention.bounds.tensor_certificate`). The number of
    features :math:`\binom{D + g}{g}` limits the degree to 2 for D = 64 and to 4 for D = 16. Taylor polynomials of even
    degree, the default, are positive. The normaliser of other polynomials may not be, and it is not clamped.

    Shared arguments: see `approx_attention.methods`. The polynomial (``coefficients``, ``bound``, ``rms``) is chosen as
    in `tensor_polynomial`.

    Args:
        degree: g; by default 2, or the degree of ``coefficients`` or ``features``.
        features: an `IndexSet` of monomials instead of all up to a degree, or two maps, as in `tensor_polynomial`.

    Raises:
        ValueError: shapes that do not match, incompatible coefficients and bound.
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
    kernel: Any = {"degree": degree, "coefficients": coefficients, "bound": bound, "rms": rms, "features": features}
    return state_by_summary(
        q,
        k,
        v,
        functools.partial(summarize_polynomial, **kernel),
        functools.partial(running_polynomial, **kernel),
        is_causal=is_causal,
        block_size=block_size,
        kv_mask=kv_mask,
        scale=scale,
    )


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
    """Summarise keys by the moments of their monomials, times their weights in the polynomial.

    Arguments are those of `polynomial_attention`, with keys in scaled space (`approx_attention.methods`).

    Returns:
        `FeatureMoments` with one feature for each monomial.

    Raises:
        ValueError: shapes that do not match, incompatible coefficients and bound.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import attend, summarize_polynomial
        >>> k = jnp.array([[-1.0], [1.0]])
        >>> float(attend(jnp.array([[0.5]]), summarize_polynomial(k, k, degree=6)).out[0, 0])  # tanh(1/2)
        0.462

    Reference:
        :cite:p:`alman2023fast`, theorem 3.8.
    """
    check_tokens(k, v, kv_mask)
    # Ordinary attention is tensor attention with one set of keys (order 2).
    kernel = Kernel.of(k.shape[-1], 1, degree, coefficients, bound, rms, features, accumulation_dtype(k, v))
    # The weights multiply the moments, not the keys' monomials: R products instead of S R.
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

    Arguments are those of `polynomial_attention`, for keys in scaled space (`approx_attention.methods`), and
    ``head_dim``, the number D of channels.

    Returns:
        The `RunningSummary`, for a `Decoder`.

    Raises:
        ValueError: incompatible coefficients and bound.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import attend
        >>> from approx_attention.methods import running_polynomial
        >>> running = running_polynomial(1, degree=6)
        >>> k, prefix = jnp.array([[-1.0], [1.0]]), running.init(1, jnp.float32)
        >>> prefix = running.append(prefix, jnp.int32(0), k, k, jnp.ones(2, bool))
        >>> float(attend(jnp.array([[0.5]]), running.read(prefix)).out[0, 0])  # tanh(1/2)
        0.462

    Reference:
        :cite:p:`alman2023fast`, theorem 3.8; running sums are this library's.
    """
    of_dtype = functools.partial(Kernel.of, head_dim, 1, degree, coefficients, bound, rms, features)
    # The maps are the same in every dtype. The weights are applied when the moments are read, in the dtype of the
    # moments: growing moments stay plain sums over keys.
    maps = of_dtype(jnp.float32)
    running = running_moments(maps.key_maps[0])

    def read(state: Any) -> FeatureMoments:
        moments: Any = running.read(state)
        return moments.reweighted(of_dtype(moments.mass.dtype).weights, maps.query_map)

    return running._replace(read=read)
