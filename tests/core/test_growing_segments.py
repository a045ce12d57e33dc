"""Segments of a growing prefix: all prefixes at once agree with growth block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.core import GrowingSegments, TokenSums


@pytest.mark.parametrize(
    ("num_segments", "unit", "block_size", "num_blocks"),
    [
        (8, 1, 4, 1),
        (8, 1, 4, 23),
        (3, 1, 8, 9),
        (5, 1, 12, 11),
        (4, 4, 8, 17),
        (7, 2, 12, 10),
        (64, 1, 4, 9),
        (1, 1, 3, 6),
    ],
)
def test_segments_of_all_prefixes_are_those_that_grow(num_segments, unit, block_size, num_blocks):
    random, per_block = np.random.default_rng(0), block_size // unit
    rows = num_blocks * per_block
    tokens = TokenSums(*(random.normal(size=(rows, n)[: 2 if n else 1]).astype(np.float32) for n in (3, 2, 0)))
    least = unit * -(-per_block // num_segments)
    counts = np.arange(num_blocks + 1, dtype=np.int32)

    @jax.jit
    def of_all_prefixes(tokens):
        return jax.lax.map(GrowingSegments.of_sequence(num_segments, unit, block_size, tokens, least), counts)

    @jax.jit
    def grow(grown, start, block):
        return grown.append(start, unit, block, least)

    at = jax.tree.map(np.asarray, of_all_prefixes(tokens))
    grown = jax.jit(lambda: GrowingSegments.empty(num_segments, 3, 2, jnp.float32))()
    for count in counts:
        now = jax.tree.map(lambda x, i=count: x[i], at)
        for ours, expected in zip(now.sums, grown.sums, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert count == 0 or now.length == grown.length
        if count < num_blocks:
            block = jax.tree.map(lambda x, i=count: x[i * per_block : (i + 1) * per_block], tokens)
            grown = grow(grown, count * np.int32(block_size), block)
