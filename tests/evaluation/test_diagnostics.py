"""Measured errors, the search for the worst query, and interleaved timing."""

import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import WeightedKV, attend, summarize_mean_pool, summarize_uniform_sample
from approx_attention.evaluation import Arm, compare, output_error, skill, sup_error, time_interleaved
from tests.references import as_array, brute_force, compiled, random_head, random_heads


def test_output_error_of_known_differences():
    exact = np.array([[[3.0, 4.0], [0.0, 5.0]]], np.float32)
    errors = jax.jit(output_error)
    error = errors(exact + np.array([[[0, 0], [3, 0]]], np.float32), exact)
    assert float(error.relative) == pytest.approx(3 / np.sqrt(50))
    assert float(error.worst_row) == pytest.approx(3 / 5)
    assert errors(exact, exact) == (0, 0)
    with pytest.raises(ValueError, match=r"got \(1, 2, 2\) and \(2, 2\)"):
        inspect.unwrap(output_error)(exact, exact[0])


def test_small_errors_of_float64_outputs_are_not_rounding(x64):
    exact = np.random.default_rng(0).normal(size=(4, 3))
    error = jax.jit(output_error)(exact * (1 + 1e-12), exact)
    assert error.relative.dtype == jnp.float64
    assert float(error.relative) == pytest.approx(1e-12, rel=1e-2)


def test_skill_is_a_share_of_the_error_of_the_trivial_answer():
    exact, mean = as_array([[1.0], [3.0]]), as_array([[2.0]])
    shares = jax.jit(skill)
    assert float(shares(np.full((2, 1), 2, np.float32), exact, mean)) == pytest.approx(1)
    assert float(shares(as_array([[1.0], [2.0]], jnp.bfloat16), exact, mean)) == pytest.approx(np.sqrt(0.5))
    assert float(shares(exact, exact, mean)) == 0
    with pytest.raises(ValueError, match=r"one shape, got \(1, 1\) and \(2, 1\)"):
        skill(mean, exact, mean)


def test_sup_error_of_an_exact_summary_is_zero():
    _, k, v = random_head(0, 1, 60, 4)
    assert float(sup_error(k, v, WeightedKV(k, v, as_array(np.ones(60))), 3.0).error) < 1e-6


def test_sup_error_is_reached_by_its_query_inside_the_ball():
    _, k, v = random_head(1, 1, 300, 6)
    summary = compiled(summarize_uniform_sample)(k, v, jax.random.key(0), sample_size=60)
    found = sup_error(k, v, summary, 2.0)
    query = np.asarray(found.query)[None]
    assert np.linalg.norm(query) <= 2.0 + 1e-5
    difference = np.asarray(jax.jit(attend)(query, summary).out) - brute_force(query, k, v, scale=1)[0]
    largest = np.linalg.norm(v, axis=-1).max()
    assert float(found.error) == pytest.approx(np.linalg.norm(difference) / largest, rel=1e-3)


def test_sup_error_beats_random_queries_and_has_converged():
    _, k, v = random_head(2, 1, 300, 6)
    summary = compiled(summarize_uniform_sample)(k, v, jax.random.key(0), sample_size=60)
    found = float(sup_error(k, v, summary, 3.0).error)
    directions = np.random.default_rng(0).normal(size=(20_000, 6))
    queries = as_array(3 * directions / np.linalg.norm(directions, axis=1, keepdims=True))
    truth = brute_force(queries, k, v, scale=1)[0]
    largest = np.linalg.norm(v, axis=-1).max()
    best_random = np.linalg.norm(np.asarray(compiled(attend)(queries, summary).out) - truth, axis=1).max() / largest
    assert found >= best_random * 0.999
    harder = float(sup_error(k, v, summary, 3.0, num_starts=96, num_steps=240, key=jax.random.key(1)).error)
    assert harder == pytest.approx(found, rel=0.02)


def test_equal_weights_fail_on_the_two_point_instance():
    # One key against N opposite ones, with weights of e^{2 rho}: a subset without masses is wrong at q = rho u.
    rho, dim = 2.0, 3
    count = round(np.exp(2 * rho))
    u = np.eye(dim)[0]
    k = np.vstack([u, -np.tile(u, (count, 1))])

    def error(mass):
        """With the first tokens, of these masses."""
        summary = WeightedKV(*map(as_array, (k[:8], np.array(mass)[:, None] * k[:8], mass)))
        return float(sup_error(as_array(k), as_array(k), summary, rho).error)

    assert error(np.ones(8)) > 0.7
    assert error([1.0, count, 0, 0, 0, 0, 0, 0]) < 1e-5


def test_sup_error_ignores_padding_and_grows_with_the_ball():
    _, k, v = random_head(3, 1, 40, 4)
    kv_mask = jax.device_put(np.arange(40) < 30)
    summary = compiled(summarize_mean_pool)(k, v, num_landmarks=8, kv_mask=kv_mask)
    clean = sup_error(k, v, summary, 1.0, kv_mask=kv_mask)
    noise = (as_array(np.where(np.arange(40)[:, None] < 30, x, np.nan)) for x in (k, v))
    soiled = sup_error(*noise, summary, 1.0, kv_mask=kv_mask)
    np.testing.assert_array_equal(clean.error, soiled.error)
    assert float(sup_error(k, v, summary, 3.0, kv_mask=kv_mask).error) > float(clean.error)


def test_time_is_that_of_the_call():
    timings = time_interleaved({"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.001)}, rounds=3)
    assert timings["long"].least >= 0.02 > timings["short"].least >= 0.001
    assert timings["long"].median >= timings["long"].least


def test_compare_needs_an_exact_arm():
    tensors = random_heads(0, 1, 4, 4, 1, 1)
    arm = Arm("mine", lambda query, key, value, rng: (value, None))
    with pytest.raises(ValueError, match="needs an exact configuration"):
        compare([arm], *tensors, exact=arm, window=arm)


def test_compare_averages_over_seeds():
    tensors = random_heads(1, 1, 6, 6, 1, 1)

    def noisy(query, key, value, rng):
        return value + jax.random.normal(rng, value.shape), jnp.zeros(value.shape[:-1])

    exact = Arm("exact", lambda query, key, value, rng: (value, jnp.zeros(value.shape[:-1])), is_exact=True)
    zero = Arm("zero", lambda query, key, value, rng: (0 * value, jnp.zeros(value.shape[:-1])))
    rows = compare(
        [exact, Arm("noisy", noisy, is_random=True)], *tensors, exact=exact, window=zero, num_seeds=4, seed=5
    )
    drawn = jax.jit(jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), tensors[2].shape)))(np.arange(5, 9))
    errors = [np.linalg.norm(x) / np.linalg.norm(tensors[2]) for x in np.asarray(drawn)]
    assert rows[1].num_seeds == 4
    assert rows[1].relative_error == pytest.approx(np.mean(errors), rel=1e-5)
    assert rows[1].relative_error_std == pytest.approx(np.std(errors), rel=1e-4)
    assert rows[1].far_error == pytest.approx(np.mean(errors), rel=1e-5)
    assert rows[0].relative_error == 0
    assert rows[0].normalizer_error == 0
