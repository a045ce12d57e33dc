"""Sines and cosines against those of numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.core import trigonometry
from tests.references import as_array

pytestmark = pytest.mark.all_forms

sine_and_cosine = jax.jit(trigonometry.sine_and_cosine)


def angles(size):
    random = np.random.default_rng(0).normal(size=4000) * size
    # Multiples of a quarter turn, where one of the two is 0.
    return np.concatenate([random, np.arange(-40, 40) * np.pi / 2]).astype(np.float32)


@pytest.mark.parametrize("size", [1, 30, 3000, 1e6, 1e7, 1e9, 3e37])
def test_as_near_as_the_rounding_of_the_angle(size):
    x = angles(size)
    sine, cosine = map(np.asarray, sine_and_cosine(x))
    allowed = np.minimum(2e-7 + np.spacing(np.abs(x)), 2)
    assert max(np.abs(sine).max(), np.abs(cosine).max()) <= 1 + 1e-6
    assert np.all(np.abs(sine - np.sin(x.astype(np.float64))) <= allowed)
    assert np.all(np.abs(cosine - np.cos(x.astype(np.float64))) <= allowed)


def test_what_is_not_finite_is_not_a_number():
    for x in sine_and_cosine(np.float32([np.nan, np.inf, -np.inf])):
        assert np.all(np.isnan(x))


def test_derivatives_of_both_are_those_of_the_circle():
    x = angles(3)

    @jax.jit
    @jax.vmap
    def derivatives(x):
        first = jax.jacrev(trigonometry.sine_and_cosine)
        return first(x), jax.jacrev(first)(x)

    first, second = derivatives(x)
    sine, cosine = np.sin(x.astype(np.float64)), np.cos(x.astype(np.float64))
    np.testing.assert_allclose(first, (cosine, -sine), atol=1e-6)
    np.testing.assert_allclose(second, (-sine, -cosine), atol=1e-6)


def test_polynomials_are_the_form_of_a_cpu_alone():
    for platform, expected in (("cpu", 0), ("tpu", 1)):
        text = sine_and_cosine.trace(np.ones(3, np.float32)).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.sine") == text.count("stablehlo.cosine") == expected


def test_other_dtypes_are_those_of_jax(x64):
    for dtype in (jnp.float64, jnp.bfloat16):
        x = as_array(angles(3), dtype)
        of_jax = jax.jit(lambda x: (jnp.sin(x), jnp.cos(x)))
        for ours, jax_own in zip(sine_and_cosine(x), of_jax(x), strict=True):
            np.testing.assert_array_equal(ours, jax_own)
