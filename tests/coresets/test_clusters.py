"""Clusters with radii, and bounds from them, against the errors that a search finds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import WeightedKV, attend, bounds, merge
from approx_attention.coresets import Clusters, clusters_around, running_clusters, running_coreset
from approx_attention.evaluation import sup_error
from tests.references import as_array, brute_force

# All kinds of data have these sizes, so that each function is compiled once.
NUM_QUERIES, NUM_KEYS, HEAD_DIM, VALUE_DIM = 80, 96, 5, 3
KEY = jax.random.key(3)

around = jax.jit(clusters_around)
merge_bound = jax.jit(bounds.merge_bound)
bound_at = jax.jit(bounds.merge_bound_at)
answer = jax.jit(lambda q, clusters: attend(q, clusters.tokens).out)


def data(kind):
    """Keys, values, and the mask of keys that others are merged into."""
    random = np.random.default_rng(len(kind))
    k, v = random.normal(size=(NUM_KEYS, HEAD_DIM)), random.normal(size=(NUM_KEYS, VALUE_DIM))
    chosen = np.arange(NUM_KEYS) < 16
    if kind == "sphere":
        k /= np.linalg.norm(k, axis=1, keepdims=True)
    if kind in ("clustered", "tiny clusters"):
        noise = {"clustered": 0.1, "tiny clusters": 1e-3}[kind]
        k, v = (x[np.arange(NUM_KEYS) % 16] + noise * random.normal(size=x.shape) for x in (k, v))
    if kind == "outliers":
        k, v = 0.05 * k + 3.0, np.where(np.arange(NUM_KEYS)[:, None] == 50, 20.0, v)
        k[50] = -4.0
    if kind == "repeated keys":
        k = k[np.arange(NUM_KEYS) % 16]
    if kind == "one cluster":
        chosen = np.arange(NUM_KEYS) < 1
    if kind == "all distinct":
        chosen = np.ones(NUM_KEYS, bool)
    return np.asarray(k, np.float32), np.asarray(v, np.float32), chosen


KINDS = ["sphere", "clustered", "outliers", "tiny clusters", "repeated keys", "one cluster", "all distinct"]


def places(k, v, chosen):
    return WeightedKV(k, v, np.asarray(chosen, np.float32))


@functools.partial(jax.jit, static_argnames="num_steps")
def climbed(q, k, v, clusters, radius, num_steps=30):
    """Queries found by projected ascent on the logarithm of the error over its bound."""
    tokens = WeightedKV.of_tokens(k, v)

    def excess(q):
        difference = attend(q, tokens).out - attend(q, clusters.tokens).out
        error = jnp.sqrt(jnp.sum(difference**2, axis=1) + 1e-12)
        return jnp.sum(jnp.log(error) - jnp.log(bounds.merge_bound_at(q, clusters) + 1e-6))

    def step(q, _):
        slope = jax.grad(excess)(q)
        q = q + 0.1 * radius * slope / jnp.maximum(jnp.linalg.norm(slope, axis=1, keepdims=True), 1e-20)
        return q * jnp.minimum(1, radius / jnp.maximum(jnp.linalg.norm(q, axis=1, keepdims=True), 1e-20)), None

    return jax.lax.scan(step, q, length=num_steps)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_query_errs_more_than_its_bound(kind):
    k, v, chosen = data(kind)
    clusters = around(k, v, places(k, v, chosen))
    largest = np.linalg.norm(v, axis=1).max()
    directions = np.random.default_rng(0).normal(size=(32, HEAD_DIM))
    directions = np.concatenate([directions, k[:16] - k.mean(0), k.mean(0) - k[16:32], k[48:56], -k[48:56]])
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    for radius in (0.0, 0.1, 1.0, 4.0, 40.0):
        q = np.asarray(radius * directions, np.float32)
        for queries in (q, climbed(q, k, v, clusters, np.float32(radius))):
            out, promised = np.asarray(answer(queries, clusters), np.float64), np.asarray(bound_at(queries, clusters))
            error = np.linalg.norm(out - brute_force(queries, k, v, scale=1.0)[0], axis=1)
            assert np.isfinite(promised).all()
            assert (error <= promised).all()
            assert (promised <= 2 * largest * (1 + 1e-6)).all()
    if kind in ("all distinct", "repeated keys"):
        # Within a cluster of equal keys only the values differ, and merging them is exact.
        assert np.asarray(bound_at(directions.astype(np.float32), clusters)).max() < 1e-4 * largest


@pytest.mark.parametrize("kind", KINDS)
def test_no_query_of_the_ball_errs_more_than_its_bound(kind):
    k, v, chosen = data(kind)
    largest = float(np.linalg.norm(v, axis=1).max())
    for radius in (0.3, 2.0, 30.0):
        merged, bound = merge_bound(k, v, places(k, v, chosen), np.float32(radius))
        assert np.asarray(merged.mass).sum() == NUM_KEYS
        found = float(searched(k, v, merged, np.float32(radius)).error)
        assert found * largest <= float(bound) <= 2 * largest * (1 + 1e-6)


searched = jax.jit(functools.partial(sup_error, num_random=64, num_keys=64, num_starts=8, num_steps=30))


def test_finer_clusters_promise_less():
    k, v, _ = data("sphere")
    q = np.asarray(0.3 * np.random.default_rng(1).normal(size=(NUM_QUERIES, HEAD_DIM)), np.float32)
    at, ball = [], []
    for count in (1, 8, 32, 80, 96):
        small = places(k, v, np.arange(NUM_KEYS) < count)
        at.append(np.asarray(bound_at(q, around(k, v, small))).mean())
        ball.append(float(merge_bound(k, v, small, np.float32(0.3)).bound))
    assert all(more > less for more, less in itertools.pairwise(at))
    assert ball[0] > ball[-2] > ball[-1]
    assert max(at[-1], ball[-1]) < 1e-4 * np.linalg.norm(v, axis=1).max()


def test_two_opposite_keys_leave_no_room_below_the_bound():
    side = np.where(np.arange(NUM_KEYS) % 2 == 0, 1.0, -1.0)[:, None]
    k, v = (np.asarray(side * np.eye(1, size), np.float32) for size in (HEAD_DIM, VALUE_DIM))
    small = places(k, v, np.arange(NUM_KEYS) < 1)
    for radius in (0.1, 0.5):
        q = np.asarray(radius * np.eye(NUM_QUERIES, HEAD_DIM), np.float32)
        # The exact output: the mean of values +-1 with logits +-radius.
        error = np.tanh(radius)
        at = np.asarray(bound_at(q, around(k, v, small)))[0]
        ball = float(merge_bound(k, v, small, np.float32(radius)).bound)
        assert error <= at <= 1.07 * error
        assert error <= ball <= 1.07 * error


def test_padding_moves_no_bound():
    k, v, chosen = data("clustered")
    real = np.arange(NUM_KEYS) % 5 != 3
    soiled = (np.where(real[:, None], x, np.float32(np.nan)) for x in (k, v))
    small = places(k, v, chosen & real)
    padded = around(*soiled, small, kv_mask=real)
    alone = jax.jit(clusters_around)(k[real], v[real], small)
    for mine, theirs in zip(jax.tree.leaves(padded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    q = np.ones((NUM_QUERIES, HEAD_DIM), np.float32)
    np.testing.assert_allclose(bound_at(q, padded), bound_at(q, alone), rtol=1e-5)


def test_bounds_of_many_heads_have_gradients():
    heads = [data(kind) for kind in ("sphere", "outliers")]
    clusters = [around(k, v, places(k, v, chosen)) for k, v, chosen in heads]
    both = jax.tree.map(lambda *x: np.stack(x), *clusters)
    q = np.random.default_rng(2).normal(size=(2, NUM_QUERIES, HEAD_DIM)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def with_slope(q, clusters):
        promised, pull = jax.vjp(lambda q: bounds.merge_bound_at(q, clusters), q)
        return promised, pull(jnp.ones_like(promised))[0]

    promised, slope = with_slope(q, both)
    np.testing.assert_allclose(promised, [bound_at(*args) for args in zip(q, clusters, strict=True)], rtol=1e-5)
    assert np.isfinite(slope).all()
    assert np.linalg.norm(slope[0]) > 0


def test_folded_clusters_are_those_of_the_coreset_and_have_the_radii_of_their_members():
    k, v, _ = data("clustered")
    tokens = places(k, v, np.ones(NUM_KEYS))
    sizes = {"coreset_size": 10, "sinks": 3, "max_length": NUM_KEYS}
    certified = running_clusters(HEAD_DIM, KEY, **sizes)
    plain = running_coreset(HEAD_DIM, KEY, **sizes)

    @jax.jit
    def streams(tokens):
        def append(states, start):
            state, other = states
            block = (jax.lax.dynamic_slice_in_dim(x, start, 16) for x in (tokens.k, tokens.value_sum))
            state, other = (
                certified.append(state, tokens, start, 16),
                plain.append(other, start, *block, jnp.ones(16, bool)),
            )
            return (state, other), None

        states = certified.init(VALUE_DIM, jnp.float32), plain.init(VALUE_DIM, jnp.float32)
        (state, other), _ = jax.lax.scan(append, states, jnp.arange(0, 64, 16, dtype=jnp.int32))
        state = certified.measured(state, tokens)
        return certified.read(state), state.label, plain.read(other)

    clusters, label, folded = streams(tokens)
    for mine, theirs in zip(jax.tree.leaves(clusters.tokens), jax.tree.leaves(folded), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    np.testing.assert_array_equal(label[:3], np.arange(3))
    np.testing.assert_array_equal(label[64:], 13)
    for number in range(13):
        members = np.flatnonzero(np.asarray(label) == number)
        means = [x[members].astype(np.float64).mean(0) for x in (k, v)]
        key, value = (np.linalg.norm(x[members] - mean, axis=1) for x, mean in zip((k, v), means, strict=True))
        np.testing.assert_allclose(clusters.key_radius[number], key.max(), atol=1e-6)
        np.testing.assert_allclose(clusters.value_radius[number], value.max(), atol=1e-6)
        np.testing.assert_allclose(clusters.value_spread[number], np.sqrt((value**2).mean()), atol=1e-6)
    assert float(clusters.largest_value) == pytest.approx(np.linalg.norm(v[:64], axis=1).max())


def test_what_does_not_fit_says_so():
    k, v, chosen = data("sphere")
    clusters = jax.jit(Clusters.of_tokens)(places(k, v, chosen))
    with pytest.raises(ValueError, match="channels of the keys, D = 5, got shape"):
        bounds.merge_bound_at(as_array(np.ones((2, 4))), clusters)
    with pytest.raises(TypeError, match="q must be a floating-point array"):
        bounds.merge_bound_at(as_array(np.ones((2, 5)), jnp.int32), clusters)
    with pytest.raises(ValueError, match="radius must be finite and not negative, got -1"):
        bounds.merge_bound(k, v, clusters.tokens, -1.0)
    with pytest.raises(TypeError, match="one kind"):
        merge(clusters, clusters.tokens)
