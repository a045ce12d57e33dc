"""Sparse patterns against their matrices: constructors, unions and restrictions."""

import functools

import jax
import numpy as np
import pytest

from approx_attention import SparsePattern
from tests.methods.test_sparse import padded
from tests.references import causal_mask

N = 13
DISTANCE = np.arange(N)[None, :] - np.arange(N)[:, None]
BLOCKS = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], bool)


SIZES = (1, 4, 5, 20)

# One program for each shape, and patterns are padded to one; called without jit, each operation is a program.
dense_of = jax.jit(SparsePattern.to_dense)


@jax.jit
def dense_and_blocks_of(pattern):
    return pattern.to_dense(), [pattern.block_mask(size) for size in SIZES]


def support(pattern):
    return np.asarray(dense_of(pattern)) > 0


def expanded(block_map, block_size, num_tokens, num_keys):
    return np.kron(block_map, np.ones((block_size, block_size)))[:num_tokens, :num_keys] > 0


MADE = {
    "banded": (lambda: SparsePattern.banded(N, range(-2, 2)), (DISTANCE >= -2) & (DISTANCE < 2)),
    "causal banded": (
        lambda: SparsePattern.banded(N, range(-2, 2), is_causal=True),
        (DISTANCE >= -2) & (DISTANCE <= 0),
    ),
    "block diagonal": (lambda: SparsePattern.block(N, 4), expanded(np.eye(4), 4, N, N)),
    "block map": (lambda: SparsePattern.block(N, 4, BLOCKS, num_keys=15), expanded(BLOCKS, 4, N, 15)),
    "strided": (lambda: SparsePattern.strided(N, 3), DISTANCE % 3 == 0),
    "causal strided": (lambda: SparsePattern.strided(N, 3, is_causal=True), (DISTANCE % 3 == 0) & (DISTANCE <= 0)),
    "global": (
        lambda: SparsePattern.banded(N, [0]).with_global([4, 0]),
        (DISTANCE == 0) | np.isin(np.arange(N), [0, 4])[None, :] | np.isin(np.arange(N), [0, 4])[:, None],
    ),
    "global columns": (
        lambda: SparsePattern.banded(N, [0]).with_global([4], only_columns=True),
        (DISTANCE == 0) | (np.arange(N) == 4)[None, :],
    ),
}


@functools.cache
def made(name):
    make, expected = MADE[name]
    return make(), expected


@pytest.mark.parametrize("name", MADE)
def test_a_constructor_sees_what_it_says_with_equal_weights(name):
    pattern, expected = made(name)
    dense, _ = dense_and_blocks_of(padded(pattern, 15))
    np.testing.assert_allclose(dense, expected / expected.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_the_padded_form_is_canonical_and_its_blocks_are_those_that_hold_an_entry(name):
    pattern, expected = made(name)
    indices, valid = np.asarray(pattern.indices), np.asarray(pattern.valid)
    assert indices.dtype == np.int32
    assert valid.sum(1).max() == pattern.keys_per_row
    np.testing.assert_array_equal(np.sort(~valid, axis=1), ~valid)
    assert np.all((np.diff(indices, axis=1) > 0) | ~valid[:, 1:])
    assert np.all(indices[~valid] == 0)
    assert np.all(np.isneginf(np.asarray(pattern.log_weights)) == ~valid)
    for size, blocks in zip(SIZES, dense_and_blocks_of(padded(pattern, 15))[1], strict=True):
        starts = [np.arange(0, length, size) for length in expected.shape]
        held = np.logical_or.reduceat(np.logical_or.reduceat(expected, starts[0], 0), starts[1], 1)
        np.testing.assert_array_equal(blocks, held)


def test_matrix_to_pattern_and_back():
    random = np.random.default_rng(0)
    weights = np.where(random.random((9, 7)) < 0.4, random.random((9, 7)), 0)
    weights[:, 3] += 0.1
    expected = weights / weights.sum(1, keepdims=True)
    pattern = SparsePattern.from_dense(weights.astype(np.float32))
    np.testing.assert_allclose(dense_of(pattern), expected, rtol=1e-5)
    log_weights = jax.jit(SparsePattern.normalized_log_weights)(pattern)
    np.testing.assert_allclose(np.exp(log_weights).sum(1), 1, rtol=1e-6)
    ragged = [np.flatnonzero(row)[::-1] for row in weights]
    same = SparsePattern.from_indices(
        ragged, [row[keys] for row, keys in zip(weights, ragged, strict=True)], num_keys=7
    )
    np.testing.assert_allclose(dense_of(same), expected, rtol=1e-5)
    np.testing.assert_array_equal(same.indices, pattern.indices)
    least = weights[weights > 0].min()
    assert support(SparsePattern.from_dense(weights, atol=least)).sum() == (weights > 0).sum() - 1


def test_float64_weights_stay_float64(x64):
    weights = np.array([[1.0, 3.0], [1e-300, 1.0]])
    pattern = SparsePattern.from_dense(weights)
    assert pattern.log_weights.dtype == np.float64
    np.testing.assert_allclose(dense_of(pattern), weights / weights.sum(1, keepdims=True), rtol=1e-13)


def test_weights_of_bands_and_padding_by_weight_zero():
    dense = dense_of(SparsePattern.banded(4, [0, 1, -1], [2.0, 1.0, 0.0]))
    np.testing.assert_allclose(dense, [[2 / 3, 1 / 3, 0, 0], [0, 2 / 3, 1 / 3, 0], [0, 0, 2 / 3, 1 / 3], [0, 0, 0, 1]])
    padded = SparsePattern.from_indices([[0, 1], [1, 1]], [[1.0, 1.0], [1.0, 0.0]], num_keys=2)
    np.testing.assert_array_equal(dense_of(padded), [[0.5, 0.5], [0, 1]])


def test_union_keeps_the_larger_weight_and_causal_drops_the_future():
    left = SparsePattern.banded(N, [0, 1], [1.0, 4.0])
    right = SparsePattern.banded(N, [0, -1], [3.0, 2.0])
    expected = 3.0 * (DISTANCE == 0) + 4.0 * (DISTANCE == 1) + 2.0 * (DISTANCE == -1)
    for one, other in ((left, right), (right, left)):
        joined = dense_of(one.union(other))
        np.testing.assert_allclose(joined, expected / expected.sum(1, keepdims=True), rtol=1e-6)
    past = np.where(causal_mask(N, N), expected, 0)
    causal = left.union(right).causal()
    np.testing.assert_allclose(dense_of(causal), past / past.sum(1, keepdims=True), rtol=1e-6)
    assert causal.keys_per_row == 2


def test_random_patterns_are_sparse_in_rows_and_columns_and_uniform():
    make = jax.jit(functools.partial(SparsePattern.random, num_tokens=7, keys_per_row=3))
    num_draws = 2000
    draw = jax.jit(functools.partial(jax.lax.map, lambda key: make(key).to_dense() > 0))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), num_draws)))
    assert np.all(drawn.sum(1) == 3)
    assert np.all(drawn.sum(2) == 3)
    pair = drawn[:, 2, :, None] & drawn[:, 2, None, :]
    for freedom, share in ((drawn, 3 / 7), (pair[:, ~np.eye(7, dtype=bool)], 3 * 2 / (7 * 6))):
        error = np.sqrt(share * (1 - share) / num_draws)
        assert np.all(np.abs(freedom.mean(0) - share) < 4.5 * error)
    one, again = (make(jax.random.key(3)) for _ in range(2))
    np.testing.assert_array_equal(one.indices, again.indices)
    assert support(jax.jit(SparsePattern.random, static_argnums=(1, 2))(jax.random.key(3), 5, 5)).all()


def test_a_pattern_is_a_pytree_that_knows_its_number_of_keys():
    pattern = SparsePattern.block(4, 2, np.ones((2, 3), bool), num_keys=6)
    assert (pattern.num_queries, pattern.num_keys, pattern.keys_per_row) == (4, 6, 6)
    np.testing.assert_allclose(dense_of(pattern), np.full((4, 6), 1 / 6), rtol=1e-6)
    assert len(jax.tree.leaves(pattern)) == 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SparsePattern.from_dense(np.diag([1.0, 0.0, 0.0])), "none in row 1, 2"),
        (lambda: SparsePattern.from_dense(np.eye(20)[:, :10]), r"row 10, 11, 12, 13, 14, 15, 16, 17, \.\.\."),
        (lambda: SparsePattern.from_dense(np.array([[1.0, -1.0]])), "not negative"),
        (lambda: SparsePattern.from_dense(np.array([[1.0, np.nan]])), "NaN"),
        (lambda: SparsePattern.from_dense(np.array([[1.0, np.inf]])), "finite"),
        (lambda: SparsePattern.from_dense(np.ones(3)), "shape"),
        (lambda: SparsePattern.from_dense(np.eye(3), -1.0), "atol must be finite and not negative, got -1"),
        (lambda: SparsePattern.from_indices([[0], [2]], num_keys=2), "got 2 in row 1"),
        (lambda: SparsePattern.from_indices([[0], [-1]], num_keys=2), "got -1 in row 1"),
        (lambda: SparsePattern.from_indices([[0], [1, 1]], num_keys=2), "duplicates in row 1"),
        (lambda: SparsePattern.from_indices([[0], []], num_keys=2), "none in row 1"),
        (
            lambda: SparsePattern.from_indices([[0]], [[1.0, 2.0]], num_keys=2),
            "got 2 in 1 rows for 1 in 1 rows",
        ),
        (lambda: SparsePattern.from_indices([[0]], [[-1.0]], num_keys=2), "not negative"),
        (lambda: SparsePattern.from_indices([0, 1], num_keys=2), r"per row, got 2 rows with \[0\] axes"),
        (lambda: SparsePattern.from_indices([[0]], num_keys=0), "num_keys must be at least 1"),
        (lambda: SparsePattern.banded(4, [1]), "none in row 3"),
        (lambda: SparsePattern.banded(4, [0, 0]), "duplicates"),
        (lambda: SparsePattern.banded(4, [0], [1.0, 2.0]), "one for each of 1 offsets"),
        (lambda: SparsePattern.block(4, 2, np.ones((2, 3), bool)), "block_map must be boolean"),
        (lambda: SparsePattern.strided(4, 0), "stride must be at least 1"),
        (lambda: SparsePattern.random(jax.random.key(0), 3, 4), "at most num_tokens = 3"),
        (lambda: SparsePattern.banded(4, [0]).union(SparsePattern.banded(5, [0])), "equal shape"),
        (lambda: SparsePattern.banded(4, [0]).with_global([4]), r"must lie in \[0, 4\)"),
        (lambda: SparsePattern.banded(4, [1, -3]).causal(), "none in row 0, 1, 2"),
    ],
)
def test_what_is_no_pattern_is_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_keys_must_be_integers():
    for make in (
        lambda: SparsePattern.from_indices([[0.5]], num_keys=2),
        lambda: SparsePattern.banded(4, [0.7]),
        lambda: SparsePattern.banded(4, [0]).with_global([0.5]),
    ):
        with pytest.raises(TypeError, match="must be integers"):
            make()
    nothing = SparsePattern.banded(4, [0]).with_global([])
    np.testing.assert_array_equal(dense_of(nothing), np.eye(4))
