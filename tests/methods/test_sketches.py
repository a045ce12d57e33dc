"""The oracle of Linformer's theorem, and weighted samples of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    attend,
    attention,
    bounds,
    exact,
    importance_sample,
    linformer,
    summarize_importance_sample,
    unreduced_jlt,
)
from approx_attention.core import draw_sketch
from tests.methods.case import Case
from tests.references import as_array, brute_force, compiled, random_head, random_heads

unreduced_jlt, exact, importance_sample, linformer = compiled(unreduced_jlt, exact, importance_sample, linformer)
attend, summarize_importance_sample = compiled(attend, summarize_importance_sample)
draw_sketch = jax.jit(draw_sketch, static_argnums=(1, 2, 3))


def matrix_of(sketch, num_rows):
    return jax.jit(lambda sketch: sketch @ jnp.eye(num_rows))(sketch)


CASES = {
    "unreduced_jlt": Case(changes={"sketch": "gaussian", "centred": False}),
    # Derivatives treat the odds as constants.
    "importance_sample": Case(unseen="kv", changes={"odds": "uniform"}, smooth={"odds": "uniform"}),
}


@pytest.mark.parametrize("centred", [False, True])
def test_the_oracle_is_its_formula(centred):
    q, k, v = random_head(3, 6, 12, 4, 3)
    real = np.arange(12) != 5
    sketch = draw_sketch(jax.random.key(3), "gaussian", 4, 12)
    out = unreduced_jlt(q, k, v, sketch=sketch, centred=centred, kv_mask=as_array(real, bool))
    matrix = np.asarray(matrix_of(sketch, 12), np.float64)
    weights = brute_force(q, k, np.eye(12), mask=real[None, :])[0]
    mean = np.asarray(v)[real].mean(0) * centred
    centred_v = np.where(real[:, None], np.asarray(v) - mean, 0)
    np.testing.assert_allclose(out, mean + weights @ (matrix.T @ (matrix @ centred_v)), atol=1e-5)


@pytest.mark.slow
def test_the_mean_costs_nothing_and_saves_its_error():
    q, k, v = random_head(4, 6, 32, 4, 3)
    weights = jnp.asarray(brute_force(q, k, np.eye(32))[0], jnp.float32)
    far = v + 10
    assert bounds.sketch_mse(weights, far - jnp.mean(far, axis=0, keepdims=True), 8) < 0.1 * bounds.sketch_mse(
        weights, far, 8
    )
    outs = jax.vmap(lambda key: unreduced_jlt(q, k, far, key, sketch_size=8))(jax.random.split(jax.random.key(0), 64))
    mse = np.mean(np.sum((np.asarray(outs) - brute_force(q, k, far)[0]) ** 2, axis=(1, 2)))
    assert mse < 0.1 * bounds.sketch_mse(weights, far, 8, "hadamard")


def test_any_orthogonal_sketch_of_all_rows_is_exact_and_the_same_in_front_is_not():
    q, k, v = random_head(5, 16, 16, 8)
    sketch = draw_sketch(jax.random.key(5), "hadamard", 16, 16)
    np.testing.assert_allclose(unreduced_jlt(q, k, v, sketch=sketch), exact(q, k, v), atol=1e-5)
    before, expected = linformer(q, k, v, projection_k=matrix_of(sketch, 16)), np.asarray(exact(q, k, v))
    assert np.linalg.norm(before - expected) > 0.3 * np.linalg.norm(expected)


def test_the_construction_of_the_proof_answers_every_query_alike():
    q, k, v = random_head(6, 64, 256, 16)
    expected = brute_force(q, k, v)[0]
    random = np.asarray(matrix_of(draw_sketch(jax.random.key(6), "gaussian", 64, 256), 256))

    def spread(delta):
        projections = (as_array(x * random) for x in (delta, np.exp(-delta)))
        out = np.asarray(linformer(q, k, v, **dict(zip(("projection_k", "projection_v"), projections, strict=True))))
        error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
        return np.linalg.norm(out - out.mean(0)) / np.linalg.norm(out), error

    (wide, _), (narrow, error) = spread(1e-2), spread(1e-3)
    assert narrow == pytest.approx(wide / 10, rel=0.05)
    assert narrow < 0.01
    # The error is larger than that of the mean of the values, which needs no keys.
    assert error > np.linalg.norm(np.asarray(v).mean(0) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("odds", ["uniform", "key_norm", "value_norm", "leverage"])
def test_samples_of_keys_count_for_those_passed_over(odds):
    q, k, v = map(np.asarray, random_head(8, 4, 10, 4, 3))
    sizes = np.linspace(0.2, 2, 10, dtype=np.float32)[:, None]
    k, v = k * sizes, v * sizes[::-1]
    real = np.arange(10) != 3
    keys = jax.random.split(jax.random.key(8), 20000)

    @jax.jit
    def samples(k, v):
        options = {"sample_size": 4, "odds": odds, "kv_mask": jnp.asarray(real)}
        return jax.vmap(lambda key: summarize_importance_sample(k, v, key, **options))(keys)

    small = jax.tree.map(np.asarray, samples(k, v))
    numerator = np.exp(small.k @ q.T).swapaxes(1, 2) @ small.value_sum
    whole = np.exp(q @ k.T) * real
    allowed = 5 * numerator.std(0) / np.sqrt(20000)
    assert np.all(np.abs(numerator.mean(0) - whole @ v) <= allowed)
    np.testing.assert_allclose(small.mass.sum(1).mean(), 9, rtol=0.05)
    soiled = samples(*(np.where(real[:, None], x, np.float32(np.nan)) for x in (k, v)))
    for a, b in zip(jax.tree.leaves(soiled), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_drawn_sketch_needs_no_key():
    query, key, value = random_heads(19, 1, 8, 8, 2, 1)
    sketch = draw_sketch(jax.random.key(0), "gaussian", 4, 8)
    out = np.asarray(compiled(attention)(query, key, value, method="unreduced_jlt", sketch=sketch))
    one = (as_array(np.asarray(x)[0, :, head]) for x, head in ((query, 1), (key, 0), (value, 0)))
    np.testing.assert_allclose(out[0, :, 1], unreduced_jlt(*one, sketch=sketch), atol=1e-6)
    with pytest.raises(ValueError, match="is random: pass rng"):
        attention(query, key, value, method="unreduced_jlt")


@pytest.mark.slow
def test_no_real_key_and_values_of_zero():
    q, k, v = random_head(9, 4, 10, 4, 3)
    none = jnp.zeros(10, bool)
    np.testing.assert_array_equal(importance_sample(q, k, v, jax.random.key(0), kv_mask=none), 0)
    np.testing.assert_array_equal(unreduced_jlt(q, k, v, jax.random.key(0), kv_mask=none), 0)
    out = importance_sample(q, k, 0 * v, jax.random.key(0), sample_size=5)
    np.testing.assert_array_equal(out, 0)


def test_attend_answers_from_a_sample():
    q, k, v = random_head(12, 4, 30, 4, 3)
    small = summarize_importance_sample(k, v, jax.random.key(0), sample_size=20000, odds="leverage")
    np.testing.assert_allclose(attend(q, small).out, brute_force(q, k, v, scale=1.0)[0], atol=0.15)
