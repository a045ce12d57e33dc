"""Feature maps estimate their kernel, and projections have the stated distribution."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.core import (
    PositiveFeatures,
    ReLUFeatures,
    TrigonometricFeatures,
    gaussian_projection,
    orthogonal_projection,
)
from tests.references import compiled

x, y = (0.5 * np.random.default_rng(i).normal(size=(1, 6)).astype(np.float32) for i in (0, 1))
DRAWS = {
    "gaussian": lambda key, size, dim: gaussian_projection(key, size, dim),
    "orthogonal": lambda key, size, dim: orthogonal_projection(key, size, dim),
}


def hyperbolic_features(w):
    return PositiveFeatures(jnp.concatenate([w, -w]))


def kernel_estimates(features, draw, num_features=12, num_draws=6000):
    @jax.jit
    @jax.vmap
    def estimate(key):
        phi = features(DRAWS[draw](key, num_features, 6))
        (values_x, log_x), (values_y, log_y) = phi(x), phi(y)
        return jnp.sum(values_x * jnp.exp(log_x) * values_y * jnp.exp(log_y))

    return np.asarray(estimate(jax.random.split(jax.random.key(0), num_draws)), np.float64)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("features", [PositiveFeatures, TrigonometricFeatures, hyperbolic_features])
def test_softmax_kernel_is_unbiased(features, draw):
    estimates = kernel_estimates(features, draw)
    truth = math.exp(np.sum(x * y))
    standard_error = estimates.std() / math.sqrt(len(estimates))
    assert standard_error < 0.03 * truth
    assert abs(estimates.mean() - truth) < 4.5 * standard_error


def test_mean_squared_errors_have_their_closed_forms():
    # Choromanski et al. (2021), lemma 2, for independent directions.
    together, apart = (float(np.sum((x + sign * y) ** 2)) for sign in (1, -1))
    kernel, num_features = math.exp(np.sum(x * y)), 12
    positive = math.exp(together) * kernel**2 * (1 - math.exp(-together)) / num_features
    trigonometric = math.exp(together) / kernel**2 * (1 - math.exp(-apart)) ** 2 / (2 * num_features)
    hyperbolic = 0.5 * (1 - math.exp(-together)) * positive
    for features, expected in (
        (PositiveFeatures, positive),
        (TrigonometricFeatures, trigonometric),
        (hyperbolic_features, hyperbolic),
    ):
        estimates = kernel_estimates(features, "gaussian", num_features, 40_000)
        assert abs(np.mean((estimates - kernel) ** 2) / expected - 1) < 0.1


def test_orthogonal_directions_have_less_variance():
    independent, orthogonal = (kernel_estimates(PositiveFeatures, draw, 6, 20_000).var() for draw in DRAWS)
    assert orthogonal < 0.97 * independent


draw_gaussian, draw_orthogonal = compiled(gaussian_projection, orthogonal_projection)


@functools.partial(jax.jit, static_argnums=1)
def many_orthogonal(keys, dim):
    return jax.vmap(lambda key: orthogonal_projection(key, dim, dim))(keys)


def test_blocks_of_rows_are_orthogonal():
    w = np.asarray(draw_orthogonal(jax.random.key(0), 15, 6), np.float64)
    assert w.shape == (15, 6)
    for start in (0, 6, 12):
        block = w[start : start + 6]
        gram = block @ block.T
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-4)


def test_row_norms_follow_their_rule():
    many = many_orthogonal(jax.random.split(jax.random.key(0), 4000), 6)
    squared = np.sum(np.asarray(many, np.float64) ** 2, axis=-1).ravel()
    # chi-squared with 6 degrees of freedom: mean 6, variance 12.
    assert abs(squared.mean() - 6) < 0.15
    assert abs(squared.var() - 12) < 0.8
    fixed = draw_orthogonal(jax.random.key(0), 15, 6, row_norm="sqrt_dim")
    np.testing.assert_allclose(np.linalg.norm(fixed, axis=-1), math.sqrt(6), rtol=1e-5)


def test_every_row_is_marginally_standard_normal():
    many = many_orthogonal(jax.random.split(jax.random.key(1), 20_000), 3)
    entries = np.asarray(many, np.float64).reshape(len(many), 9)
    np.testing.assert_allclose(entries.mean(0), 0, atol=0.035)
    np.testing.assert_allclose(entries.var(0), 1, atol=0.05)
    np.testing.assert_allclose((entries**4).mean(0), 3, atol=0.35)


def test_relu_features_are_what_they_say():
    w = draw_gaussian(jax.random.key(0), 5, 6)
    values, log_scale = map(np.asarray, apply(ReLUFeatures(w, offset=0.25), x))
    expected = (np.maximum(x @ np.asarray(w).T, 0) + 0.25) / math.sqrt(5)
    np.testing.assert_allclose(values * np.exp(log_scale), expected, rtol=1e-6)


apply = jax.jit(lambda features, x: features(x))


@pytest.mark.parametrize("features", [PositiveFeatures, TrigonometricFeatures, ReLUFeatures])
def test_feature_maps_are_pytrees_that_keep_the_dtype(features, x64):
    phi = features(draw_gaussian(jax.random.key(0), 5, 6))
    again = jax.tree.unflatten(jax.tree.structure(phi), jax.tree.leaves(phi))
    chex.assert_trees_all_equal(apply(again, x), apply(phi, x))
    assert jax.eval_shape(phi, x.astype(np.float64)).log_scale.dtype == jnp.float64
    assert phi.num_features == np.broadcast_shapes(*(y.shape for y in apply(phi, x)))[-1]


def test_bad_draws_are_refused():
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        gaussian_projection(jax.random.key(0), 0, 4)
    with pytest.raises(ValueError, match="row_norm must be one of chi, sqrt_dim; got 'chy'; did you mean 'chi'"):
        orthogonal_projection(jax.random.key(0), 4, 4, row_norm="chy")
