"""The shared causal form: nearby tokens exactly, earlier ones by summary, each token counted once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import FeatureMoments, WeightedKV, attend, favor, fold_scale, mean_pool, merge
from approx_attention.core import PositiveFeatures, causal_state, gaussian_projection, running_moments
from approx_attention.methods import running_exact
from tests.references import as_array, brute_force, causal_mask, compiled, random_head

causal_state, favor, draw_projection = compiled(causal_state, favor, gaussian_projection)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (4, 4), (23, 23), (23, 9), (9, 23), (1, 30), (30, 1)])
@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_keeping_every_token_is_exact(num_queries, num_keys, block_size):
    q, k, v = random_head(0, num_queries, num_keys)
    kv_mask, places = np.arange(num_keys) % 6 != 2, np.arange(num_queries)
    options = {"block_size": block_size, "kv_mask": as_array(kv_mask, bool)}
    state = causal_state(q, k, v, running_exact(8, max_length=64), **options)
    out, lse = brute_force(q, k, v, scale=1, mask=causal_mask(num_queries, num_keys) & kv_mask)
    # A query in padding has no position among the real tokens, unless it follows all of them.
    placed = np.append(kv_mask, np.ones(num_queries, bool))[:num_queries] | (places >= np.flatnonzero(kv_mask)[-1])
    np.testing.assert_allclose(state.out, np.where(placed[:, None], out, 0), atol=3e-6)
    np.testing.assert_allclose(state.lse, np.where(placed, lse, -np.inf), atol=3e-6)


def test_a_query_sees_two_blocks_exactly_and_the_rest_by_moments():
    q, k, v = random_head(1, 14, 14, spread=0.5)
    features = PositiveFeatures(draw_projection(jax.random.key(0), 6, 8))
    state = causal_state(q, k, v, running_moments(features), block_size=4)

    def one(q, k, v, t):
        start = max(0, t // 4 - 1) * 4
        far = FeatureMoments.of_tokens(features, k[:start], v[:start]) if start else FeatureMoments.empty(features, 8)
        recent = WeightedKV.of_tokens(k[start : t + 1], v[start : t + 1])
        return merge(attend(q[t : t + 1], recent), attend(q[t : t + 1], far))

    expected = jax.jit(lambda *x: [one(*x, t) for t in range(14)])(q, k, v)
    np.testing.assert_allclose(state.out, np.concatenate([x.out for x in expected]), atol=1e-5)
    np.testing.assert_allclose(state.lse, np.concatenate([x.lse for x in expected]), atol=1e-5)


def test_a_full_buffer_turns_to_nan_instead_of_forgetting():
    q, k, v = random_head(3, 40, 40)
    state = causal_state(q, k, v, running_exact(8, max_length=16), block_size=4)
    out = np.asarray(state.out)
    assert np.all(np.isfinite(out[:24]))
    assert np.all(np.isnan(out[24:]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [functools.partial(favor, num_features=16), functools.partial(mean_pool, num_landmarks=16)]
)
def test_memory_is_linear(function, optimized):
    def temporary_bytes(length, backward):
        x = jax.ShapeDtypeStruct((length, 16), jnp.float32)
        forward = lambda q, k, v: function(q, k, v, jax.random.key(0), is_causal=True, block_size=64)  # noqa: E731
        gradient = jax.grad(lambda q, k, v: jnp.sum(forward(q, k, v)), argnums=(0, 1, 2))
        lowered = jax.jit(gradient if backward else forward).lower(x, x, x)
        return lowered.compile(optimized).memory_analysis().temp_size_in_bytes

    for backward in (False, True):
        once, fourfold = temporary_bytes(2**12, backward), temporary_bytes(2**14, backward)
        assert fourfold < 4.5 * once


def test_scale_reaches_both_the_near_and_the_far_part():
    q, k, v = random_head(4, 30, 30, spread=0.5)
    projection = draw_projection(jax.random.key(0), 8, 8)
    scaled_q, scaled_k = compiled(fold_scale)(q, k, 0.2)
    out = favor(q, k, v, projection=projection, is_causal=True, block_size=4, scale=0.2)
    state = causal_state(scaled_q, scaled_k, v, running_moments(PositiveFeatures(projection)), block_size=4)
    np.testing.assert_allclose(out, state.out, atol=1e-6)


def test_blocks_hold_a_token():
    q, k, v = random_head(5, 4, 4)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        causal_state(q, k, v, running_exact(8, max_length=4), block_size=0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_bias_of_hidden_keys_is_finite_in_half_precision(dtype):
    running = running_moments(PositiveFeatures(draw_projection(jax.random.key(0), 6, 8)))

    def near(q, k, v, bias):
        state = running.near(q, k, v, bias)
        return dataclasses.replace(state, out=jnp.where(jnp.all(jnp.isfinite(bias)), state.out, jnp.nan))

    q, k, v = random_head(6, 9, 9, dtype=dtype)
    assert np.all(np.isfinite(causal_state(q, k, v, running._replace(near=near), block_size=4).out))
