"""Merging is associative, commutative and differentiable, has an identity, and makes no NaN."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from approx_attention import AttentionState, FeatureMoments, WeightedKV, attend, merge
from approx_attention.core import PositiveFeatures
from tests.references import as_array, brute_force, random_head


def random_state(seed, spread=3.0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return AttentionState(as_array(random.normal(size=(5, 3)), dtype), as_array(spread * random.normal(size=5), dtype))


merged = jax.jit(merge)


@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1.0, 100.0, 1e4]))
@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
def test_associative_and_commutative(seed, spread):
    a, b, c = (random_state(seed + i, spread) for i in range(3))
    chex.assert_trees_all_close(merged(a, b), merged(b, a), atol=1e-6, rtol=1e-6)
    chex.assert_trees_all_close(merged(merged(a, b), c), merged(a, merged(b, c)), atol=1e-5, rtol=1e-6)


def test_merging_equals_attending_to_the_union():
    q, k, v = (np.asarray(x) for x in random_head(0, 5, 9))
    parts = [AttentionState(*map(as_array, brute_force(q, k[i], v[i]))) for i in (slice(0, 2), slice(2, 9))]
    out, lse = brute_force(q, k, v)
    both = merged(*parts)
    np.testing.assert_allclose(both.out, out, atol=1e-6)
    np.testing.assert_allclose(both.lse, lse, atol=1e-6)


def test_the_empty_state_is_the_identity():
    state, empty = random_state(0), AttentionState.empty(5, 3)
    chex.assert_trees_all_close(merged(state, empty), state, rtol=1e-6)
    chex.assert_trees_all_close(merged(empty, state), state, rtol=1e-6)
    chex.assert_trees_all_equal(merged(empty, empty), empty)


def test_gradients_are_finite_next_to_the_empty_state():
    empty = AttentionState.empty(5, 3)
    gradient = jax.jit(jax.grad(lambda a, b: jnp.sum(merge(a, b).out ** 2), (0, 1)))
    for a, b in ((random_state(0), empty), (empty, random_state(0)), (empty, empty)):
        chex.assert_tree_all_finite(gradient(a, b))


def test_merge_has_the_right_derivative(x64):
    a, b = random_state(0, 1.0, jnp.float64), random_state(1, 1.0, jnp.float64)
    check_grads(jax.jit(merge), (a, b), order=2, modes=["rev", "fwd"], eps=1e-6, atol=1e-5, rtol=1e-5)


def test_only_like_merges_with_like():
    state = random_state(0)
    q, k, v = random_head(0, 5, 9)
    tokens, moments_of = WeightedKV.of_tokens(k, v), jax.jit(FeatureMoments.of_tokens)
    moments = moments_of(PositiveFeatures(q), k, v)
    for a, b in ((state, tokens), (tokens, moments), (moments, state)):
        with pytest.raises(TypeError, match="merge needs two"):
            merge(a, b)
    with pytest.raises(TypeError, match="got float and int"):
        merge(1.0, 2)
    with pytest.raises(TypeError, match="moments of one feature map"):
        merge(moments, moments_of(PositiveFeatures(as_array(np.asarray(q) + 1)), k, v))


def test_tokens_with_signed_masses_join_those_without():
    q, k, v = (np.asarray(x) for x in random_head(0, 5, 9))

    @jax.jit
    def union(q, k, v, value_range):
        signed = WeightedKV(k[4:], v[4:], jnp.ones(5), value_range)
        both = merge(WeightedKV.of_tokens(k[:4], v[:4]), signed)
        return both.value_range, attend(q, both).out

    value_range, out = union(q, k, v, np.stack([v[4:].min(0), v[4:].max(0)]))
    np.testing.assert_array_equal(value_range, np.stack([v.min(0), v.max(0)]))
    np.testing.assert_allclose(out, brute_force(q, k, v, scale=1.0)[0], atol=1e-5)


def test_states_pass_through_transformations():
    q, k, v = random_head(0, 5, 9)

    @jax.jit
    @jax.vmap
    def function(q, k, v):
        return attend(q, WeightedKV.of_tokens(k, v))

    state = jax.tree.map(np.asarray, function(*(np.stack([x, x]) for x in (q, k, v))))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], state), jax.tree.map(lambda x: x[1], state))
