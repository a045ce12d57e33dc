"""Rows in blocks and out of them again."""

import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.core import in_blocks, map_rows, out_of_blocks


@pytest.mark.parametrize(("num_rows", "block_size"), [(5, 2), (6, 3), (3, 8)])
def test_rows_come_back_out_of_blocks(num_rows, block_size):
    tree = jnp.arange(num_rows), jnp.ones((num_rows, 2))
    blocks = tuple(in_blocks(x, block_size) for x in tree)
    assert [x.shape[:2] for x in blocks] == 2 * [(-(-num_rows // block_size), block_size)]
    for x, back, padded in zip(tree, out_of_blocks(blocks, num_rows), out_of_blocks(blocks), strict=True):
        np.testing.assert_array_equal(back, x)
        np.testing.assert_array_equal(padded[num_rows:], 0)
    doubled = map_rows(lambda rows: {"x": 2 * rows[0]}, tree, block_size)
    np.testing.assert_array_equal(doubled["x"], 2 * tree[0])
