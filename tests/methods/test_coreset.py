"""Coresets and compressed caches against brute force, limits in which they are exact, and instances that must fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    Decoder,
    WeightedKV,
    attend,
    bounds,
    coreset,
    exact,
    merge,
    sparse_coreset,
    summarize_coreset,
)
from approx_attention.coresets import ALGORITHMS, Halving, compress, query_radius, running_coreset
from approx_attention.coresets.halving import SIGN_RULES
from approx_attention.evaluation import sup_error
from tests.methods.case import Case, within_block
from tests.references import brute_force, compiled, random_head

CASES = {
    "coreset": Case(
        changes={"algorithm": "halving", "query_radius": 9.0, "streaming": "counter", "sinks": 0},
        # The causal form folds, by whichever algorithm and radius.
        changes_are_causal=False,
        contexts={
            "streaming": {"is_causal": True, "algorithm": "kmeans_merge"},
            "sinks": {"is_causal": True},
            "block_size": {"is_causal": True},
        },
        # As many tokens as there are keys, and so what one device has.
        devices={"coreset_size": 64, "block_size": 4},
    ),
    # Two of four tokens leave k-means no choice.
    "sparse_coreset": Case(size=within_block, changes={"algorithm": "uniform"}, random={"block_size": 8}),
}

attend = compiled(attend)

SUBSETS = ["halving", "stratified", "herding", "thinformer", "uniform", "value_norm"]
MERGES = ["kmeans_merge", "farthest_merge"]
SIGNED = ["kmeans_nystrom", "nystrom_rpc", "balance_kv", "subgen"]
EVERY = SUBSETS + MERGES + SIGNED
# Compiling all of them takes minutes: where one of a kind says most, the others are slow tests.
OF_EACH_KIND = ["stratified", "kmeans_nystrom"]
SOME = [name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
KEY = jax.random.key(5)


def test_every_algorithm_is_tested():
    assert sorted(EVERY) == sorted(ALGORITHMS)


@functools.partial(jax.jit, static_argnames=("size", "algorithm"))
def summary(k, v, kv_mask=None, key=KEY, *, size, algorithm, radius=None):
    return summarize_coreset(k, v, key, coreset_size=size, algorithm=algorithm, query_radius=radius, kv_mask=kv_mask)


def clustered(seed, num_keys, num_clusters=8, head_dim=6, value_dim=3, noise=0.05):
    random = np.random.default_rng(seed)
    label = random.integers(num_clusters, size=num_keys)
    k = random.normal(size=(num_clusters, head_dim))[label] + noise * random.normal(size=(num_keys, head_dim))
    v = random.normal(size=(num_clusters, value_dim))[label] + noise * random.normal(size=(num_keys, value_dim))
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    return jnp.asarray(k, jnp.float32), jnp.asarray(v / np.linalg.norm(v, axis=1).max(), jnp.float32)


def answers(q, k, v):
    return brute_force(q, k, v, scale=1.0)[0]


# what every algorithm keeps


@pytest.mark.parametrize("algorithm", SUBSETS + MERGES)
@pytest.mark.parametrize("num_keys", [41, pytest.param(64, marks=pytest.mark.slow)])
def test_mass_is_kept_and_values_stay_in_their_hull(algorithm, num_keys):
    q, k, v = random_head(0, 5, num_keys, 6, 3)
    kv_mask = jnp.arange(num_keys) % 7 != 2
    small = summary(k, v, kv_mask, size=9, algorithm=algorithm)
    assert small.k.shape == (9, 6)
    assert float(small.mass.sum()) == pytest.approx(float(kv_mask.sum()), rel=1e-5)
    assert (small.mass >= 0).all()
    out, real = np.asarray(attend(q, small).out), np.asarray(v)[np.asarray(kv_mask)]
    assert (out <= real.max(0) + 1e-5).all()
    assert (out >= real.min(0) - 1e-5).all()


@pytest.mark.parametrize("algorithm", SUBSETS)
def test_subsets_are_subsets(algorithm):
    _, k, v = random_head(1, 1, 50, 6, 3)
    small = summary(k, v, size=8, algorithm=algorithm)
    distance = np.linalg.norm(np.asarray(small.k)[:, None] - np.asarray(k)[None], axis=-1)
    place = distance.argmin(1)
    assert distance.min(1).max() < 1e-5
    assert len(set(place)) == 8
    np.testing.assert_allclose(small.values, v[place], atol=1e-5)


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize("garbage", [np.nan, pytest.param(1e30, marks=pytest.mark.slow)])
def test_padding_never_enters(algorithm, garbage):
    _, k, v = random_head(2, 1, 40, 6, 3)
    kv_mask = jnp.arange(40) % 5 != 1
    soiled = (x.at[1::5].set(garbage) for x in (k, v))
    for a, b in zip(
        jax.tree.leaves(summary(k, v, kv_mask, size=8, algorithm=algorithm)),
        jax.tree.leaves(summary(*soiled, kv_mask, size=8, algorithm=algorithm)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


@pytest.mark.parametrize("algorithm", EVERY)
def test_nothing_is_made_of_nothing(algorithm):
    q, k, v = random_head(3, 4, 40, 6, 3)
    state = attend(q, summary(k, v, jnp.zeros(40, bool), size=8, algorithm=algorithm))
    np.testing.assert_array_equal(state.out, 0)
    np.testing.assert_array_equal(state.lse, -np.inf)


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize(
    ("num_keys", "size"),
    [*(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (5, 5))), (5, 9)],
)
def test_all_is_kept_where_there_is_room(algorithm, num_keys, size):
    q, k, v = random_head(4, 3, num_keys, 6, 3)
    np.testing.assert_allclose(
        attend(q, summary(k, v, size=size, algorithm=algorithm)).out, answers(q, k, v), atol=1e-5
    )


@pytest.mark.parametrize("algorithm", ["halving", "stratified", "herding", *MERGES, "kmeans_nystrom", "uniform"])
def test_as_many_real_keys_as_places_are_kept_exactly(algorithm):
    q, k, v = random_head(5, 6, 40, 6, 3)
    kv_mask = jnp.arange(40) % 5 == 0
    out = attend(q, summary(k, v, kv_mask, size=8, algorithm=algorithm)).out
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
    q, k, v = random_head(8, 5, 48, 6, 3)
    move = jnp.linspace(-2, 2, 6)
    plain, moved = (attend(q, summary(x, v, size=12, algorithm=algorithm)).out for x in (k, k + move[None]))
    np.testing.assert_allclose(plain, moved, atol=2e-3)


@pytest.mark.parametrize("algorithm", ["halving", "herding", *MERGES])
def test_scaled_values_choose_the_same(algorithm):
    _, k, v = random_head(9, 5, 48, 6, 3)
    plain, scaled = (summary(k, x, size=12, algorithm=algorithm) for x in (v, 8 * v))
    np.testing.assert_allclose(plain.k, scaled.k, atol=1e-6)
    np.testing.assert_allclose(8 * plain.value_sum, scaled.value_sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", SOME)
def test_the_key_decides_and_heads_are_mapped(algorithm):
    k, v = (jnp.stack([random_head(seed, 1, 40, 6, 3)[i] for seed in (10, 11)]) for i in (1, 2))
    keys = jax.random.split(KEY, 2)
    mapped = jax.vmap(lambda k, v, key: summary(k, v, None, key, size=10, algorithm=algorithm))(k, v, keys)
    for head in range(2):
        alone = summary(k[head], v[head], None, keys[head], size=10, algorithm=algorithm)
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[head], b, rtol=2e-4, atol=2e-4)


# where they are exact


@pytest.mark.parametrize("rule", SIGN_RULES)
def test_pairs_of_equal_tokens_are_halved_exactly(rule):
    q, k, v = random_head(12, 6, 24, 6, 3)
    small = summary(jnp.repeat(k, 2, 0), jnp.repeat(v, 2, 0), size=24, algorithm=Halving(rule=rule))
    np.testing.assert_allclose(small.mass, 2, atol=1e-6)
    np.testing.assert_allclose(attend(q, small).out, answers(q, k, v), atol=1e-5)


def test_copies_are_halved_exactly_down_to_one_of_each():
    q, k, v = random_head(13, 6, 16, 6, 3)
    order = np.random.default_rng(0).permutation(128)
    small = summary(jnp.tile(k, (8, 1))[order], jnp.tile(v, (8, 1))[order], size=16, algorithm="halving")
    np.testing.assert_allclose(small.mass, 8, atol=1e-5)
    np.testing.assert_allclose(attend(q, small).out, answers(q, k, v), atol=1e-5)


@pytest.mark.parametrize("algorithm", MERGES)
def test_merges_are_exact_where_keys_are_equal_whatever_the_values(algorithm):
    q, k, v = random_head(14, 6, 60, 6, 3)
    k = jnp.tile(k[:10], (6, 1))
    np.testing.assert_allclose(attend(q, summary(k, v, size=10, algorithm=algorithm)).out, answers(q, k, v), atol=1e-5)


@pytest.mark.parametrize("algorithm", SUBSETS + MERGES + ["kmeans_nystrom", "nystrom_rpc", "subgen"])
def test_equal_values_come_back(algorithm):
    q, k, v = random_head(15, 6, 60, 6, 3)
    v = jnp.broadcast_to(v[:1], v.shape)
    np.testing.assert_allclose(attend(q, summary(k, v, size=10, algorithm=algorithm)).out, v[:6], atol=1e-4)


# instances on which some must fail


def lower_bound_instance(num_directions, radius, copies, seed=0):
    """Keys of which no half can stand for all, whatever the masses: values are random signs."""
    blocks = max(1, round(np.exp(radius - 1)))
    a = radius**-0.5
    keys = np.zeros((blocks, num_directions, num_directions + blocks))
    for j in range(blocks):
        keys[j, np.arange(num_directions), np.arange(num_directions)] = a
        keys[j, :, num_directions + j] = np.sqrt(1 - a * a)
    values = np.random.default_rng(seed).choice([-1.0, 1.0], size=(blocks * num_directions, 1))
    k, v = np.tile(keys.reshape(-1, num_directions + blocks), (copies, 1)), np.tile(values, (copies, 1))
    return jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32), blocks * num_directions


@pytest.mark.parametrize("algorithm", SUBSETS)
def test_no_subset_is_smaller_than_the_lower_bound(algorithm):
    k, v, size = lower_bound_instance(16, 2.0, copies=4)
    small = summary(k, v, size=size // 2, algorithm=algorithm, radius=2.0)
    assert float(sup_error(k, v, small, 2.0).error) >= 1 / (4 * np.sqrt(16 / 2))


def test_halving_reaches_the_lower_bound():
    k, v, size = lower_bound_instance(16, 2.0, copies=4)
    assert float(sup_error(k, v, summary(k, v, size=size, algorithm="halving", radius=2.0), 2.0).error) < 1e-3


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


# certificates


@pytest.mark.parametrize("algorithm", MERGES)
@pytest.mark.parametrize("radius", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_the_merge_bound_holds(algorithm, radius):
    for k, v in (clustered(30, 200), random_head(30, 1, 200, 3, 2, spread=0.5)[1:]):
        small = summary(k, v, size=24, algorithm=algorithm)
        largest = float(jnp.linalg.norm(v, axis=1).max())
        merged, bound = bounds.merge_bound(k, v, small, radius)
        assert float(merged.mass.sum()) == pytest.approx(200)
        found = float(sup_error(k, v, merged, radius).error) * largest
        assert found <= float(bound) + 1e-5
        assert found > 1e-6


def test_size_bounds():
    ask = functools.partial(bounds.coreset_size_bound, 0.1, radius=2.0, head_dim=64, num_keys=100000, failure=0.1)
    assert ask(result="uniform").size == pytest.approx(np.cosh(2.0) ** 2 * (64 + np.log(10)) / 0.01)
    assert ask(result="optimal").size == pytest.approx(8 * np.exp(2.0) / 0.1)
    assert ask(result="lower_bound").size == ask(result="optimal").size < ask(result="balance_kv").size
    assert ask(result="subgen").size == pytest.approx(6400)
    assert ask(result="balance_kv_lower_bound").size == pytest.approx(100)
    assert ask(result="thinformer").size == pytest.approx(np.log(100000) ** 1.5 / 0.1)
    assert ask(result="kernel_discrepancy").size == pytest.approx(80)
    assert not ask().vacuous
    assert ask(radius=20.0).vacuous
    assert ask(radius=5000.0).size == np.inf
    with pytest.raises(ValueError, match="must be positive"):
        bounds.coreset_size_bound(0.0, radius=1.0, head_dim=4, num_keys=10)


@pytest.mark.parametrize("radius", [0.0, 1.0, 6.0])
def test_sensitivities_are_enclosed(radius):
    k, _ = clustered(37, 40)
    mask = jnp.arange(40) < 36
    least, most = bounds.sensitivity(jnp.where(mask[:, None], k, jnp.nan), radius, kv_mask=mask)
    assert (least[36:] == 0).all()
    assert (most[36:] == 0).all()
    directions = jax.random.normal(jax.random.key(38), (4096, 6))
    q = radius * directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    found = jax.nn.softmax(q @ k[:36].T, axis=1).max(axis=0)
    assert (found <= most[:36] * (1 + 1e-5)).all()
    # The query that reaches the lower bound is in the ball, and random ones come near it.
    assert (least[:36] <= most[:36]).all()
    assert (found <= least[:36] * 1.01).all()
    np.testing.assert_allclose(least, most, rtol=0.02)


def test_bounds_of_sensitivities_hold_before_the_search_ends():
    k, _ = clustered(39, 40)
    early, late = (bounds.sensitivity(k, 5.0, num_steps=steps) for steps in (2, 500))
    assert (early.most >= late.least).all()
    assert (early.most > 1.2 * early.least).any()
    assert float(early.most.sum()) > float(late.most.sum())


def test_the_search_for_the_supremum_has_converged():
    k, v = clustered(32, 256)
    small = summary(k, v, size=16, algorithm="halving")
    few, many = (
        float(sup_error(k, v, small, 3.0, num_starts=starts, num_steps=steps).error)
        for starts, steps in ((24, 60), (128, 300))
    )
    assert few <= many * (1 + 1e-5)
    assert many <= 1.01 * few


# streams


@pytest.mark.parametrize(("streaming", "algorithm"), [("fold", "kmeans_nystrom"), ("counter", "halving")])
def test_streams_keep_the_mass_and_come_near_the_offline_coreset(streaming, algorithm):
    k, v = clustered(33, 512)
    running = running_coreset(6, KEY, coreset_size=32, algorithm=algorithm, streaming=streaming, max_length=512)

    @jax.jit
    def stream(k, v):
        state = running.init(3, jnp.float32)
        blocks = jax.tree.map(lambda x: x.reshape(16, 32, -1), (k, v))
        starts = 32 * jnp.arange(16, dtype=jnp.int32)
        mask = jnp.ones(32, bool)
        return jax.lax.scan(lambda s, x: (running.append(s, x[0], *x[1], mask), None), state, (starts, blocks))[0]

    small = running.read(stream(k, v))
    assert float(small.mass.sum()) == pytest.approx(512, rel=1e-5)
    offline = "kmeans_merge" if streaming == "fold" else "halving"
    allowed = 3 * float(sup_error(k, v, summary(k, v, size=32, algorithm=offline), 2.0).error)
    assert float(sup_error(k, v, small, 2.0).error) < allowed + 1e-3


@pytest.mark.parametrize("streaming", ["fold", "counter"])
def test_sinks_are_the_first_real_tokens_and_stay_exact(streaming):
    k, v = clustered(40, 96)
    options = {"algorithm": "kmeans_merge", "streaming": streaming, "sinks": 5, "max_length": 96}
    running = running_coreset(6, KEY, coreset_size=8, **options)
    mask = (jnp.arange(96) >= 6) & (jnp.arange(96) != 8)
    state, append = running.init(3, jnp.float32), jax.jit(running.append)
    for start in range(0, 96, 8):
        rows = slice(start, start + 8)
        state = append(state, jnp.int32(start), k[rows], v[rows], mask[rows])
    small = running.read(state)
    first = jnp.array([6, 7, 9, 10, 11])
    np.testing.assert_array_equal(small.k[:5], k[first])
    np.testing.assert_array_equal(small.value_sum[:5], v[first])
    np.testing.assert_array_equal(small.mass[:5], 1)
    assert float(small.mass.sum()) == pytest.approx(89)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [4, 24])
def test_the_counter_decodes_as_it_answers_causally(block_size):
    q, k, v = random_head(34, 100, 100, 6, 3)
    options = {"coreset_size": 8, "algorithm": "halving", "streaming": "counter"}
    whole = coreset(q, k, v, KEY, is_causal=True, block_size=block_size, **options)
    running = running_coreset(6, KEY, **options, max_length=100)
    decoder = Decoder(running=running, head_dim=6, value_dim=3, block_size=block_size)
    out, cache = jax.jit(decoder.prefill)(decoder.init(), q[:90], k[:90], v[:90])
    append, answer = jax.jit(decoder.append), jax.jit(decoder.attend)
    last = []
    for t in range(90, 100):
        cache = append(cache, k[t : t + 1], v[t : t + 1])
        last.append(answer(cache, q[t : t + 1]))
    np.testing.assert_allclose(jnp.concatenate([out, *last]), whole, atol=1e-5)


def test_a_counter_longer_than_its_levels_goes_on():
    k, v = clustered(35, 256)
    running = running_coreset(6, KEY, coreset_size=8, algorithm="halving", streaming="counter", max_length=32)
    state = running.init(3, jnp.float32)
    append = jax.jit(running.append)
    for start in range(0, 256, 8):
        state = append(state, jnp.int32(start), k[start : start + 8], v[start : start + 8], jnp.ones(8, bool))
    assert float(running.read(state).mass.sum()) == pytest.approx(256)


def test_signed_masses_cannot_be_compressed_again():
    k, v = clustered(36, 64)
    with pytest.raises(ValueError, match="signed masses are not supported"):
        compress(summary(k, v, size=16, algorithm="kmeans_nystrom"), KEY, coreset_size=8)
    with pytest.raises(ValueError, match="streaming='fold' merges clusters without regard to queries"):
        coreset(k, k, v, KEY, coreset_size=8, algorithm="halving", is_causal=True)
    with pytest.raises(ValueError, match="makes signed masses, which a counter does not support"):
        coreset(k, k, v, KEY, coreset_size=8, streaming="counter", is_causal=True, block_size=8)


def test_weighted_tokens_are_compressed_with_their_masses():
    k, v = clustered(37, 128)
    halves = [summary(k[part], v[part], size=32, algorithm="kmeans_merge") for part in (slice(0, 64), slice(64, 128))]
    both = compress(merge(*halves), KEY, coreset_size=32, algorithm="kmeans_merge")
    assert float(both.mass.sum()) == pytest.approx(128)
    assert float(sup_error(k, v, both, 2.0).error) < 0.02


def test_the_query_radius_looks_at_the_last_queries():
    q = jnp.concatenate([jnp.full((10, 4), 9.0), jnp.ones((32, 4))])
    assert float(query_radius(q)) == pytest.approx(1.1 * 2 / np.sqrt(2))
    assert float(query_radius(q, window=42, scale=1.0, margin=1.0)) == pytest.approx(18)


def test_a_coreset_merges_with_exact_keys():
    # A coreset is a summary like any other: its states merge with those of exact attention over other keys.
    q, k, v = random_head(44, 8, 48, 6, 3, spread=0.5)
    far = attend(q, summary(k[:40], v[:40], size=36, algorithm="kmeans_merge"))
    near = attend(q, WeightedKV.of_tokens(k[40:], v[40:]))
    np.testing.assert_allclose(merge(far, near).out, answers(q, k, v), atol=0.05)


def test_the_gradient_of_the_causal_form_is_that_of_the_clusters_it_made():
    """Made again for the gradient, clusters may come out otherwise: what hangs on rounding is kept."""
    q, k, v = random_head(0, 21, 21)

    def loss(method, **options):
        return lambda *tensors: jnp.sum(jnp.sin(method(*tensors, is_causal=True, **options)))

    room_for_all = loss(coreset, key=jax.random.key(0), coreset_size=64, block_size=4)
    found, expected = (jax.jit(jax.grad(function, (0, 1, 2)))(q, k, v) for function in (room_for_all, loss(exact)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_a_coreset_is_made_by_is_checked_where_none_is_needed():
    q, k, v = random_head(0, 8, 8)
    with pytest.raises(ValueError, match="did you mean 'halving'"):
        sparse_coreset(q, k, v, KEY, algorithm="halvin")

    class Unhashable:
        __hash__ = None

        def __call__(self, tokens, size, ratio, key):
            return tokens

    with pytest.raises(ValueError, match="algorithm must be hashable, as functions and frozen dataclasses are"):
        summarize_coreset(k, v, KEY, coreset_size=4, algorithm=Unhashable())
    for streaming in ("fold", "counter"):
        with pytest.raises(ValueError, match="max_length must be at least 1, got -5"):
            running_coreset(8, KEY, streaming=streaming, max_length=-5)
