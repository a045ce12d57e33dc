"""What theory promises: closed forms for the error of estimates, with their assumptions."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention.checks import accumulation_dtype, check_choice, check_count, check_key_value_fit, fold_scale
from approx_attention.features import squared_norm


def favor_mse(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    num_features: int,
    *,
    features: Literal["positive", "hyperbolic", "trigonometric"] = "positive",
    scale: float | Array | None = None,
) -> Float[Array, "T S"]:
    r"""Mean squared error of random-feature estimates of :math:`e^{q \cdot k}`, relative to its square.

    For R features of independent directions, with q and k scaled by :math:`\sqrt s` and :math:`z = \|q + k\|^2`,

    .. math:: \text{positive: } \frac{e^z - 1}{R}, \qquad
              \text{hyperbolic: } \frac{(e^z - 1)(1 - e^{-z})}{R}, \qquad
              \text{trigonometric: } \frac{e^z (1 - e^{-\|q - k\|^2})^2}{R\, e^{4 q \cdot k}}.

    The hyperbolic and trigonometric ones use R/2 directions. Orthogonal directions do better, by an amount that this
    bound does not claim. It speaks of the entries, whose estimates are unbiased; their ratio, the answer, is not. Above
    1 an entry's estimate is worth nothing.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        num_features: the number R of features.
        features: their kind.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.

    Returns:
        The relative mean squared errors ``[T, S]``; infinite where they exceed the largest number.

    Raises:
        ValueError: shapes that do not fit, no features, unknown kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> float(bounds.favor_mse(jnp.zeros((1, 4)), jnp.zeros((1, 4)), 64)[0, 0])
        0.0

    Reference:
        Choromanski et al. (2021), "Rethinking attention with Performers", lemma 2 and theorem 1.
    """
    check_count("num_features", num_features)
    check_choice("features", features, ("positive", "hyperbolic", "trigonometric"))
    check_key_value_fit(q, k, k)
    dtype = accumulation_dtype(q, k)
    q, k = fold_scale(q.astype(dtype), k.astype(dtype), scale)
    logits, norms = q @ k.T, squared_norm(q) + squared_norm(k).T
    together, apart = (jnp.maximum(norms + sign * 2 * logits, 0) for sign in (1, -1))
    if features == "trigonometric":
        return jnp.exp(together - 4 * logits) * jnp.expm1(-apart) ** 2 / num_features
    positive = jnp.expm1(together) / num_features
    return positive if features == "positive" else positive * -jnp.expm1(-together)
