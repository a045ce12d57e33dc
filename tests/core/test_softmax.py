"""Every exact form equals brute force in value, normaliser and gradient, at the sizes where its code path changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from approx_attention import kernels
from approx_attention.core import (
    HIDDEN,
    dense_state,
    streamed_state,
)
from approx_attention.kernels import cpu
from tests.kernels.cases import forget_programs
from tests.references import brute_force, causal_mask, random_head


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 by 64, so that a short sequence has several."""
    monkeypatch.setattr(cpu, "ONE_TILE", 64 * 64)
    monkeypatch.setattr(cpu, "KEY_BLOCK", 64)
    monkeypatch.setattr(cpu, "LEAST_TILE", 64)
    monkeypatch.setattr(cpu, "GREATEST_TILE", 64 * 64)
    forget_programs()
    yield
    monkeypatch.undo()
    forget_programs()


def assert_is_exact(state, q, k, v, mask=None):
    out, lse = brute_force(q, k, v, scale=1, mask=mask)
    np.testing.assert_allclose(state.out, out, atol=3e-6)
    np.testing.assert_allclose(state.lse, lse, atol=3e-6)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (7, 5), (64, 64), (65, 130), (200, 63)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocked_equals_brute_force(small_tiles, num_queries, num_keys, masked):
    q, k, v = random_head(0, num_queries, num_keys, spread=0.5)
    mask = np.random.default_rng(0).random(num_keys) < 0.7
    mask[0] = True
    bias = np.where(mask, np.float32(0), np.float32(HIDDEN)) if masked else None
    state = jax.jit(lambda *x: cpu.blocked_state(*x))(q, k, v, bias)
    assert_is_exact(state, q, k, v, mask if masked else None)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 3), (3, 5), (130, 130), (700, 300), (1100, 1100)])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (3, 7), (127, 0), (100, 900), (2000, 2000)])
def test_window_equals_brute_force(num_queries, num_keys, left, right):
    q, k, v = random_head(3, num_queries, num_keys, spread=0.5)
    offset = np.arange(num_keys)[None, :] - np.arange(num_queries)[:, None]
    mask = np.arange(num_keys) % 7 != 2
    bias = np.where(mask, np.float32(0), np.float32(HIDDEN))
    state = jax.jit(functools.partial(kernels.state, left=left, right=right))(q, k, v, bias)
    assert_is_exact(state, q, k, v, (offset >= -left) & (offset <= right) & mask)


def large_logits(seed, num_queries, num_keys, magnitude, head_dim=32):
    """A head with largest logits of about ``magnitude``, which tiles of different shapes round differently."""
    q, k, v = (np.asarray(x) for x in random_head(seed, num_queries, num_keys, head_dim))
    factor = np.float32(np.sqrt(magnitude / (4 * np.sqrt(head_dim))))
    return factor * q, factor * k, v


def value_gradient_in_float64(q, k, v, d_out, visible):
    """The gradient of the values: weights are at most 1, so it is at most the sum of the cotangents."""
    logits = np.where(visible, np.asarray(q, np.float64) @ np.asarray(k, np.float64).T, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).T @ np.asarray(d_out, np.float64)


FORMS = [
    (False, streamed_state),
    (True, functools.partial(streamed_state, is_causal=True)),
    (False, kernels.state),
    (False, functools.partial(kernels.state, left=40, right=25)),
    (True, functools.partial(kernels.state, left=40, right=0)),
]


@pytest.mark.parametrize(("is_causal", "form"), FORMS)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(60, 60), (300, 300), (70, 1300)])
def test_gradients_at_large_logits(small_tiles, is_causal, form, num_queries, num_keys):
    offset = np.arange(num_keys)[None, :] - np.arange(num_queries)[:, None]
    visible = offset <= 0 if is_causal else np.ones_like(offset, bool)
    if getattr(form, "func", None) is kernels.state:
        visible &= (offset >= -40) & (offset <= 25)
    d_out = np.random.default_rng(1).normal(size=(num_queries, 32)).astype(np.float32)
    bias = np.where(visible, np.float32(0), np.float32(HIDDEN))

    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(d_out * form(*x).out), argnums=(0, 1, 2)))
    for magnitude in (1.0, 30.0, 1e3, 1e4, 1e6, 1e8):
        q, k, v = large_logits(7, num_queries, num_keys, magnitude)
        found, expected = jax.tree.map(np.asarray, (gradients(q, k, v), dense_gradients(q, k, v, bias, d_out)))
        # The error of rounding a logit grows with its size, until all weight is on one key.
        rounding = 1e-5 + 3e-7 * magnitude
        truth = value_gradient_in_float64(q, k, v, d_out, visible)
        size = np.abs(truth).max()
        wrong = np.abs(np.asarray(found[2]) - truth).max(1) > 3 * rounding * size
        # If two logits of a query are equal up to the rounding of float32, either key may win.
        assert wrong.mean() <= (0.0 if magnitude < 1e5 else 0.02), magnitude
        assert np.abs(found[2]).max() <= 1.01 * np.abs(d_out).sum(0).max()
        # If all weight is on one key, gradients of logits are differences of equal numbers.
        noise = 3e-6 * np.abs(d_out @ v.T).max() * max(np.abs(q).max(), np.abs(k).max(), 1)
        for a, b in zip(found, expected, strict=True):
            close = np.abs(a - b) <= 3 * rounding * np.abs(b).max() + noise
            assert close.mean() >= (1.0 if magnitude < 1e5 else 0.98), magnitude


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1, 2))
def dense_gradients(q, k, v, bias, d_out):
    """One program for all forms."""
    return jnp.sum(d_out * dense_state(q, k, v, bias).out)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e6, 1e8])
def test_gradients_of_keys_that_share_the_weight(is_causal, magnitude):
    # Keys are equal up to sign, so that half of them share the weight at any size of the logits.
    random = np.random.default_rng(3)
    k = np.where(random.random(300) < 0.5, 1.0, -1.0)[:, None] * random.normal(size=(1, 16))
    q = random.normal(size=(300, 16))
    factor = np.sqrt(magnitude / np.abs(q @ k.T).max())
    q, k = ((factor * x).astype(np.float32) for x in (q, k))
    v, d_out = (random.normal(size=(300, 16)).astype(np.float32) for _ in range(2))
    noise = 1e-5 * np.abs(d_out @ v.T).max() * max(np.abs(q).max(), np.abs(k).max())
    bias = np.where(causal_mask(300, 300) | (not is_causal), np.float32(0), np.float32(HIDDEN))
    pairs = zip(streamed_gradients(q, k, v, d_out, is_causal), dense_gradients(q, k, v, bias, d_out), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=noise)


@functools.partial(jax.jit, static_argnums=4)
@functools.partial(jax.grad, argnums=(0, 1, 2))
def streamed_gradients(q, k, v, d_out, is_causal):
    return jnp.sum(d_out * streamed_state(q, k, v, is_causal=is_causal).out)


@pytest.mark.slow
@pytest.mark.parametrize("form", [kernels.state, functools.partial(kernels.state, left=40, right=3)])
def test_gradients_against_finite_differences(form, x64):
    q, k, v = random_head(5, 13, 13, 3, dtype=jnp.float64)
    bias = jnp.where(jnp.arange(13) % 4 == 1, HIDDEN, 0.1 * jnp.arange(13.0))
    check_grads(form, (q, k, v, bias), order=1, modes=["rev", "fwd"], eps=1e-6, atol=1e-6, rtol=1e-6)


def test_dense_form_has_forward_mode_and_second_derivatives(x64):
    q, k, v = random_head(6, 5, 6, 3, dtype=jnp.float64)
    out = jax.jit(lambda *x: dense_state(*x).out)
    check_grads(out, (q, k, v), order=2, modes=["rev", "fwd"], eps=1e-6, atol=1e-4, rtol=1e-4)
