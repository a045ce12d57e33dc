"""Errors of outputs relative to exact outputs."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention.core import accumulation_dtype


class OutputError(NamedTuple):
    """Errors of outputs relative to exact outputs.

    Attributes:
        relative: Frobenius norm of the difference over that of the exact outputs.
        worst_row: the largest norm of a row of the difference, over the root mean square norm of the exact rows.
    """

    relative: Array
    worst_row: Array


def output_error(out: Float[Array, "*rows Dv"], exact_out: Float[Array, "*rows Dv"]) -> OutputError:
    r"""Compute the errors of outputs relative to exact outputs.

    .. math:: \mathrm{relative} = \frac{\|O - \hat O\|_F}{\|O\|_F}, \qquad
              \mathrm{worst\_row} = \max_t \frac{\|O_t - \hat O_t\|_2}{\sqrt{\mathrm{mean}_t \|O_t\|_2^2}}

    Args:
        out: outputs ``[..., Dv]``; all leading axes are rows.
        exact_out: exact outputs of the same shape.

    Returns:
        The `OutputError`; ``nan`` if the exact outputs are all zero.

    Raises:
        ValueError: different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import output_error
        >>> error = output_error(jnp.array([[1.0], [1.0]]), jnp.array([[1.0], [0.0]]))
        >>> float(error.relative), round(float(error.worst_row), 4)
        (1.0, 1.4142)
    """
    if out.shape != exact_out.shape:
        raise ValueError(f"outputs to compare must have one shape, got {out.shape} and {exact_out.shape}")
    dtype = accumulation_dtype(out, exact_out)
    exact_rows = exact_out.astype(dtype)
    difference = jnp.sum((out.astype(dtype) - exact_rows) ** 2, axis=-1)
    exact_norm = jnp.sum(exact_rows**2, axis=-1)
    relative = jnp.sqrt(jnp.sum(difference) / jnp.sum(exact_norm))
    return OutputError(relative, jnp.sqrt(jnp.max(difference) / jnp.mean(exact_norm)))


def skill(
    out: Float[Array, "*rows Dv"], exact_out: Float[Array, "*rows Dv"], trivial: Float[Array, "*rows Dv"]
) -> Array:
    r"""Compute the error of outputs relative to that of a trivial output, such as the mean of the values.

    .. math:: \|\hat O - O\|_F \,/\, \|O - \bar O\|_F

    If attention is nearly uniform every method has a small relative error, but the trivial output has skill 1.

    Args:
        out: outputs ``[..., Dv]``.
        exact_out: exact outputs of the same shape.
        trivial: the output to beat, which broadcasts to that shape: the mean of the values, or for tensor attention the
            product of the means.

    Returns:
        One number, 0 for exact outputs; ``nan`` or infinite if the trivial output is exact.

    Raises:
        ValueError: outputs have different shapes, or the trivial output does not broadcast to theirs.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import skill
        >>> float(skill(jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [3.0]]), jnp.array([[2.0]])).round(3))
        0.707
    """
    if out.shape != exact_out.shape:
        raise ValueError(f"outputs to compare must have one shape, got {out.shape} and {exact_out.shape}")
    dtype = accumulation_dtype(out, exact_out, trivial)
    out, exact_out, trivial = (x.astype(dtype) for x in (out, exact_out, jnp.broadcast_to(trivial, out.shape)))
    return jnp.linalg.norm(out - exact_out) / jnp.linalg.norm(exact_out - trivial)
