"""The baselines: uniform sampling, the mean of the values, a local window."""

import jax
import jax.numpy as jnp
import numpy as np

from approx_attention.methods import running_uniform_sample
from tests.methods.case import Case
from tests.methods.test_coreset import streamed
from tests.references import as_array

CASES = {
    "mean_value": Case(values_only=True, unseen="k", scale_cancels="all its logits are 0, at any scale", devices={}),
    "local": Case(unseen="kv", devices={"window_size": 5}),
    "uniform_sample": Case(
        unseen="v",
        changes={"noise": as_array(np.arange(40.0))},
        # At least as many tokens as keys, so that the output equals that of one device.
        devices={"sample_size": 64, "block_size": 4},
    ),
}


def test_a_running_sample_is_uniform():
    k = v = as_array(np.arange(24.0)[:, None])

    @jax.jit
    @jax.vmap
    def kept(key):
        sample = streamed(running_uniform_sample(1, key, sample_size=6), k, v, jnp.ones(24, bool), 4)
        return sample.k[:, 0], sample.mass

    tokens, mass = kept(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(mass, 4.0)
    assert all(len(set(row)) == 6 for row in np.asarray(tokens)[:50])
    counts = np.bincount(np.asarray(tokens, int).ravel(), minlength=24)
    # Each key is kept with probability 1/4: 1000 times on average, with a standard deviation of 27.
    assert np.all(np.abs(counts - 1000) < 4.5 * 27.4)
