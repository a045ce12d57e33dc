"""Sines and cosines of the same angles; on a CPU by polynomials, because XLA calls the C library for each number."""

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention.kernels import by_platform

# pi / 2 in parts whose multiples up to thousands are exact in float32.
_QUARTER = 1.5703125, 4.837512969970703125e-4, 7.549789948768648e-8
# Coefficients of the Cephes library for float32 and angles in [-pi / 4, pi / 4]: sin r = r + r^3 p(r^2) and
# cos r = 1 - r^2 / 2 + r^4 p(r^2).
_SINE = -1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4
_COSINE = 4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5


@jax.custom_jvp
def sine_and_cosine(angle: Array) -> tuple[Array, Array]:
    """Sines and cosines ``[...]``, accurate to about 1e-7 in float32, for large angles to the rounding of the angle."""
    if angle.dtype != jnp.float32:
        return jnp.sin(angle), jnp.cos(angle)
    return by_platform(angle, cpu=_polynomials, default=lambda x: (jnp.sin(x), jnp.cos(x)))


@sine_and_cosine.defjvp
def _derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    sine, cosine = sine_and_cosine(*primals)
    (tangent,) = tangents
    return (sine, cosine), (cosine * tangent, -sine * tangent)


def _polynomials(angle: Array) -> tuple[Array, Array]:
    quarters = jnp.round(angle * (2 / jnp.pi))
    for part in _QUARTER:
        angle = angle - quarters * part
    # Beyond 1e7 the rounding of the angle itself is about a turn, and the remainder may be any number.
    angle = jnp.clip(angle, -2, 2)
    square = angle * angle
    sine = angle + angle * square * _polynomial(_SINE, square)
    cosine = 1 - square / 2 + square * square * _polynomial(_COSINE, square)
    # Every quarter turn exchanges sine and cosine, and every second one changes a sign.
    turn = quarters - 4 * jnp.floor(quarters / 4)
    is_odd = (turn == 1) | (turn == 3)
    sine, cosine = jnp.where(is_odd, cosine, sine), jnp.where(is_odd, sine, cosine)
    sine, cosine = jnp.clip(sine, -1, 1), jnp.clip(cosine, -1, 1)
    return jnp.where(turn >= 2, -sine, sine), jnp.where((turn == 1) | (turn == 2), -cosine, cosine)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total
