"""Running means of segments."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.methods import running_mean_pool
from tests.methods.case import Case
from tests.references import random_head

CASES = {
    # At least as many segments as keys, so that the output equals that of one device.
    "mean_pool": Case(fast=True, devices={"num_landmarks": 64, "block_size": 4}),
}


@pytest.mark.parametrize(("num_landmarks", "block_size"), [(1, 4), (3, 4), (4, 4), (5, 3), (8, 4), (64, 4)])
def test_running_segments_cover_the_prefix_evenly(num_landmarks, block_size):
    _, k, v = (np.asarray(x) for x in random_head(2, 1, 60))
    running = running_mean_pool(8, num_landmarks=num_landmarks)

    @jax.jit
    def after_each_block(k, v):
        def append(segments, x):
            segments = running.append(segments, *x, jnp.ones(block_size, bool))
            return segments, (segments.length, running.read(segments))

        starts = jnp.arange(0, 60, block_size, dtype=jnp.int32)
        blocks = (x.reshape(-1, block_size, 8) for x in (k, v))
        return jax.lax.scan(append, running.init(8, jnp.float32), (starts, *blocks))[1]

    lengths, summaries = jax.tree.map(np.asarray, after_each_block(k, v))
    for block, length in enumerate(lengths.tolist()):
        stop = (block + 1) * block_size
        summary = jax.tree.map(operator.itemgetter(block), summaries)
        sizes = [min(length, max(0, stop - c * length)) for c in range(num_landmarks)]
        np.testing.assert_array_equal(summary.mass, sizes)
        assert sum(sizes) == stop
        for c, size in enumerate(sizes):
            if size:
                np.testing.assert_allclose(summary.k[c], np.mean(k[c * length : c * length + size], axis=0), atol=1e-5)
                np.testing.assert_allclose(
                    summary.value_sum[c], np.sum(v[c * length : c * length + size], axis=0), atol=1e-5
                )
    # Segments are as short as possible: segments of half the length would not fit.
    first = -(-block_size // num_landmarks)
    assert length == first or num_landmarks * length < 2 * stop
