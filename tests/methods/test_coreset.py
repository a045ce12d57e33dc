"""Coresets and compressed caches against brute force, limits in which they are exact, and instances that must fail."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    WeightedKV,
    attend,
    coreset,
    merge,
    sparse_coreset,
    summarize_coreset,
)
from approx_attention.coresets import ALGORITHMS, Halving, compress, query_radius, running_coreset
from approx_attention.coresets.halving import SIGN_RULES
from approx_attention.evaluation import sup_error
from tests.methods.case import Case, within_block
from tests.references import as_array, brute_force, causal_mask, compiled, random_head

CASES = {
    "coreset": Case(
        changes={"algorithm": "halving", "query_radius": 9.0, "streaming": "counter", "sinks": 0},
        # The causal form folds, with any algorithm and radius.
        changes_are_causal=False,
        contexts={
            "streaming": {"is_causal": True, "algorithm": "kmeans_merge"},
            "sinks": {"is_causal": True},
            "block_size": {"is_causal": True},
        },
        # At least as many tokens as keys, so that the output equals that of one device.
        devices={"coreset_size": 64, "block_size": 4},
    ),
    # Two of four tokens leave k-means no choice.
    "sparse_coreset": Case(size=within_block, changes={"algorithm": "uniform"}, random={"block_size": 8}),
}

attend, coreset, query_radius = compiled(attend, coreset, query_radius)

SUBSETS = [
    "halving",
    "stratified",
    "halving_fitted",
    "farthest_fitted",
    "herding",
    "thinformer",
    "uniform",
    "value_norm",
]
MERGES = ["kmeans_merge", "farthest_merge"]
SIGNED = ["guarded", "kmeans_nystrom", "nystrom_rpc", "balance_kv", "subgen"]
EVERY = SUBSETS + MERGES + SIGNED
# Compiling all algorithms takes minutes: one of each kind is always tested, the others are slow tests.
OF_EACH_KIND = ["stratified", "guarded"]
SOME = [name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
KEY = jax.random.key(5)


def test_every_algorithm_is_tested():
    assert sorted(EVERY) == sorted(ALGORITHMS)


@functools.partial(jax.jit, static_argnames=("size", "algorithm"))
def summary(k, v, kv_mask=None, key=KEY, *, size, algorithm, radius=None):
    return summarize_coreset(k, v, key, coreset_size=size, algorithm=algorithm, query_radius=radius, kv_mask=kv_mask)


# Sizes that tests share, so that each algorithm is compiled once for all of them.
NUM_KEYS, HEAD_DIM, VALUE_DIM, SIZE = 49, 7, 3, 6


def shared_head(seed, num_queries=6):
    return random_head(seed, num_queries, NUM_KEYS, HEAD_DIM, VALUE_DIM)


def small_of(k, v, kv_mask=None, key=KEY, *, algorithm):
    """A summary of the shared sizes; without a mask all keys are real."""
    mask = np.ones(NUM_KEYS, bool) if kv_mask is None else np.asarray(kv_mask)
    return summary(np.asarray(k), np.asarray(v), mask, key, size=SIZE, algorithm=algorithm)


def error_of(k, v, small, radius):
    """`sup_error` as one program: padding and tokens without mass fill the inputs up to one of two sizes."""
    num_keys, num_tokens = (64, 16) if len(k) <= 64 and len(small.mass) <= 16 else (512, 256)

    def filled(x, *shape):
        x = np.asarray(x)
        return np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])

    kv_mask = np.arange(num_keys) < len(k)
    small = dataclasses.replace(
        small,
        k=filled(small.k, num_tokens, HEAD_DIM),
        value_sum=filled(small.value_sum, num_tokens, VALUE_DIM),
        mass=filled(small.mass, num_tokens),
    )
    k, v = filled(k, num_keys, HEAD_DIM), filled(v, num_keys, VALUE_DIM)
    return float(sup_error(k, v, small, np.float32(radius), kv_mask=kv_mask).error)


def streamed(running, k, v, kv_mask, block_size):
    """The summary of tokens that arrive in blocks."""
    blocks = (x.reshape(-1, block_size, *x.shape[1:]) for x in (k, v, kv_mask))
    starts = jnp.arange(0, len(k), block_size, dtype=jnp.int32)
    state = running.init(v.shape[1], jnp.float32)
    return running.read(jax.lax.scan(lambda state, x: (running.append(state, *x), None), state, (starts, *blocks))[0])


def clustered(seed, num_keys, num_clusters=8, head_dim=HEAD_DIM, value_dim=3, noise=0.05):
    random = np.random.default_rng(seed)
    label = random.integers(num_clusters, size=num_keys)
    k = random.normal(size=(num_clusters, head_dim))[label] + noise * random.normal(size=(num_keys, head_dim))
    v = random.normal(size=(num_clusters, value_dim))[label] + noise * random.normal(size=(num_keys, value_dim))
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    return np.asarray(k, np.float32), np.asarray(v / np.linalg.norm(v, axis=1).max(), np.float32)


def answers(q, k, v):
    return brute_force(q, k, v, scale=1.0)[0]


# invariants of every algorithm


@pytest.mark.parametrize("algorithm", SUBSETS + MERGES)
@pytest.mark.parametrize("num_keys", [NUM_KEYS, pytest.param(64, marks=pytest.mark.slow)])
def test_mass_is_kept_and_values_stay_in_their_hull(algorithm, num_keys):
    q, k, v = random_head(0, 6, num_keys, HEAD_DIM, VALUE_DIM)
    kv_mask = np.arange(num_keys) % 7 != 2
    # With the key as an argument this is the program of `small_of`.
    small = summary(np.asarray(k), np.asarray(v), kv_mask, KEY, size=SIZE, algorithm=algorithm)
    assert small.k.shape == (SIZE, HEAD_DIM)
    mass = np.asarray(small.mass)
    assert mass.sum() == pytest.approx(kv_mask.sum(), rel=1e-5)
    assert (mass >= 0).all()
    out, real = np.asarray(attend(q, small).out), np.asarray(v)[kv_mask]
    assert (out <= real.max(0) + 1e-5).all()
    assert (out >= real.min(0) - 1e-5).all()


@pytest.mark.parametrize("algorithm", SUBSETS)
def test_subsets_are_subsets(algorithm):
    _, k, v = map(np.asarray, shared_head(1))
    small = small_of(k, v, algorithm=algorithm)
    distance = np.linalg.norm(np.asarray(small.k)[:, None] - np.asarray(k)[None], axis=-1)
    place = distance.argmin(1)
    assert distance.min(1).max() < 1e-5
    assert len(set(place)) == SIZE
    values = np.asarray(small.value_sum) / np.asarray(small.mass)[:, None]
    np.testing.assert_allclose(values, v[place], atol=1e-5)


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize("garbage", [np.nan, pytest.param(1e30, marks=pytest.mark.slow)])
def test_padding_never_enters(algorithm, garbage):
    _, k, v = shared_head(2)
    kv_mask = np.arange(NUM_KEYS) % 5 != 1
    soiled = (np.where(kv_mask[:, None], x, np.float32(garbage)) for x in (k, v))
    for a, b in zip(
        jax.tree.leaves(small_of(k, v, kv_mask, algorithm=algorithm)),
        jax.tree.leaves(small_of(*soiled, kv_mask, algorithm=algorithm)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


@pytest.mark.parametrize("algorithm", EVERY)
def test_nothing_is_made_of_nothing(algorithm):
    q, k, v = shared_head(3)
    state = attend(q, small_of(k, v, np.zeros(NUM_KEYS, bool), algorithm=algorithm))
    np.testing.assert_array_equal(state.out, 0)
    np.testing.assert_array_equal(state.lse, -np.inf)


@pytest.mark.parametrize(
    ("num_keys", "size"),
    [*(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (5, 5))), (5, 9)],
)
def test_all_is_kept_where_there_is_room(num_keys, size):
    q, k, v = random_head(4, 3, num_keys, 6, 3)
    by_algorithm = jax.jit(lambda k, v: {name: summary(k, v, size=size, algorithm=name) for name in EVERY})(k, v)
    for name, small in by_algorithm.items():
        np.testing.assert_allclose(attend(q, small).out, answers(q, k, v), atol=1e-5, err_msg=str(name))


@pytest.mark.parametrize("algorithm", ["halving", "stratified", "herding", *MERGES, "kmeans_nystrom", "uniform"])
def test_as_many_real_keys_as_places_are_kept_exactly(algorithm):
    q, k, v = shared_head(5)
    kv_mask = np.arange(NUM_KEYS) % 9 == 0
    assert kv_mask.sum() == SIZE
    out = attend(q, small_of(k, v, kv_mask, algorithm=algorithm)).out
    np.testing.assert_allclose(out, brute_force(q, k, v, scale=1.0, mask=kv_mask[None])[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize("spread", [*(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 1e-3)), 40.0])
def test_no_extreme_gives_a_number_that_is_not_one(algorithm, spread):
    q, k, v = random_head(6, 8, 60, 6, 3, spread=spread)

    def answer(k, v):
        return attend(q, summary(k, v, size=10, algorithm=algorithm, radius=jnp.float32(spread * 3))).out

    gradients = jax.grad(lambda k, v: answer(k, v).sum(), argnums=(0, 1))(k, v)
    assert all(np.isfinite(x).all() for x in (answer(k, v), *gradients))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SOME)
def test_half_precision_and_other_value_dimensions(algorithm):
    q, k, v = random_head(7, 4, 40, 6, 2, dtype=jnp.bfloat16)
    out = coreset(q, k, v, KEY, coreset_size=12, algorithm=algorithm)
    assert out.dtype == jnp.bfloat16
    assert out.shape == (4, 2)
    assert bool(jnp.isfinite(out).all())


# symmetries


@pytest.mark.parametrize("algorithm", ["halving", "stratified", "herding", *MERGES, "kmeans_nystrom", "nystrom_rpc"])
def test_moving_all_keys_changes_no_answer(algorithm):
    q, k, v = shared_head(8)
    move = np.linspace(-2, 2, HEAD_DIM, dtype=np.float32)
    plain, moved = (attend(q, small_of(x, v, algorithm=algorithm)).out for x in (k, np.asarray(k) + move))
    np.testing.assert_allclose(plain, moved, atol=2e-3)


@pytest.mark.parametrize("algorithm", ["halving", "herding", *MERGES])
def test_scaled_values_choose_the_same(algorithm):
    _, k, v = shared_head(9)
    plain, scaled = (small_of(k, x, algorithm=algorithm) for x in (v, 8 * np.asarray(v)))
    np.testing.assert_allclose(plain.k, scaled.k, atol=1e-6)
    np.testing.assert_allclose(8 * np.asarray(plain.value_sum), scaled.value_sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", SOME)
def test_the_key_decides_and_heads_are_mapped(algorithm):
    k, v = (np.stack([shared_head(seed)[i] for seed in (10, 11)]) for i in (1, 2))
    keys, mask = [jax.random.key(5), jax.random.key(6)], np.ones(NUM_KEYS, bool)
    mapped = jax.vmap(lambda k, v, key: summary(k, v, mask, key, size=SIZE, algorithm=algorithm))(k, v, jnp.stack(keys))
    for head in range(2):
        alone = small_of(k[head], v[head], key=keys[head], algorithm=algorithm)
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(a)[head], b, rtol=2e-4, atol=2e-4)


# exact cases


@pytest.mark.parametrize("rule", SIGN_RULES)
def test_pairs_of_equal_tokens_are_halved_exactly(rule):
    q, k, v = random_head(12, 6, 24, 6, 3)
    twice = (np.repeat(np.asarray(x), 2, axis=0) for x in (k, v))
    small = summary(*twice, size=24, algorithm=Halving(rule=rule))
    np.testing.assert_allclose(small.mass, 2, atol=1e-6)
    np.testing.assert_allclose(attend(q, small).out, answers(q, k, v), atol=1e-5)


def test_copies_are_halved_exactly_down_to_one_of_each():
    q, k, v = random_head(13, 6, 16, 6, 3)
    order = np.random.default_rng(0).permutation(128)
    small = summary(np.tile(k, (8, 1))[order], np.tile(v, (8, 1))[order], size=16, algorithm="halving")
    np.testing.assert_allclose(small.mass, 8, atol=1e-5)
    np.testing.assert_allclose(attend(q, small).out, answers(q, k, v), atol=1e-5)


@pytest.mark.parametrize("algorithm", MERGES)
def test_merges_are_exact_where_keys_are_equal_whatever_the_values(algorithm):
    q, k, v = shared_head(14)
    k = np.resize(np.asarray(k)[:SIZE], k.shape)
    np.testing.assert_allclose(attend(q, small_of(k, v, algorithm=algorithm)).out, answers(q, k, v), atol=1e-5)


@pytest.mark.parametrize("algorithm", SUBSETS + MERGES + ["kmeans_nystrom", "nystrom_rpc", "subgen"])
def test_equal_values_come_back(algorithm):
    q, k, v = shared_head(15)
    v = np.broadcast_to(np.asarray(v)[:1], v.shape)
    np.testing.assert_allclose(attend(q, small_of(k, v, algorithm=algorithm)).out, v[:6], atol=1e-4)


# instances on which some must fail


def lower_bound_instance(num_directions, radius, copies, seed=0):
    """Keys that no half can represent, with any masses; values are random signs in one channel."""
    blocks = max(1, round(np.exp(radius - 1)))
    a = radius**-0.5
    keys = np.zeros((blocks, num_directions, num_directions + blocks))
    for j in range(blocks):
        keys[j, np.arange(num_directions), np.arange(num_directions)] = a
        keys[j, :, num_directions + j] = np.sqrt(1 - a * a)
    values = np.random.default_rng(seed).choice([-1.0, 1.0], size=(blocks * num_directions, 1))
    k, v = np.tile(keys.reshape(-1, num_directions + blocks), (copies, 1)), np.tile(values, (copies, 1))
    k, v = np.asarray(k, np.float32), np.pad(v, [(0, 0), (0, VALUE_DIM - 1)]).astype(np.float32)
    return k, v, blocks * num_directions


@pytest.mark.parametrize("algorithm", SUBSETS)
def test_no_subset_is_smaller_than_the_lower_bound(algorithm):
    k, v, size = lower_bound_instance(4, 2.0, copies=4)
    assert size // 2 == SIZE
    padded = (np.pad(x, [(0, NUM_KEYS - len(k)), (0, 0)]) for x in (k, v))
    small = small_of(*padded, np.arange(NUM_KEYS) < len(k), algorithm=algorithm)
    assert error_of(k, v, small, 2.0) >= 1 / (4 * np.sqrt(4 / 2))


def test_halving_reaches_the_lower_bound():
    k, v, size = lower_bound_instance(4, 2.0, copies=4)
    small = summary(k, v, size=size, algorithm="halving", radius=np.float32(2.0))
    assert error_of(k, v, small, 2.0) < 1e-3


@pytest.mark.slow
def test_only_weights_keep_a_lone_key_among_many_opposite_ones():
    count = 55
    k = jnp.concatenate([jnp.ones((1, 1)), -jnp.ones((count, 1))])
    v = k
    small = {
        name: summary(k, v, size=7, algorithm=name, radius=2.0)
        for name in ("stratified", "kmeans_merge", "kmeans_nystrom", "uniform", "thinformer")
    }
    errors = {name: float(sup_error(k, v, small[name], 2.0).error) for name in small}
    assert max(errors[name] for name in ("stratified", "kmeans_merge", "kmeans_nystrom")) < 1e-3
    assert min(errors[name] for name in ("uniform", "thinformer")) > 0.5


@pytest.mark.slow
def test_better_than_uniform_sampling():
    k, v = clustered(29, 512)
    error = {
        name: np.mean(
            [
                float(sup_error(k, v, summary(k, v, None, jax.random.key(i), size=32, algorithm=name), 2.0).error)
                for i in range(4)
            ]
        )
        for name in ("uniform", "halving", "herding", "kmeans_merge", "kmeans_nystrom")
    }
    assert error["halving"] < 0.6 * error["uniform"]
    assert error["herding"] < 0.6 * error["uniform"]
    assert error["kmeans_merge"] < 0.2 * error["uniform"]
    assert error["kmeans_nystrom"] < 0.1 * error["uniform"]


# use with other parts of the library


def test_signed_masses_cannot_be_compressed_again():
    k, v = clustered(36, 64)
    with pytest.raises(ValueError, match="signed masses are not supported"):
        compress(small_of(k[:NUM_KEYS], v[:NUM_KEYS], algorithm="kmeans_nystrom"), KEY, coreset_size=4)
    for algorithm in ("halving", "kmeans_nystrom"):
        fold = functools.partial(coreset, coreset_size=8, algorithm=algorithm, is_causal=True)
        with pytest.raises(ValueError, match="streaming='fold' uses neither of algorithm and query_radius"):
            jax.eval_shape(fold, k, k, v, KEY)
    with pytest.raises(ValueError, match="makes signed masses, which a counter does not support"):
        jax.eval_shape(
            functools.partial(coreset, coreset_size=8, streaming="counter", is_causal=True, block_size=8), k, k, v, KEY
        )


def test_weighted_tokens_are_compressed_with_their_masses():
    k, v = clustered(37, 128)
    halves = [summary(k[part], v[part], size=32, algorithm="kmeans_merge") for part in (slice(0, 64), slice(64, 128))]
    both = jax.jit(lambda a, b: compress(merge(a, b), KEY, coreset_size=32, algorithm="kmeans_merge"))(*halves)
    assert np.asarray(both.mass).sum() == pytest.approx(128)
    assert error_of(k, v, both, 2.0) < 0.02


def test_the_query_radius_looks_at_the_last_queries():
    q = as_array(np.concatenate([np.full((10, 4), 9.0), np.ones((32, 4))]))
    assert float(query_radius(q)) == pytest.approx(1.1 * 2 / np.sqrt(2))
    assert float(query_radius(q, window=42, scale=1.0, margin=1.0)) == pytest.approx(18)


def test_a_coreset_merges_with_exact_keys():
    # States of a coreset merge with those of exact attention over other keys.
    q, k, v = random_head(44, 8, 48, 6, 3, spread=0.5)
    far, near = ([jax.device_put(np.asarray(x)[rows]) for x in (k, v)] for rows in (slice(40), slice(40, None)))
    far = attend(q, summary(*far, size=36, algorithm="kmeans_merge"))
    near = attend(q, compiled(WeightedKV.of_tokens)(*near))
    np.testing.assert_allclose(compiled(merge)(far, near).out, answers(q, k, v), atol=0.05)


def test_the_gradient_of_the_causal_form_is_that_of_the_clusters_it_made():
    """Clusters depend on rounding and may differ if they are made again for the gradient, so they are kept."""
    tensors = random_head(0, 21, 21)

    @jax.jit
    def gradients(*tensors):
        room_for_all = functools.partial(coreset, key=KEY, coreset_size=64, block_size=4, is_causal=True)
        return jax.grad(lambda *x: jnp.sum(jnp.sin(room_for_all(*x))), (0, 1, 2))(*tensors)

    q, k, v = (np.asarray(x, np.float64) for x in tensors)
    out, lse = brute_force(q, k, v, mask=causal_mask(21, 21))
    weights = np.where(causal_mask(21, 21), np.exp(q @ k.T / np.sqrt(8) - lse[:, None]), 0)
    d_out = np.cos(out)
    d_logits = weights * (d_out @ v.T - np.sum(d_out * out, axis=1, keepdims=True)) / np.sqrt(8)
    expected = d_logits @ k, d_logits.T @ q, weights.T @ d_out
    for ours, theirs in zip(gradients(*tensors), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_a_coreset_is_made_by_is_checked_where_none_is_needed():
    q, k, v = random_head(0, 8, 8)
    with pytest.raises(ValueError, match="did you mean 'halving'"):
        jax.eval_shape(functools.partial(sparse_coreset, algorithm="halvin"), q, k, v, KEY)

    class Unhashable:
        __hash__ = None

        def __call__(self, tokens, size, ratio, key):
            return tokens

    with pytest.raises(ValueError, match="algorithm must be hashable"):
        summarize_coreset(k, v, KEY, coreset_size=4, algorithm=Unhashable())
    for streaming in ("fold", "refit", "counter"):
        with pytest.raises(ValueError, match="max_length must be at least 1, got -5"):
            running_coreset(8, KEY, streaming=streaming, max_length=-5)
