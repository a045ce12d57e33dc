"""Masses of kept tokens that fit all tokens best, without known queries."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array, lax

from approx_attention import kernels
from approx_attention.core import WeightedKV, in_float32, nonnegative_least_squares, squared_norm
from approx_attention.coresets.clustering import LARGEST_EXPONENT
from approx_attention.coresets.guard import best_of
from approx_attention.coresets.halving import kernel_points, value_unit
from approx_attention.coresets.sampling import rescaled

if TYPE_CHECKING:
    from approx_attention.coresets.algorithms import Algorithm


@dataclasses.dataclass(frozen=True)
class FittedMasses:
    r"""Choose tokens by an algorithm, and fit non-negative masses to all tokens.

    In the kernel of halving, :math:`\kappa((k, v), (k', v')) = e^{s\, k \cdot k'} (v \cdot v' + c)`, the masses solve

    .. math:: \min_{\beta \ge 0}\ \Big\| \sum_c \beta_c\, \kappa(c, \cdot) - \sum_j m_j\, \kappa(j, \cdot) \Big\|,

    and one factor, which does not change outputs, then restores the total mass. Regression shrinks masses, by 20 % at
    radius 2 and by half at radius 4, so without this factor a coreset merged with exact keys would have too little
    weight. Keys and values are unchanged. If the masses of the algorithm have smaller errors on probe queries
    (`best_of`), they are kept too. Masses have no gradient.

    Attributes:
        algorithm: chooses the tokens, and the masses for the comparison; Nystrom weights are not supported.
    """

    algorithm: "Algorithm"

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        return with_fitted_masses(tokens, self.algorithm(tokens, size, ratio, key), ratio, key)


def with_fitted_masses(tokens: WeightedKV, held: WeightedKV, ratio: Array, key: Array) -> WeightedKV:
    """The kept tokens with masses fitted to all tokens, or with their given masses if these are better on probes.

    Args:
        tokens: S tokens with centred keys.
        held: M kept tokens, with keys centred like those of ``tokens``.
        ratio: the radius of the queries over that of the keys.
        key: typed PRNG key of the probes.

    Returns:
        The kept tokens; fitted masses have the total of all tokens.

    Raises:
        ValueError: kept tokens with signed masses.
    """
    if held.value_range is not None:
        raise ValueError("masses can be fitted to kept or merged tokens only, not to tokens with signed masses")
    mass = fitted_masses(tokens, held, ratio / 2)
    fitted = rescaled(WeightedKV(held.k, held.values * mass[:, None], mass), tokens)
    return best_of([held, fitted], tokens, ratio, key)


@in_float32()  # a kernel matrix of similar keys is nearly singular
def fitted_masses(tokens: WeightedKV, held: WeightedKV, exponent: Array) -> Array:
    r"""Fit non-negative masses of the kept tokens.

    The right-hand side :math:`\sum_j m_j\, \kappa(c, j)` is softmax attention of the kept tokens over all tokens.

    Args:
        tokens: S tokens with centred keys.
        held: M kept tokens, with keys centred like those of ``tokens``.
        exponent: the exponent s of the kernel :math:`\kappa`, as in `FittedMasses`.

    Returns:
        The masses ``[M]``; 0 for absent tokens.
    """
    unit = value_unit(tokens)
    x, values, present = kernel_points(held, exponent, unit)[:3]
    present = present > 0
    norm = jnp.sqrt(squared_norm(values))
    direction, half = values / norm, squared_norm(x)[:, 0] / 2
    all_of = kernel_points(tokens, exponent, unit)
    state = kernels.state(x, all_of.x, all_of.values, lax.stop_gradient(tokens.log_mass))
    # In units of the kernel's diagonal, sqrt(kappa(c, c)) = e^{half} norm, and the largest sum 1: no number overflows.
    log_size = jnp.where(present, state.lse - half, -jnp.inf)
    shift = jnp.max(log_size)
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    target = jnp.exp(log_size - shift) * jnp.sum(direction * state.out, axis=1)
    both = present[:, None] & present[None, :]
    logits = x @ x.T - half[:, None] - half[None, :]
    gram = jnp.where(both, jnp.exp(jnp.where(both, logits, 0)) * (direction @ direction.T), 0)
    solved = nonnegative_least_squares(gram, target)
    log_unit = jnp.where(present, shift - half - jnp.log(norm[:, 0]), -jnp.inf)
    return solved * jnp.exp(jnp.minimum(log_unit, LARGEST_EXPONENT))
