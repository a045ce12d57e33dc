"""Sketches and their closed forms, weighted samples of rows, and the low-rank bottleneck."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.random_projection import johnson_lindenstrauss_min_dim

from approx_attention import bounds, importance_sample, unreduced_jlt
from approx_attention.core import SKETCHES, RowSample, back, draw_sketch, leverages
from approx_attention.core.sketches import hadamard_transform
from approx_attention.evaluation import spectrum
from approx_attention.realization import needed_head_dim, realize_attention
from tests.references import as_array, brute_force, compiled, random_head

needed_head_dim, realize_attention = compiled(needed_head_dim, realize_attention)
hadamard_transform, leverages, spectrum = compiled(hadamard_transform, leverages, spectrum)
sketch_mse, row_sample_mse = compiled(bounds.sketch_mse, bounds.row_sample_mse)

KINDS = list(SKETCHES)


@functools.cache
def matrices(kind, size, num_rows, count):
    """Sampled sketches as matrices ``[count, M, n]``."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: draw_sketch(key, kind, size, num_rows) @ jnp.eye(num_rows)))(keys))


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_gram_matrix_is_the_identity(kind):
    drawn = matrices(kind, 4, 12, 30000)
    gram = np.einsum("cmi,cmj->cij", drawn, drawn)
    allowed = 5 * gram.std(0) / np.sqrt(30000) + 1e-6
    assert np.all(np.abs(gram.mean(0) - np.eye(12)) <= allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_are_linear_and_have_their_transpose(kind):
    x, y = (np.asarray(x) for x in random_head(0, 12, 8, 3)[:2])

    @jax.jit
    def products(key, x, y):
        sketch = draw_sketch(key, kind, 8, 12)
        return sketch @ jnp.eye(12), sketch @ x, sketch @ x[:, 0], back(sketch, y)

    matrix, of_x, of_column, of_y = map(np.asarray, products(jax.random.key(1), x, y))
    assert matrix.shape == (8, 12)
    np.testing.assert_allclose(of_x, matrix @ x, atol=1e-6)
    np.testing.assert_allclose(of_column, matrix @ x[:, 0], atol=1e-6)
    np.testing.assert_allclose(of_y, matrix.T @ y, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_full(kind):
    def applied(*tensors):
        sketch = draw_sketch(jax.random.key(2), kind, 8, 1000)
        return [sketch @ x for x in tensors]

    x = random_head(18, 1000, 1, 2, dtype=jnp.bfloat16)[0]
    found, expected = jax.jit(applied)(x, np.asarray(x, np.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0.005, atol=1e-6)
    with pytest.raises(ValueError, match="the sketch applies to 1000 rows, got shape"):
        jax.eval_shape(applied, jax.ShapeDtypeStruct((1, 2), jnp.bfloat16))
    with pytest.raises(TypeError, match="floating-point"):
        jax.eval_shape(applied, jax.ShapeDtypeStruct((1000,), jnp.int32))


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


# Of the kinds only "hadamard" depends on whether the number of rows is a power of two.
@pytest.mark.parametrize(("kind", "num_keys"), [*((kind, 12) for kind in KINDS), ("hadamard", 16)])
def test_the_mean_squared_error_is_the_closed_form(kind, num_keys):
    q, k, v = (np.asarray(x, np.float64) for x in random_head(2, 6, num_keys, 4, 3))
    weights = brute_force(q, k, np.eye(num_keys))[0]
    drawn = matrices(kind, 4, num_keys, 30000)
    errors = np.einsum("tj,cmj,cmi,iv->ctv", weights, drawn, drawn, v, optimize=True) - weights @ v
    expected = float(sketch_mse(*map(as_array, (weights, v)), 4, kind))
    assert (errors**2).sum((1, 2)).mean() == pytest.approx(expected, rel=0.03)
    assert np.abs(errors.mean(0)).max() < 5 * errors.std(0).max() / np.sqrt(30000)


def test_the_size_of_johnson_and_lindenstrauss():
    for points, error in ((512, 0.5), (100, 0.1)):
        asked = bounds.johnson_lindenstrauss_size(points, error)
        assert int(asked) == johnson_lindenstrauss_min_dim(points, eps=error)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        bounds.johnson_lindenstrauss_size(10, 1.0)


def test_norms_grow_as_rarely_as_promised():
    # The tail bound of the lemma that Linformer cites, at error 1/2 and 64 rows.
    x = random_head(7, 1, 1, 32)[0][0]
    norms = np.linalg.norm(matrices("gaussian", 64, 32, 2000) @ np.asarray(x), axis=1) / np.linalg.norm(x)
    assert (norms <= 1.5).mean() >= 1 - np.exp(-(0.5**2 - 0.5**3) * 64 / 4)


def test_the_best_odds_are_those_of_the_norms_of_columns_and_values():
    q, k, v = random_head(10, 6, 12, 4, 3, spread=1.5)
    weights = brute_force(q, k, np.eye(12))[0]
    weights32 = as_array(weights)
    size = np.linalg.norm(weights, axis=0) * np.linalg.norm(v, axis=1)
    out = weights @ np.asarray(v)

    @jax.jit
    def drawn(keys, log_odds):
        return jax.vmap(lambda key: RowSample.with_odds(key, 4, log_odds))(keys)

    def mse(odds):
        keys = jax.random.split(jax.random.key(10), 20000)
        sample = drawn(keys, np.log(odds).astype(np.float32))
        chosen, weight = np.asarray(sample.chosen), np.asarray(sample.weight)
        errors = np.einsum("tcm,cmv->ctv", weights[:, chosen] * weight**2, np.asarray(v)[chosen]) - out
        return np.sum(errors**2, axis=(1, 2)).mean()

    best, uniform = mse(size), mse(np.ones(12))
    assert best == pytest.approx((size.sum() ** 2 - (out**2).sum()) / 4, rel=0.03)
    assert best < uniform
    for found, odds in ((best, size), (uniform, np.ones(12))):
        assert found == pytest.approx(float(row_sample_mse(weights32, v, 4, as_array(np.log(odds)))), rel=0.03)


def test_leverages_against_their_formula():
    k = np.asarray(random_head(11, 1, 20, 4)[1], np.float64)
    level = 1e-2 * np.trace(k.T @ k) / 4
    expected = np.diag(k @ np.linalg.inv(k.T @ k + level * np.eye(4)) @ k.T)
    found = np.asarray(leverages(as_array(k)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.sum() < 4
    nothing = as_array(np.zeros((20, 4)))
    np.testing.assert_array_equal(leverages(nothing), 0)
    for ridge in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match="ridge must be"):
            leverages(nothing, ridge=ridge)


def weights_of(q, k, scale=1.0):
    """The matrix of weights, by brute force."""
    return brute_force(q, k, np.eye(len(k)), scale=scale)[0]


@pytest.mark.parametrize("num_queries", [8, 5, 11])
def test_all_weights_are_realised_with_one_channel_less_than_keys(num_queries):
    left, right = random_head(13, num_queries, 8, 8)[0], random_head(14, 8, 8, 8)[0]
    weights = as_array(weights_of(left, right, 2.0))
    q, k = realize_attention(weights)
    enough = min(num_queries, 7)
    assert q.shape == (num_queries, enough)
    np.testing.assert_allclose(weights_of(q, k, None), weights, atol=2e-5)
    assert int(needed_head_dim(weights)) == enough
    q, k = realize_attention(weights, enough - 1)
    assert np.abs(weights_of(q, k, None) - weights).max() > 1e-3
    q, k = realize_attention(weights, 12)
    assert q.shape == (num_queries, 12)
    np.testing.assert_allclose(weights_of(q, k, None), weights, atol=2e-5)


def test_a_head_of_few_channels_has_weights_of_full_rank():
    q, k, _ = random_head(15, 64, 64, 2, spread=1.2)
    weights = weights_of(q, k)
    assert int(needed_head_dim(as_array(weights), tolerance=1e-4)) == 2
    assert np.linalg.matrix_rank(weights, tol=1e-4) > 10


def test_uniform_weights_need_nothing():
    weights = as_array(np.full((4, 6), 1 / 6))
    assert int(needed_head_dim(weights)) == 0
    q, k = map(np.asarray, realize_attention(weights))
    np.testing.assert_allclose(q @ k.T, 0, atol=1e-5)
    with pytest.raises(ValueError, match=r"weights must be \[T, S\]"):
        needed_head_dim(as_array(np.ones(3)))


def test_no_head_has_weights_of_zero():
    weights = as_array(np.eye(4))
    assert int(needed_head_dim(weights)) == -1
    assert all(np.isnan(x).all() for x in realize_attention(weights))


def test_the_spectrum_of_attention():
    q, k, _ = random_head(16, 10, 12, 4)
    real, k = np.arange(12) < 9, np.asarray(k)
    weights = brute_force(q, k[:9], np.eye(9))[0]
    soiled = np.where(real[:, None], k, np.float32(np.nan))
    found = jax.tree.map(np.asarray, spectrum(q, as_array(soiled), kv_mask=as_array(real, bool)))
    for shares, matrix in ((found.weights, weights), (found.centred, weights - 1 / 9)):
        sizes = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(shares[:9], np.cumsum(sizes) / sizes.sum(), atol=1e-5)
        np.testing.assert_allclose(shares[9:], 1, atol=1e-5)


def test_what_is_wrong_is_said():
    q, k, v = random_head(17, 4, 10, 4, 3)
    with pytest.raises(ValueError, match="sketch must be one of .*; got 'gausian'; did you mean 'gaussian'"):
        unreduced_jlt(q, k, v, jax.random.key(0), sketch="gausian")
    with pytest.raises(ValueError, match="sketch must have S = 10 rows, got 8"):
        jax.eval_shape(lambda key: unreduced_jlt(q, k, v, sketch=draw_sketch(key, "count", 4, 8)), jax.random.key(0))
    with pytest.raises(ValueError, match="multiple of the 4 entries per row, got 6"):
        draw_sketch(jax.random.key(0), "sparse_jl", 6, 10)
    with pytest.raises(ValueError, match="at most 16, the next power of two from S, got 17"):
        draw_sketch(jax.random.key(0), "hadamard", 17, 10)
    with pytest.raises(ValueError, match="at most S = 10 rows, got 11"):
        draw_sketch(jax.random.key(0), "uniform_rows", 11, 10)
    with pytest.raises(ValueError, match="random: pass a key"):
        importance_sample(q, k, v)
    with pytest.raises(ValueError, match="weights must be .* with S = 10"):
        bounds.sketch_mse(as_array(np.ones((4, 9))), v, 4)
