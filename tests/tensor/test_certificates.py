"""The certificates of the polynomial method bound its error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from approx_attention import bounds
from approx_attention.bounds import tensors as of_tensors
from approx_attention.evaluation import skill as measured
from approx_attention.tensor import exp_coefficients, taken_by
from tests.tensor.tuples import NAMES, close, compiled_exact, compiled_polynomial, tensors

logit_bound, logit_rms = jax.jit(bounds.logit_bound), jax.jit(bounds.logit_rms)


@pytest.fixture(autouse=True, scope="module")
def compiled_in_certificates():
    """Certificates call these functions without jit, so that each operation would be a program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_tensors, "logit_bound", logit_bound)
        patch.setattr(of_tensors, "logit_rms", logit_rms)
        yield


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(0, 5), st.floats(0.1, 1.5), st.booleans(),
       st.sampled_from(["taylor", "minimax", "chebyshev", "hermite"]))  # fmt: skip
def test_the_certificate_is_never_violated(seed, order, degree, spread, is_causal, coefficients):
    with jax.enable_x64(True):
        q, keys, values = tensors(seed, 6, [6, 5, 4][: order - 1], dim=3, spread=spread)
        certificate = bounds.tensor_certificate(
            q, keys, values, degree=degree, coefficients=coefficients, scale=0.4, tolerance=0.1
        )
        beta = certificate.logit_bound
        rms = float(logit_rms(q, keys, scale=0.4))
        options = {"is_causal": "both" if is_causal else None, "scale": 0.4}
        chosen = exp_coefficients(coefficients, degree, **taken_by(coefficients, bound=beta, rms=rms))
        out = compiled_polynomial(q, keys, values, coefficients=chosen, **options)
        expected = compiled_exact(q, keys, values, **options)
        error = np.max(np.abs(np.asarray(out) - np.asarray(expected)), axis=0)
        assert np.all(error <= certificate.output + 1e-9)
        assert certificate.met == (certificate.total_variation <= 0.1)
        assert certificate.rank == math.comb(3 + degree, degree)


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(-3, 3))
def test_the_bound_on_logits_holds_and_the_root_mean_square_is_exact(seed, order, scale):
    with jax.enable_x64(True):
        q, keys, _ = tensors(seed, 5, [6, 5, 4][: order - 1], dim=3)
        q = jax.device_put(np.asarray(q) * [10.0, 1.0, 0.1])
        terms = ",".join(["id", *(f"{name}d" for name in NAMES[: order - 1])])
        logits = scale * np.einsum(f"{terms}->i{NAMES[: order - 1]}", q, *keys)
        assert np.max(np.abs(logits)) <= float(logit_bound(q, keys, scale=scale)) * (1 + 1e-12) + 1e-100
        close(logit_rms(q, keys, scale=scale), np.sqrt(np.mean(logits**2)), 1e-9)


def test_the_bound_on_logits_is_reached_and_ignores_padding(x64):
    x = np.array([[1.0, 0.0], [0.0, 2.0]])
    close(logit_bound(x, (x, x, x), scale=1.0), 16.0)
    padded = np.concatenate([x, np.full((1, 2), np.nan)])
    close(logit_bound(x, (padded, x), scale=1.0, kv_mask=(np.array([True, True, False]), None)), 8.0)


def test_certificates_ignore_padding(x64):
    q, keys, values = tensors(23, 6, (9, 7))
    real = jax.device_put(np.arange(9) < 5)
    padded = [(jax.device_put(np.where(real[:, None], xs[0], np.nan)), xs[1]) for xs in (keys, values)]
    removed = [(jax.device_put(np.asarray(xs[0])[:5]), xs[1]) for xs in (keys, values)]
    options = {"scale": -0.3, "degree": 4, "coefficients": "hermite"}
    found = bounds.tensor_certificate(q, *padded, kv_mask=(real, None), **options)
    expected = bounds.tensor_certificate(q, *removed, **options)
    assert math.isfinite(expected.total_variation)
    jax.tree.map(close, found[:3], expected[:3])
    assert logit_rms(q, keys, kv_mask=(np.zeros(9, bool), None)) == 0
    with pytest.raises(ValueError, match="degree must be 2, that of the 3 coefficients, got 4"):
        bounds.tensor_certificate(q, keys, values, degree=4, coefficients=[1.0, 1.0, 0.5])


def test_the_bound_on_logits_neither_overflows_nor_vanishes():
    q, keys, _ = tensors(24, 6, (9, 7), dtype=jnp.float32)
    q, keys = jax.tree.map(np.asarray, (q, keys))
    large = logit_bound(q * np.float32(1e-20), (keys[0] * np.float32(1e20), keys[1]))
    close(large, logit_bound(q, keys), 1e-5)
    assert logit_bound(0 * q, tuple(np.float32(1e20) * k for k in keys)) == 0


def test_error_falls_with_even_degree_and_below_its_certificate(x64):
    q, keys, values = tensors(19, 40, (40, 40), spread=0.5)
    expected = compiled_exact(q, keys, values)
    mean = (np.mean(values[0], axis=0) * np.mean(values[1], axis=0))[None]
    skill = jax.jit(measured)
    last, last_certified = np.inf, np.inf
    for degree in (0, 2, 4, 6, 8):
        out = compiled_polynomial(q, keys, values, degree=degree)
        error = float(skill(out, expected, mean))
        certified = np.max(bounds.tensor_certificate(q, keys, values, degree=degree).output)
        assert error < last / 2
        assert certified <= last_certified
        last, last_certified = error, certified
    assert float(skill(np.broadcast_to(mean, expected.shape), expected, mean)) == 1.0
