"""Sketches, the oracle of Linformer's theorem and its closed forms, samples of keys, and the low-rank bottleneck."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.random_projection import johnson_lindenstrauss_min_dim

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
from approx_attention.core import SKETCHES, RowSample, back, draw_sketch, leverages
from approx_attention.core.sketches import hadamard_transform
from approx_attention.evaluation import spectrum
from approx_attention.realization import needed_head_dim, realize_attention
from tests.references import brute_force, compiled, random_head, random_heads

exact, importance_sample, linformer, unreduced_jlt = compiled(exact, importance_sample, linformer, unreduced_jlt)
back, draw_sketch, needed_head_dim, realize_attention = compiled(back, draw_sketch, needed_head_dim, realize_attention)

KINDS = list(SKETCHES)


def matrices(kind, size, num_rows, count):
    """Drawn sketches as matrices ``[count, M, n]``."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: draw_sketch(key, kind, size, num_rows) @ jnp.eye(num_rows)))(keys))


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_gram_matrix_is_the_identity(kind):
    drawn = matrices(kind, 4, 10, 4000)
    gram = np.einsum("cmi,cmj->cij", drawn, drawn)
    allowed = 5 * gram.std(0) / np.sqrt(4000) + 1e-6
    assert np.all(np.abs(gram.mean(0) - np.eye(10)) <= allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_are_linear_and_have_their_transpose(kind):
    sketch = draw_sketch(jax.random.key(1), kind, 8, 12)
    matrix = np.asarray(sketch @ jnp.eye(12))
    x, y = random_head(0, 12, 8, 3)[:2]
    assert matrix.shape == (8, 12)
    np.testing.assert_allclose(sketch @ x, matrix @ np.asarray(x), atol=1e-6)
    np.testing.assert_allclose(sketch @ x[:, 0], matrix @ np.asarray(x[:, 0]), atol=1e-6)
    np.testing.assert_allclose(back(sketch, y), matrix.T @ np.asarray(y), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_full(kind):
    sketch = draw_sketch(jax.random.key(2), kind, 8, 1000)
    x = random_head(18, 1000, 1, 2, dtype=jnp.bfloat16)[0]
    expected = np.asarray(sketch @ x.astype(jnp.float32))
    found = sketch @ x
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0.005, atol=1e-6)
    with pytest.raises(ValueError, match="the sketch is of 1000 rows, got shape"):
        sketch @ x[:1]
    with pytest.raises(TypeError, match="floating-point"):
        sketch @ jnp.arange(1000)


def test_the_entries_are_those_of_their_kind():
    signs, thirds = matrices("rademacher", 4, 9, 1)[0], matrices("achlioptas", 4, 3000, 1)[0]
    np.testing.assert_allclose(np.abs(signs), 0.5)
    np.testing.assert_allclose(np.unique(np.abs(thirds)), [0, np.sqrt(3 / 4)], atol=1e-6)
    assert abs((thirds != 0).mean() - 1 / 3) < 0.03
    assert np.all((matrices("count", 4, 9, 1)[0] != 0).sum(0) == 1)
    sparse = matrices("sparse_jl", 8, 9, 1)[0]
    assert np.all((sparse.reshape(4, 2, 9) != 0).sum(1) == 1)
    rows = matrices("uniform_rows", 4, 9, 1)[0]
    assert np.all((rows != 0).sum(1) == 1)
    assert np.all((rows != 0).sum(0) <= 1)


def test_the_hadamard_transform_against_its_matrix():
    matrix = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * 4)
    x = random_head(1, 16, 1, 3)[0]
    np.testing.assert_allclose(hadamard_transform(x), matrix @ np.asarray(x), atol=1e-5)
    with pytest.raises(ValueError, match="power of two, got 12"):
        hadamard_transform(x[:12])


def test_all_rows_of_the_transform_are_orthogonal():
    whole = matrices("hadamard", 16, 16, 3)
    np.testing.assert_allclose(np.einsum("cmi,cmj->cij", whole, whole), np.tile(np.eye(16), (3, 1, 1)), atol=1e-5)
    padded = matrices("hadamard", 12, 12, 1)[0]
    assert np.abs(padded.T @ padded - np.eye(12)).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_keys", [16, 12])
def test_the_mean_squared_error_is_the_closed_form(kind, num_keys):
    q, k, v = (np.asarray(x, np.float64) for x in random_head(2, 6, num_keys, 4, 3))
    weights = brute_force(q, k, np.eye(num_keys))[0]
    drawn = matrices(kind, 4, num_keys, 30000)
    errors = np.einsum("tj,cmj,cmi,iv->ctv", weights, drawn, drawn, v, optimize=True) - weights @ v
    expected = float(bounds.sketch_mse(*(jnp.asarray(x, jnp.float32) for x in (weights, v)), 4, kind))
    assert (errors**2).sum((1, 2)).mean() == pytest.approx(expected, rel=0.03)
    assert np.abs(errors.mean(0)).max() < 5 * errors.std(0).max() / np.sqrt(30000)


@pytest.mark.parametrize("centred", [False, True])
def test_the_oracle_is_its_formula(centred):
    q, k, v = random_head(3, 6, 12, 4, 3)
    real = jnp.arange(12) != 5
    sketch = draw_sketch(jax.random.key(3), "gaussian", 4, 12)
    out = unreduced_jlt(q, k, v, sketch=sketch, centred=centred, kv_mask=real)
    matrix = np.asarray(sketch @ jnp.eye(12), np.float64)
    weights = brute_force(q, k, np.eye(12), mask=np.asarray(real)[None, :])[0]
    mean = np.asarray(v)[np.asarray(real)].mean(0) * centred
    centred_v = np.where(np.asarray(real)[:, None], np.asarray(v) - mean, 0)
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
    before = linformer(q, k, v, projection_k=sketch @ jnp.eye(16))
    assert jnp.linalg.norm(before - exact(q, k, v)) > 0.3 * jnp.linalg.norm(exact(q, k, v))


def test_the_construction_of_the_proof_answers_every_query_alike():
    q, k, v = random_head(6, 64, 256, 16)
    expected = brute_force(q, k, v)[0]
    random = draw_sketch(jax.random.key(6), "gaussian", 64, 256) @ jnp.eye(256)

    def spread(delta):
        out = np.asarray(linformer(q, k, v, projection_k=delta * random, projection_v=random * float(np.exp(-delta))))
        error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
        return np.linalg.norm(out - out.mean(0)) / np.linalg.norm(out), error

    (wide, _), (narrow, error) = spread(1e-2), spread(1e-3)
    assert narrow == pytest.approx(wide / 10, rel=0.05)
    assert narrow < 0.01
    # It is further from attention than the mean of the values, which asks for nothing.
    assert error > np.linalg.norm(np.asarray(v).mean(0) - expected) / np.linalg.norm(expected)


def test_the_size_of_johnson_and_lindenstrauss():
    for points, error in ((512, 0.5), (100, 0.1)):
        asked = bounds.johnson_lindenstrauss_size(points, error)
        assert int(asked) == johnson_lindenstrauss_min_dim(points, eps=error)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        bounds.johnson_lindenstrauss_size(10, 1.0)


def test_norms_grow_as_rarely_as_promised():
    # The tail of the lemma that Linformer quotes, at error 1/2 and 64 rows.
    x = random_head(7, 1, 1, 32)[0][0]
    norms = np.linalg.norm(matrices("gaussian", 64, 32, 2000) @ np.asarray(x), axis=1) / np.linalg.norm(x)
    assert (norms <= 1.5).mean() >= 1 - np.exp(-(0.5**2 - 0.5**3) * 64 / 4)


@pytest.mark.parametrize("odds", ["uniform", "key_norm", "value_norm", "leverage"])
def test_samples_of_keys_count_for_those_passed_over(odds):
    q, k, v = random_head(8, 4, 10, 4, 3)
    k, v = (x * jnp.asarray(np.linspace(0.2, 2, 10)[::step, None], jnp.float32) for x, step in ((k, 1), (v, -1)))
    real = jnp.arange(10) != 3
    options = {"sample_size": 4, "odds": odds, "kv_mask": real}
    keys = jax.random.split(jax.random.key(8), 20000)
    small = jax.jit(jax.vmap(lambda key: summarize_importance_sample(k, v, key, **options)))(keys)
    numerator = jnp.einsum("cmt,cmv->ctv", jnp.exp(small.k @ q.T), small.value_sum)
    whole = np.exp(q @ k.T) * np.asarray(real)
    allowed = 5 * np.asarray(numerator.std(0)) / np.sqrt(20000)
    assert np.all(np.abs(np.asarray(numerator.mean(0)) - whole @ np.asarray(v)) <= allowed)
    np.testing.assert_allclose(small.mass.sum(1).mean(), 9, rtol=0.05)
    one = summarize_importance_sample(*_soiled(k, v, real), keys[0], **options)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-6)


def _soiled(k, v, real):
    return (jnp.where(real[:, None], x, jnp.nan) for x in (k, v))


def test_a_drawn_sketch_needs_no_key():
    query, key, value = random_heads(19, 1, 8, 8, 2, 1)
    sketch = draw_sketch(jax.random.key(0), "gaussian", 4, 8)
    out = attention(query, key, value, method="unreduced_jlt", sketch=sketch)
    np.testing.assert_allclose(
        out[0, :, 1], unreduced_jlt(query[0, :, 1], key[0, :, 0], value[0, :, 0], sketch=sketch), atol=1e-6
    )
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


def test_the_best_odds_are_those_of_the_norms_of_columns_and_values():
    q, k, v = random_head(10, 6, 12, 4, 3, spread=1.5)
    weights = brute_force(q, k, np.eye(12))[0]
    weights32 = jnp.asarray(weights, jnp.float32)
    size = np.linalg.norm(weights, axis=0) * np.linalg.norm(v, axis=1)
    out = weights @ np.asarray(v)

    def mse(odds):
        keys = jax.random.split(jax.random.key(10), 20000)
        sample = jax.vmap(lambda key: RowSample.with_odds(key, 4, jnp.log(jnp.asarray(odds, jnp.float32))))(keys)
        columns = jnp.asarray(weights, jnp.float32)[:, sample.chosen] * (sample.weight**2)[None]
        errors = np.einsum("tcm,cmv->ctv", columns, v[sample.chosen]) - out
        return np.sum(errors**2, axis=(1, 2)).mean()

    best, uniform = mse(size), mse(np.ones(12))
    assert best == pytest.approx((size.sum() ** 2 - (out**2).sum()) / 4, rel=0.03)
    assert best < uniform
    for found, odds in ((best, size), (uniform, np.ones(12))):
        log_odds = jnp.log(jnp.asarray(odds, jnp.float32))
        assert found == pytest.approx(float(bounds.row_sample_mse(weights32, v, 4, log_odds)), rel=0.03)


def test_leverages_against_their_formula():
    k = np.asarray(random_head(11, 1, 20, 4)[1], np.float64)
    level = 1e-2 * np.trace(k.T @ k) / 4
    expected = np.diag(k @ np.linalg.inv(k.T @ k + level * np.eye(4)) @ k.T)
    found = leverages(jnp.asarray(k, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.sum() < 4
    np.testing.assert_array_equal(leverages(jnp.zeros((5, 3))), 0)


def test_attend_answers_from_a_sample():
    q, k, v = random_head(12, 4, 30, 4, 3)
    small = summarize_importance_sample(k, v, jax.random.key(0), sample_size=20000, odds="leverage")
    np.testing.assert_allclose(attend(q, small).out, brute_force(q, k, v, scale=1.0)[0], atol=0.15)


@pytest.mark.parametrize("num_queries", [8, 5, 11])
def test_all_weights_are_realised_with_one_channel_less_than_keys(num_queries):
    weights = jax.nn.softmax(2 * random_head(13, num_queries, 8, 8)[0] @ random_head(14, 8, 8, 8)[0].T)
    q, k = realize_attention(weights)
    enough = min(num_queries, 7)
    assert q.shape == (num_queries, enough)
    np.testing.assert_allclose(exact(q, k, jnp.eye(8)), weights, atol=2e-5)
    assert int(needed_head_dim(weights)) == enough
    q, k = realize_attention(weights, enough - 1)
    assert jnp.abs(exact(q, k, jnp.eye(8)) - weights).max() > 1e-3
    q, k = realize_attention(weights, 12)
    assert q.shape == (num_queries, 12)
    np.testing.assert_allclose(exact(q, k, jnp.eye(8)), weights, atol=2e-5)


def test_a_head_of_few_channels_has_weights_of_full_rank():
    q, k, _ = random_head(15, 64, 64, 2, spread=1.2)
    weights = jax.nn.softmax(q @ k.T)
    assert int(needed_head_dim(weights, tolerance=1e-4)) == 2
    assert np.linalg.matrix_rank(np.asarray(weights), tol=1e-4) > 10


def test_uniform_weights_need_nothing():
    assert int(needed_head_dim(jnp.full((4, 6), 1 / 6))) == 0
    q, k = realize_attention(jnp.full((4, 6), 1 / 6))
    np.testing.assert_allclose(q @ k.T, 0, atol=1e-5)
    with pytest.raises(ValueError, match=r"weights must be \[T, S\]"):
        needed_head_dim(jnp.ones(3))


def test_no_head_has_weights_of_zero():
    weights = jnp.eye(4)
    assert int(needed_head_dim(weights)) == -1
    assert all(jnp.isnan(x).all() for x in realize_attention(weights))


def test_the_spectrum_of_attention():
    q, k, _ = random_head(16, 10, 12, 4)
    real = jnp.arange(12) < 9
    weights = brute_force(q, k[:9], np.eye(9))[0]
    found = spectrum(q, jnp.where(real[:, None], k, jnp.nan), kv_mask=real)
    for shares, matrix in ((found.weights, weights), (found.centred, weights - 1 / 9)):
        sizes = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(shares[:9], np.cumsum(sizes) / sizes.sum(), atol=1e-5)
        np.testing.assert_allclose(shares[9:], 1, atol=1e-5)


def test_what_is_wrong_is_said():
    q, k, v = random_head(17, 4, 10, 4, 3)
    with pytest.raises(ValueError, match="sketch must be one of .*; got 'gausian'; did you mean 'gaussian'"):
        unreduced_jlt(q, k, v, jax.random.key(0), sketch="gausian")
    with pytest.raises(ValueError, match="sketch must be of S = 10 rows, got one of 8"):
        unreduced_jlt(q, k, v, sketch=draw_sketch(jax.random.key(0), "count", 4, 8))
    with pytest.raises(ValueError, match="multiple of the 4 entries per row, got 6"):
        draw_sketch(jax.random.key(0), "sparse_jl", 6, 10)
    with pytest.raises(ValueError, match="at most 16, the power of two from S on, got 17"):
        draw_sketch(jax.random.key(0), "hadamard", 17, 10)
    with pytest.raises(ValueError, match="at most S = 10 rows, got 11"):
        draw_sketch(jax.random.key(0), "uniform_rows", 11, 10)
    with pytest.raises(ValueError, match="random: pass a key"):
        importance_sample(q, k, v)
    with pytest.raises(ValueError, match="weights must be .* with S = 10"):
        bounds.sketch_mse(jnp.ones((4, 9)), v, 4)
