"""Masses fitted to kept tokens: against least squares in float64, and in limits where they are known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from approx_attention import WeightedKV, attend
from approx_attention.core import nonnegative_least_squares
from approx_attention.coresets import BalanceKV, Farthest, FittedMasses, Halving, refitted
from approx_attention.coresets.halving import balancing_walk
from approx_attention.coresets.masses import fitted_masses
from tests.methods.test_coreset import (
    HEAD_DIM,
    KEY,
    NUM_KEYS,
    SIZE,
    VALUE_DIM,
    answers,
    clustered,
    error_of,
    shared_head,
    summary,
)
from tests.references import as_array, compiled, random_head

attend, fitted_masses, refitted, tokens_of = compiled(attend, fitted_masses, refitted, WeightedKV.of_tokens)
nonnegative_least_squares, balancing_walk = compiled(nonnegative_least_squares, balancing_walk)

SHARE = 0.1  # c over the mean squared norm of the values


def kernel(k, v, others_k, others_v, exponent, unit):
    """The kernel of halving in float64."""
    k, v, others_k, others_v = (np.asarray(x, np.float64) for x in (k, v, others_k, others_v))
    return np.exp(exponent * k @ others_k.T) * (v @ others_v.T / unit**2 + SHARE)


def in_float64(tokens):
    """Keys, values and masses, if no token is absent."""
    k, value_sum, mass = (np.asarray(x, np.float64) for x in (tokens.k, tokens.value_sum, tokens.mass))
    return k, value_sum / mass[:, None], mass


def distance(beta, held, tokens, exponent):
    """The squared distance of the weighted sums in the kernel's space, and the least-squares problem G, b."""
    (k, v, mass), (held_k, held_v, _) = in_float64(tokens), in_float64(held)
    unit = np.sqrt(mass @ (v**2).sum(1) / mass.sum())
    gram = kernel(held_k, held_v, held_k, held_v, exponent, unit)
    target = kernel(held_k, held_v, k, v, exponent, unit) @ mass
    whole = mass @ kernel(k, v, k, v, exponent, unit) @ mass
    beta = np.asarray(beta, np.float64)
    return beta @ gram @ beta - 2 * beta @ target + whole, gram, target


def rows_of(seed, spread=1.0):
    _, k, v = random_head(seed, 6, NUM_KEYS, HEAD_DIM, VALUE_DIM, spread=spread)
    share = NUM_KEYS / SIZE
    held = map(as_array, (np.asarray(k)[:SIZE], share * np.asarray(v)[:SIZE], np.full(SIZE, share)))
    return tokens_of(k, v), WeightedKV(*held)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_nonnegative_least_squares_against_an_active_set(condition):
    random = np.random.default_rng(0)
    a = random.normal(size=(40, 24)) * np.geomspace(1, condition, 24)
    y = random.normal(size=40)
    expected, residual = nnls(a, y)
    x = nonnegative_least_squares(as_array(a.T @ a), as_array(a.T @ y))
    assert (np.asarray(x) >= 0).all()
    assert 0 < (expected > 0).sum() < 24
    assert np.linalg.norm(a @ np.asarray(x, np.float64) - y) <= residual * (1 + 1e-5)
    # Unknowns that do not enter the problem are 0 and change no other.
    entering, y = np.arange(24) < 2, np.full(24, 3.0)
    y[:2] = 2, -1
    padded = nonnegative_least_squares(as_array(np.diag(entering)), as_array(y))
    np.testing.assert_allclose(padded, [2] + 23 * [0], atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_masses_are_the_nearest_in_the_kernels_space(seed):
    tokens, held = rows_of(seed)
    beta = np.asarray(fitted_masses(tokens, held, jnp.float32(0.25)))
    equal, gram, target = distance(held.mass, held, tokens, 0.25)
    factor = np.linalg.cholesky(gram)
    least, found = (
        distance(x, held, tokens, 0.25)[0] for x in (nnls(factor.T, np.linalg.solve(factor, target))[0], beta)
    )
    assert (beta >= 0).all()
    assert found < equal
    assert found - least < 1e-4 * (equal - least)


def test_masses_are_known_where_all_are_held_and_where_tokens_repeat():
    q, k, v = shared_head(20)
    tokens = tokens_of(k, v)
    np.testing.assert_allclose(refitted(tokens, tokens).mass, 1, atol=1e-2)
    # Each of six tokens occurs a different number of times, which only the masses show.
    count = np.asarray([1, 2, 4, 8, 16, NUM_KEYS - 31])
    place = np.repeat(np.arange(SIZE), count)
    repeated, first = ([as_array(np.asarray(x)[chosen]) for x in (k, v)] for chosen in (place, slice(SIZE)))
    small = refitted(tokens_of(*repeated), tokens_of(*first))
    np.testing.assert_allclose(small.mass, count, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(attend(q, small).out, answers(q, *repeated), atol=2e-3)


def test_absent_tokens_stay_absent_and_the_total_is_kept():
    q, k, v = shared_head(21)
    real = np.arange(NUM_KEYS) % 3 != 0
    soiled = (as_array(np.where(real[:, None], x, np.nan)) for x in (k, v))
    tokens = tokens_of(*soiled, as_array(real, bool))
    held = jax.tree.map(lambda x: as_array(np.asarray(x)[:SIZE]), tokens)
    small = refitted(tokens, held, query_radius=jnp.float32(2.0))
    mass = np.asarray(small.mass)
    assert (mass[~real[:SIZE]] == 0).all()
    assert mass.sum() == pytest.approx(real.sum(), rel=1e-5)
    assert np.isfinite(attend(q, small).out).all()
    nothing = WeightedKV(held.k, *(as_array(np.zeros(x.shape)) for x in (held.value_sum, held.mass)))
    np.testing.assert_array_equal(refitted(tokens, nothing, query_radius=jnp.float32(2.0)).mass, 0)


@jax.jit
def with_slopes(tokens, held):
    def loss(k, value_sum):
        made = refitted(tokens, dataclasses.replace(held, k=k, value_sum=value_sum))
        return jnp.sum(made.value_sum**2), made

    return jax.grad(loss, (0, 1), has_aux=True)(held.k, held.value_sum)


def test_no_radius_overflows():
    for spread in (1e-3, 40.0):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(with_slopes(*rows_of(4, spread))))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [Halving(), Farthest()])
def test_fitted_masses_err_less(algorithm):
    k, v = clustered(29, 512, noise=0.2)
    errors = [
        error_of(k, v, summary(k, v, size=32, algorithm=x, radius=np.float32(2)), 2.0)
        for x in (algorithm, FittedMasses(algorithm))
    ]
    assert errors[1] < 0.95 * errors[0]


def test_the_walk_of_the_authors_code_against_a_loop():
    random = np.random.default_rng(7)
    features = random.normal(size=(32, 5))
    gram, coin = features @ features.T, random.uniform(size=32)
    for gamma in (4.0, 0.05):
        sums, expected = np.zeros(5), []
        for x, u in zip(features, coin, strict=True):
            plus = u < 0.5 - gamma * (x @ sums) / np.diag(gram).max()
            sums += x if plus else -x
            expected.append(plus)
        plus = balancing_walk(*map(as_array, (gram, gamma, coin)))
        np.testing.assert_array_equal(plus, expected)


def test_what_masses_and_walks_do_not_take():
    _, k, v = shared_head(22)
    tokens = tokens_of(k, v)
    with pytest.raises(ValueError, match="masses can be fitted to kept or merged tokens only"):
        jax.eval_shape(functools.partial(FittedMasses(BalanceKV()), size=SIZE), tokens, ratio=jnp.float32(1), key=KEY)
    with pytest.raises(ValueError, match="refitted uses queries in scaled space"):
        refitted(dataclasses.replace(tokens, scale=jnp.float32(0.5)), tokens)
    with pytest.raises(ValueError, match="gamma must be positive, got 0"):
        BalanceKV(gamma=0.0)
    with pytest.raises(TypeError, match="gamma must be one number"):
        BalanceKV(gamma="x")  # pyright: ignore[reportArgumentType]
