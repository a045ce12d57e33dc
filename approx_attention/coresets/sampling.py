"""Weighted samples of tokens, and the sensitivities of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention import kernels
from approx_attention.core import WeightedKV, require_scaled_space, squared_norm
from approx_attention.coresets.clustering import random_places


def tokens_at(tokens: WeightedKV, place: Array, mass: Array) -> WeightedKV:
    """The tokens at given places, with other masses.

    Args:
        tokens: S tokens in scaled space.
        place: places, int ``[M]``.
        mass: the new masses ``[M]``; with mass 0 a token is absent.

    Returns:
        M tokens with the keys and values of these places.

    Raises:
        ValueError: tokens with a scale.
    """
    require_scaled_space("an algorithm", tokens)
    # A place without mass may contain any value, including NaN, which a factor of 0 would not remove.
    values = jnp.where(mass[:, None] > 0, tokens.values[place], 0)
    return WeightedKV(tokens.k[place], values * mass[:, None], mass)


def rescaled(chosen: WeightedKV, tokens: WeightedKV) -> WeightedKV:
    """The chosen tokens, with masses and sums of values scaled to the total mass.

    Args:
        chosen: tokens with masses.
        tokens: the tokens whose total mass the result has.
    """
    total = jnp.sum(chosen.mass)
    factor = jnp.sum(tokens.mass) / jnp.where(total > 0, total, 1)
    return dataclasses.replace(chosen, value_sum=chosen.value_sum * factor, mass=chosen.mass * factor)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Sample tokens uniformly without replacement, with masses scaled to the total mass.

    The baseline of all algorithms.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.coresets import Uniform
        >>> tokens = WeightedKV.of_tokens(jnp.eye(4), jnp.eye(4))
        >>> Uniform()(tokens, 2, jnp.float32(1), jax.random.key(0)).mass.tolist()
        [2.0, 2.0]
    """

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        place = random_places(tokens.mass, size, key)
        return rescaled(tokens_at(tokens, place, tokens.mass[place]), tokens)


@dataclasses.dataclass(frozen=True)
class ValueNorm:
    r"""Priority sample with odds :math:`p_j \propto m_j (\|v_j\| + \text{mean} \|v\|)` and inverse-probability masses.

    With :math:`\tau` the greatest score :math:`\log p_j + \text{Gumbel}` outside the sample, a token is in the sample
    with probability :math:`1 - e^{-p_j e^{-\tau}}`, by which its mass is divided.
    """

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """A coreset of ``size`` tokens; `approx_attention.coresets` describes the arguments."""
        norm = jnp.sqrt(squared_norm(lax.stop_gradient(tokens.values))[:, 0])
        total = jnp.sum(tokens.mass)
        mean = tokens.mass @ norm / jnp.where(total > 0, total, 1)
        # The mean norm keeps odds positive: a token with a small value still contributes to the normaliser.
        log_odds = tokens.log_mass + jnp.log(norm + jnp.where(mean > 0, mean, 1))
        # The largest log-odds + Gumbel are a sample without replacement, of a static size.
        score = log_odds + jax.random.gumbel(key, log_odds.shape, log_odds.dtype)
        best, place = lax.top_k(jnp.where(tokens.mass > 0, score, -jnp.inf), size + 1)
        place = place[:size]
        # expm1 keeps the probability of a rare token accurate.
        chance = -jnp.expm1(-jnp.exp(log_odds[place] - best[size]))
        mass = jnp.where(tokens.mass[place] > 0, tokens.mass[place] / chance, 0)
        return rescaled(tokens_at(tokens, place, mass), tokens)


def sensitivities(tokens: WeightedKV, ratio: Array, key: Array, sample: int = 1024) -> Array:
    r"""Estimate the sensitivity of each token, its share of the normaliser for the query in its direction.

    .. math:: m_j\, e^{q_j \cdot k_j} / Z(q_j), \qquad q_j = (\rho_q / \rho_k)\, k_j

    Args:
        tokens: S tokens with centred keys in scaled space.
        ratio: the radius of queries over that of keys, :math:`\rho_q / \rho_k`.
        key: typed PRNG key.
        sample: the number of tokens from which normalisers are estimated.

    Returns:
        Shares ``[S]``, at most 1. They have no gradient.

    Reference:
        :cite:p:`feldman2011unified`, for sensitivities; `approx_attention.bounds.sensitivity` bounds them.
    """
    k = lax.stop_gradient(tokens.k)
    log_mass = lax.stop_gradient(tokens.log_mass)
    own = ratio * squared_norm(k)[:, 0] + log_mass
    place = random_places(tokens.mass, min(sample, k.shape[0]), key)
    chosen = tokens.mass[place]
    scale = jnp.sum(tokens.mass) / jnp.where(jnp.sum(chosen) > 0, jnp.sum(chosen), 1)
    log_scale = jnp.log(jnp.where(scale > 0, scale, 1))
    # Only the normaliser is needed: one channel of the keys serves as values.
    others = kernels.state(ratio * k, k[place], k[place, :1], log_mass[place]).lse + log_scale
    # A token outside the sample is added to its own normaliser, so that shares are at most 1.
    missing = jnp.ones_like(own).at[place].set(0) > 0
    return jnp.where(tokens.mass > 0, jnp.exp(own - jnp.where(missing, jnp.logaddexp(own, others), others)), 0)
