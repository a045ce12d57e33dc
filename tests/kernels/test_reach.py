"""Blocks that a reach visits, against the pairs that it allows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.kernels.reach import Reach
from tests.kernels.cases import seen_pairs

pytestmark = pytest.mark.all_forms

SIZES = [(1, 1), (2, 3), (3, 2), (4, 4), (5, 1), (3, 7)]
REACHES = [
    Reach(offset, left, right)
    for offset in (-13, -4, 0, 1, 9)
    for left in (None, 0, 1, 6, 40, -2)
    for right in (None, 0, 2, 11, -3)
    if left is None or right is None or left + right >= 0
]
BLOCKS, KEY_BLOCKS = 4, 5


def first_and_end(seen_blocks):
    """For every row of blocks, the first visible block and the one after the last, or None."""
    rows = [np.flatnonzero(row) for row in seen_blocks]
    return [(row[0], row[-1] + 1) if len(row) else None for row in rows]


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_visited_blocks_are_those_with_a_pair_that_is_seen(rows, columns):
    for reach in REACHES:
        pairs = seen_pairs(BLOCKS * rows, KEY_BLOCKS * columns, *reach)
        np.testing.assert_array_equal(
            reach.seen(np.arange(BLOCKS * rows)[:, None], np.arange(KEY_BLOCKS * columns)[None, :])
            | np.zeros_like(pairs),
            pairs,
        )
        tiles = pairs.reshape(BLOCKS, rows, KEY_BLOCKS, columns).transpose(0, 2, 1, 3)
        expected = first_and_end(tiles.any((2, 3)))
        spans = [(reach.first(i, rows, columns), reach.end(i, rows, columns, KEY_BLOCKS)) for i in range(BLOCKS)]
        for (first, end), span in zip(spans, expected, strict=True):
            assert end <= first if span is None else (first, end) == span, (reach, spans, expected)
        most = max(0 if span is None else span[1] - span[0] for span in expected)
        assert max(reach.most_blocks(BLOCKS, rows, columns, KEY_BLOCKS), 0) == most
        for i, j in itertools.product(range(BLOCKS), range(KEY_BLOCKS)):
            assert reach.is_whole(i, j, rows, columns) == tiles[i, j].all()
        assert reach.is_full == (reach.left is reach.right is None)


@pytest.mark.parametrize(("rows", "columns"), SIZES[1:2])
def test_traced_numbers_of_blocks_give_the_same(rows, columns):
    """One program serves all reaches."""

    @jax.jit
    def traced(i, j):
        blocks = lambda reach: (  # noqa: E731
            reach.first(i, rows, columns),
            reach.end(i, rows, columns, KEY_BLOCKS),
            reach.is_whole(i, j, rows, columns),
        )
        return [jax.tree.map(jnp.int32, blocks(reach)) for reach in REACHES]

    for i, j in itertools.product(range(BLOCKS), (0, KEY_BLOCKS - 1)):
        for reach, found in zip(REACHES, traced(i, j), strict=True):
            first, end = reach.first(i, rows, columns), reach.end(i, rows, columns, KEY_BLOCKS)
            assert tuple(map(int, found)) == (first, end, int(reach.is_whole(i, j, rows, columns))), reach


def test_keys_reach_the_queries_that_reach_them():
    for reach in REACHES:
        pairs, exchanged = seen_pairs(17, 12, *reach), seen_pairs(12, 17, *reach.of_keys())
        np.testing.assert_array_equal(exchanged, pairs.T)
        assert reach.of_keys().of_keys() == reach


def test_a_bound_that_excludes_nothing_is_none():
    for reach, (num_queries, num_keys) in itertools.product(REACHES, [(1, 1), (7, 5), (17, 12), (3, 30)]):
        within = reach.within(num_queries, num_keys)
        pairs = seen_pairs(num_queries, num_keys, *reach)
        np.testing.assert_array_equal(seen_pairs(num_queries, num_keys, *within), pairs)
        assert within.left in (None, reach.left)
        assert within.right in (None, reach.right)
        assert within.is_full == pairs.all()
    assert Reach(5, 2**40, 2**40).within(8, 8) == Reach()
    assert Reach(0, 2**40, 0).within(8, 8) == Reach(right=0)
