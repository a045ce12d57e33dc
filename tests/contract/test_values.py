"""Outputs of every method: their types, the limits in which they are exact, and their errors elsewhere."""

import functools
import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from approx_attention import METHODS, attend, fold_scale, merge
from tests.cases import (
    ALL,
    CAUSAL,
    LENGTH,
    call,
    case_of,
    dense,
    every_method,
    lifted_one_direction,
    one_direction,
    pulled_back,
    settings,
    unless_slow,
    with_gradients,
)
from tests.references import brute_force, causal_mask, compiled, having, random_head, relative_error

EXACT = [name for name in ALL if case_of(name).always_exact or METHODS[name].capabilities.exact_limit]


# shapes and dtypes


@one_direction
@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        pytest.param(jnp.float32, marks=pytest.mark.slow),
        pytest.param(jnp.float16, marks=pytest.mark.slow),
    ],
)
def test_shape_and_dtype(name, is_causal, dtype):
    tensors = random_head(0, LENGTH, LENGTH, 8, 6, dtype)
    options = {"is_causal": True} if is_causal else {}
    out = call(name, *tensors, **options)
    assert out.shape == (LENGTH, 6)
    assert out.dtype == dtype
    wide, _ = with_gradients(name, *(np.asarray(x, np.float32) for x in tensors), is_causal=is_causal)
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, atol=2e-2, rtol=2e-2)


@every_method
def test_float64_in_float64_throughout(name, x64):
    q, k, v = random_head(1, 9, 9, dtype=jnp.float64, spread=0.5)
    out = call(name, q, k, v, size=9)
    assert out.dtype == jnp.float64
    # If a method rounds to float32 anywhere, scaling the values by 3 shows an error of about 1e-8.
    np.testing.assert_allclose(call(name, q, k, 3 * v, size=9), 3 * out, rtol=1e-13, atol=1e-14)
    if METHODS[name].capabilities.exact_limit:
        np.testing.assert_allclose(out, brute_force(q, k, v)[0], atol=1e-13)


@lifted_one_direction
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3)),
    size=st.integers(1, 9),
)
@hypothesis_settings(max_examples=3, deadline=None, derandomize=True)
def test_any_lengths(name, is_causal, shape, size):
    num_queries, num_keys, head_dim, value_dim = shape
    q, k, v = random_head(13, num_queries, num_keys, head_dim, value_dim)
    options = {"is_causal": True} if is_causal else {}
    out = call(name, q, k, v, size=size, block_size=3, **options)
    assert out.shape == (num_queries, value_dim)
    if not METHODS[name].capabilities.convex:
        return
    # Averages of values with weights that sum to 1 stay within the values' range; a row that sees nothing is 0.
    low, high = np.minimum(0, np.min(v, axis=0)), np.maximum(0, np.max(v, axis=0))
    assert np.all((np.asarray(out) >= low - 1e-5) & (np.asarray(out) <= high + 1e-5))


# the declared exact limit, in value and gradient


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, c) for name in EXACT for c in (False, True) if not c or name in CAUSAL],
)
def test_exact_limit(name, is_causal):
    q, k, v = random_head(3, 11, 11)
    weight = np.random.default_rng(0).normal(size=(11, 8)).astype(np.float32)
    for kv_mask in (np.ones(11, bool), np.arange(11) < 6, np.arange(11) % 4 != 1):
        out, gradients = at_full_size(name, is_causal, q, k, v, weight, kv_mask)
        rows = kv_mask if is_causal else slice(None)
        visible = causal_mask(11, 11) & kv_mask if is_causal else kv_mask
        np.testing.assert_allclose(out[rows], brute_force(q, k, v, mask=visible)[0][rows], atol=2e-6)
        if kv_mask.all():
            chex.assert_trees_all_close(gradients, _exact(is_causal)(q, k, v, weight)[1], atol=2e-6)


def at_full_size(name, is_causal, *tensors_and_weight_and_mask):
    """Outputs and gradients with a summary as large as the sequence: one program for 11 tokens and any mask."""
    *tensors, kv_mask = tensors_and_weight_and_mask
    options = case_of(name).exact_causal if is_causal else {}
    return with_gradients(name, *tensors, kv_mask=kv_mask, size=11, is_causal=is_causal, **options)


@functools.cache
def _exact(is_causal):
    return pulled_back(functools.partial(dense, is_causal=is_causal))


@pytest.mark.parametrize("name", [name for name in ALL if name not in EXACT])
def test_no_exact_limit_is_kept_silent(name):
    q, k, v = random_head(26, 9, 9)
    assert np.abs(np.asarray(call(name, q, k, v, size=9)) - brute_force(q, k, v)[0]).max() > 1e-3


# more budget, less error; unbiased where claimed


@pytest.mark.parametrize("name", [unless_slow(name) for name in ALL if METHODS[name].size])
def test_error_falls_with_size(name):
    q, k, v = random_head(4, 64, 256, spread=0.7)
    # Neighbouring keys are similar, and queries are close to them, so that every kind of summary can gain.
    k, v = (jnp.asarray(np.cumsum(np.asarray(x), axis=0) / 8) for x in (k, v))
    q = k[::4] + 0.1 * q
    exact = case_of(name).target(q, k, v)
    keys = jax.random.split(jax.random.key(0), 8)

    def mean_error(size):
        outs = jax.vmap(lambda key: call(name, q, k, v, size=size, key=key))(keys)
        return np.mean([relative_error(out, exact) for out in outs])

    small, large = mean_error(8), mean_error(192)
    assert large < 0.7 * small


@pytest.mark.parametrize("name", having(unbiased=True, needs_key=True))
def test_numerator_and_normalizer_are_unbiased(name):
    q, k, v = random_head(5, 4, 24, spread=0.5)
    scaled_q, scaled_k = fold_scale(q, k)
    method, num_draws = METHODS[name], 4000

    @jax.jit
    @jax.vmap
    def draw(key):
        if method.summarize is None:
            state = method.function(q, k, v, key, **{method.size: 20}, return_state=True)
        else:
            state = attend(scaled_q, method.summarize(scaled_k, v, key, **{method.size: 20}))
        mass = jnp.exp(state.lse)
        return mass, mass[:, None] * state.out

    exact_out, exact_lse = brute_force(q, k, v)
    expected = np.exp(exact_lse), np.exp(exact_lse)[:, None] * exact_out
    for estimates, truth in zip(draw(jax.random.split(jax.random.key(1), num_draws)), expected, strict=True):
        standard_error = np.std(estimates, axis=0) / math.sqrt(num_draws)
        assert np.all(np.abs(np.mean(estimates, axis=0) - truth) < 4.5 * standard_error + 1e-5)
        # The test is sensitive: a bias of 10% would be seen.
        assert np.all(standard_error < 0.02 * np.abs(truth).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", having(unbiased=False, normalizer=True))
def test_no_unbiased_sums_are_kept_silent(name):
    q, k, v = random_head(27, 9, 30)
    method = METHODS[name]
    hyperparameters = settings(name, size=5)
    states = [
        method.function(q, k, v, jax.random.key(seed), return_state=True, **hyperparameters)
        for seed in range(20 if method.capabilities.needs_key else 1)
    ]
    normalizer = np.mean([np.exp(np.asarray(state.lse, np.float64)) for state in states], axis=0)
    assert np.abs(normalizer / np.exp(brute_force(q, k, v)[1]) - 1).max() > 0.05


# weights


@pytest.mark.parametrize("name", having(affine=True))
def test_constant_values_come_back(name):
    q, k, v = random_head(14, LENGTH, LENGTH, 8, 6)
    out, _ = with_gradients(name, q, k, np.full(v.shape, 2.5, np.float32))
    np.testing.assert_allclose(out, 2.5, rtol=2e-6)


@pytest.mark.parametrize("name", having(affine=False))
def test_weights_that_do_not_sum_to_1_are_kept_silent(name):
    q, k, v = random_head(26, LENGTH, LENGTH, 8, 6)
    out, _ = with_gradients(name, q, k, np.ones(v.shape, np.float32))
    assert np.abs(out - 1).max() > 1e-3


# summaries


@pytest.mark.parametrize("name", [unless_slow(name) for name in having(normalizer=True)])
def test_state_agrees_with_output_and_normalizer_with_summary(name):
    q, k, v = random_head(3, 9, 12)
    state = call(name, q, k, v, return_state=True)
    np.testing.assert_allclose(state.out, call(name, q, k, v), atol=1e-6)
    method = METHODS[name]
    if method.summarize is not None:
        known = inspect.signature(method.summarize).parameters
        hyperparameters = {argument: x for argument, x in settings(name).items() if argument in known}
        scaled_q, scaled_k = fold_scale(q, k)
        summary = compiled(method.summarize)(scaled_k, v, jax.random.key(7), **hyperparameters)
        answer = compiled(attend)(scaled_q, summary)
        chex.assert_trees_all_close(answer, state, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].summarize])
def test_summaries_of_parts_merge(name):
    method = METHODS[name]
    q, k, v = random_head(24, 6, 20)
    hyperparameters = {method.size: 20} if method.size else {}
    summarize = functools.partial(method.summarize, key=jax.random.key(7), **hyperparameters)

    @jax.jit
    def answers(q, k, v):
        parts = [summarize(k[part], v[part]) for part in (slice(0, 8), slice(8, 20))]
        return parts, merge(*(attend(q, part) for part in parts)), attend(q, summarize(k, v))

    parts, merged, whole = answers(q, k, v)
    # `merge` runs outside jit: only then are random projections compared by value.
    together = compiled(attend)(q, merge(*parts))
    chex.assert_trees_all_close(together, merged, atol=2e-5)
    if method.capabilities.exact_limit or method.draw or case_of(name).always_exact:
        chex.assert_trees_all_close(together, whole, atol=2e-5)


# extreme numbers


@one_direction
@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_logits_of_ten_thousand(name, is_causal, sign):
    q, k, v = (np.asarray(x) for x in random_head(16, LENGTH, LENGTH, 8, 6))
    q, k = 200 * q, sign * 200 * k
    assert np.abs(q @ k.T / np.sqrt(8)).max() > 1e4
    chex.assert_tree_all_finite(with_gradients(name, q, k, 1e4 * v, is_causal=is_causal))


@one_direction
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_number_that_is_not_one_comes_out(name, is_causal, masked):
    # A NaN in a visible token must not be taken for a row that sees nothing.
    tensors = [np.asarray(x) for x in random_head(16, 11, 11)]
    nan_in = [(2, 0)] if case_of(name).values_only else [(2, 0), (1, 0), (0, 0)]
    for which, at in nan_in:
        soiled = list(tensors)
        soiled[which] = np.where((np.arange(11) == at)[:, None], np.float32(np.nan), tensors[which])
        if masked and name in EXACT:
            out, _ = at_full_size(name, is_causal, *soiled, np.ones((11, 8), np.float32), np.arange(11) != 3)
        else:
            options = {"is_causal": True} if is_causal else {}
            options |= {"kv_mask": jnp.arange(11) != 3} if masked else {}
            out = call(name, *map(jnp.asarray, soiled), size=11, **options)
        assert np.any(np.isnan(out))
