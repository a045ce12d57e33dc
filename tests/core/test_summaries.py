"""Summaries give the outputs of the keys and values that they stand for, alone and merged."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import approx_attention
from approx_attention import FeatureMoments, WeightedKV, attend, merge
from approx_attention.core import (
    FEATURE_BLOCK,
    PositiveFeatures,
    ReLUFeatures,
    TrigonometricFeatures,
    gaussian_projection,
    hadamard,
    summary_bytes,
)
from tests.forms import one_form
from tests.references import as_array, brute_force, compiled, random_head

attend, merge = compiled(attend, merge)
of_tokens, of_block = compiled(FeatureMoments.of_tokens, FeatureMoments._of_block)
features_of = compiled(lambda features, x: features(x))

MAPS = {"positive": PositiveFeatures, "trigonometric": TrigonometricFeatures, "relu": ReLUFeatures}
every_map = pytest.mark.parametrize("kind", MAPS)


@functools.cache
def feature_map(kind, num_directions=16):
    return MAPS[kind](gaussian_projection(jax.random.key(0), num_directions, 8))


def materialised(features, x):
    """Features in float64, from their definition ``values * exp(log_scale)``."""
    values, log_scale = (np.asarray(y, np.float64) for y in features_of(features, x))
    return np.broadcast_to(values * np.exp(log_scale), (x.shape[0], features.num_features))


# Keys have 8 channels; few queries take a different path than many.
few_and_many = pytest.mark.parametrize("num_queries", [6, 9])


@few_and_many
def test_tokens_with_masses_are_repeated_keys(num_queries):
    q, k, v = (np.asarray(x) for x in random_head(0, num_queries, 5))
    counts = np.array([1, 3, 0, 2, 5])
    state = attend(as_array(q), WeightedKV(*map(as_array, (k, v * counts[:, None], counts))))
    out, lse = brute_force(q, np.repeat(k, counts, axis=0), np.repeat(v, counts, axis=0), scale=1)
    np.testing.assert_allclose(state.out, out, atol=1e-6)
    np.testing.assert_allclose(state.lse, lse, atol=1e-6)


@few_and_many
def test_an_absent_token_may_hold_anything(num_queries):
    q, k, v = (np.asarray(x) for x in random_head(1, num_queries, 5))
    seen = np.array([True, False, True, True, False])
    value_sum, mass = as_array(v * seen[:, None]), as_array(seen)
    summary = WeightedKV(as_array(k), value_sum, mass)
    out, _ = brute_force(q, k[seen], v[seen], scale=1)
    np.testing.assert_allclose(attend(as_array(q), summary).out, out, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(attend(q, s).out)))(summary)
    chex.assert_tree_all_finite(gradient)
    nan = np.where(seen[:, None], k, np.nan)
    for value_range in (None, as_array([v.min(0), v.max(0)])):

        def total(q, k, value_range=value_range):
            state = attend(q, WeightedKV(k, value_sum, mass, value_range))
            return jnp.sum(state.out**2) + jnp.sum(state.lse)

        of = jax.jit(jax.value_and_grad(total, (0, 1)))
        chex.assert_trees_all_close(*(of(as_array(q), as_array(keys)) for keys in (nan, k)), rtol=1e-5)
    nothing = attend(as_array(q), WeightedKV.empty(5, 8, 8))
    assert not np.asarray(nothing.out).any()
    assert np.all(np.isneginf(nothing.lse))
    huge = attend(as_array(1e4 * q), WeightedKV(as_array(1e4 * k), as_array(v), as_array(np.ones(5))))
    chex.assert_tree_all_finite(huge)
    np.testing.assert_allclose(huge.out, v[np.argmax(q @ k.T, axis=1)], atol=1e-6)


def test_signed_masses_answer_and_are_clipped():
    q, k, v = random_head(2, 6, 5, spread=0.3)
    v = np.asarray(v, np.float64)
    mass = np.array([1.0, 2.0, -0.3, 1.5, 1.0])
    value_sum = mass[:, None] * v
    weights = np.exp(np.asarray(q, np.float64) @ np.asarray(k, np.float64).T)
    total = weights @ mass
    assert np.all(total > 0)
    expected = weights @ value_sum / total[:, None]

    def clipped(least, greatest):
        value_range = as_array([np.full(8, least), np.full(8, greatest)])
        return attend(q, WeightedKV(k, as_array(value_sum), as_array(mass), value_range))

    state = clipped(-100, 100)
    np.testing.assert_allclose(state.out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.lse, np.log(total), atol=1e-5)
    np.testing.assert_allclose(clipped(-0.1, 0.1).out, np.clip(expected, -0.1, 0.1), atol=1e-5)


def test_a_normaliser_that_is_not_positive_is_no_answer():
    q, k, v = random_head(3, 6, 2)
    value_range = as_array([x(np.asarray(v), axis=0) for x in (np.min, np.max)])
    state = attend(q, WeightedKV(k, v, as_array([-1, -2]), value_range))
    np.testing.assert_array_equal(state.out, 0)
    assert np.all(np.asarray(state.lse) == -np.inf)
    others = attend(q, WeightedKV(k, v, as_array([1, 1])))
    chex.assert_trees_all_close(merge(state, others), others, rtol=1e-6)


@every_map
def test_moments_equal_their_definition(kind):
    q, k, v = random_head(4, 6, 40, spread=0.3)
    features = feature_map(kind)
    phi_q, phi_k = materialised(features, q), materialised(features, k)
    mass = phi_q @ phi_k.sum(0)
    state = attend(q, of_tokens(features, k, v))
    assert np.all(mass > 0)
    np.testing.assert_allclose(state.lse, np.log(mass), atol=2e-5)
    np.testing.assert_allclose(state.out, phi_q @ phi_k.T @ np.asarray(v) / mass[:, None], atol=2e-5)


@every_map
def test_moments_by_blocks_equal_moments_at_once(kind):
    num_keys = 2 * FEATURE_BLOCK + 17
    q, k, v = random_head(5, 6, num_keys, spread=0.3)
    features = feature_map(kind)
    kv_mask = as_array(np.arange(num_keys) % 5 != 0, bool)
    blocks, whole = (of(features, k, v, kv_mask) for of in (of_tokens, of_block))
    chex.assert_trees_all_close(attend(q, blocks), attend(q, whole), atol=1e-5)


def test_moments_with_known_feature_maps_merge_within_a_program():
    q, k, v = random_head(31, 4, 9, 3)
    # Equal, but not the same arrays; a third map differs.
    first, second, other = (PositiveFeatures(as_array(np.full((5, 3), x))) for x in (0.3, 0.3, 0.4))
    parts = [
        of_tokens(features, *(as_array(np.asarray(x)[rows]) for x in (k, v)))
        for features, rows in ((first, slice(4)), (second, slice(4, 9)))
    ]
    out = jax.jit(lambda q: approx_attention.attend(q, approx_attention.merge(*parts)).out)(q)
    np.testing.assert_allclose(out, attend(q, of_tokens(first, k, v)).out, rtol=1e-5)
    with pytest.raises(TypeError, match="moments of one feature map"):
        jax.jit(lambda k: approx_attention.merge(parts[0], FeatureMoments.of_tokens(other, k, k)))(k)


@every_map
def test_moments_of_no_token_are_empty(kind):
    features, k, v = MAPS[kind](as_array(np.ones((4, 3)))), as_array(np.zeros((0, 3))), as_array(np.zeros((0, 2)))
    chex.assert_trees_all_equal(of_tokens(features, k, v), FeatureMoments.empty(features, 2))


@every_map
def test_merged_moments_are_moments_of_the_union(kind):
    q, k, v = random_head(6, 6, 20, spread=0.5)
    features = feature_map(kind)
    parts = ([as_array(np.asarray(x)[rows]) for x in (k, v)] for rows in (slice(0, 3), slice(3, 20)))
    a, b = (of_tokens(features, *part) for part in parts)
    whole = of_tokens(features, k, v)
    empty = FeatureMoments.empty(features, 8)
    for merged in (merge(a, b), merge(b, a), merge(empty, whole), merge(whole, merge(empty, empty))):
        chex.assert_trees_all_close(attend(q, merged), attend(q, whole), atol=1e-5)


@every_map
def test_empty_moments_answer_with_the_empty_state(kind):
    q, k, v = random_head(7, 6, 9)
    features = feature_map(kind)
    for moments in (
        FeatureMoments.empty(features, 8),
        merge(FeatureMoments.empty(features, 8), FeatureMoments.empty(features, 8)),
        of_tokens(features, k, v, as_array(np.zeros(9), bool)),
    ):
        state = attend(q, moments)
        np.testing.assert_array_equal(state.out, 0)
        np.testing.assert_array_equal(state.lse, -np.inf)


def test_a_far_larger_key_does_not_erase_the_others():
    # Each feature has its own log-scale: a global one would underflow every feature but a few.
    q, k, v = random_head(8, 6, 9, spread=0.5)
    k = as_array(np.asarray(k) * np.where(np.arange(9) == 0, 40, 1)[:, None])
    features = feature_map("positive", num_directions=64)
    log_q, log_k = (np.asarray(features_of(features, x).log_scale, np.float64) for x in (q, k))
    log_weight = log_q[:, None, :] + log_k[None, :, :]
    peak = log_weight.max((1, 2), keepdims=True)
    weight = np.exp(log_weight - peak).sum(-1)
    out = weight @ np.asarray(v) / weight.sum(1, keepdims=True)
    np.testing.assert_allclose(attend(q, of_tokens(features, k, v)).out, out, rtol=2e-3, atol=2e-4)


def test_only_summaries_answer():
    with pytest.raises(TypeError, match="got tuple"):
        attend(jnp.ones((2, 3)), (1, 2))


def test_bytes_count_what_is_held_but_not_the_feature_map():
    _, k, v = random_head(9, 6, 9, 8, 5)
    assert summary_bytes(jax.eval_shape(WeightedKV.of_tokens, k, v)) == 4 * (9 * 8 + 9 * 5 + 9)
    moments = of_tokens(feature_map("positive"), k, v)
    assert summary_bytes(moments) == 4 * (16 * 5 + 16 + 16) == summary_bytes((moments,))


def test_only_moments_of_one_size_multiply():
    features = feature_map("relu")
    narrow, wide = (FeatureMoments.empty(features, value_dim) for value_dim in (1, 3))
    with pytest.raises(ValueError, match=r"moments of equal size \[R, Dv\], got \(16, 1\) and \(16, 3\)"):
        hadamard(narrow, wide)


@pytest.mark.parametrize("change", ["none", "mask", "weights"])
def test_moments_of_positive_features_are_read_alike_on_every_platform(change):
    q, k, v = random_head(12, 40, 30, spread=0.7)
    features, fourth = feature_map("positive"), np.arange(16) == 3
    changes = {
        "none": [{}],
        "mask": [{"seen": np.arange(30) % 3 > 0}, {"seen": np.zeros(30, bool)}],
        # A weight of 0, and signed weights.
        "weights": [{"weights": np.where(fourth, np.float32(x), np.float32(1))} for x in (0, -0.5)],
    }[change]

    def outputs(q, k, v, seen=None, weights=None):
        moments = FeatureMoments.of_tokens(features, k, v, seen)
        if weights is not None:
            moments = moments.reweighted(weights, features)
        state = attend.__wrapped__(q, moments)
        loss = jnp.sum(jnp.sin(state.out)) + jnp.sum(jnp.where(state.lse > -jnp.inf, state.lse, 0))
        return loss, state

    of = jax.jit(jax.value_and_grad(outputs, (0, 1, 2), has_aux=True))
    on_cpu = [of(q, k, v, **x) for x in changes]
    with one_form("default"):
        elsewhere = [of(q, k, v, **x) for x in changes]
    for ours, expected in zip(jax.tree.leaves(elsewhere), jax.tree.leaves(on_cpu), strict=True):
        assert np.all(np.isfinite(ours) == np.isfinite(expected))
        np.testing.assert_allclose(ours, expected, atol=3e-5, rtol=3e-5)
