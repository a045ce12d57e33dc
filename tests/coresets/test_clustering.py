"""The parts of coresets against loops: clusters, halving, landmarks, weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    WeightedKV,
    attend,
)
from approx_attention.coresets import (
    Halving,
    KMeansMerge,
    KMeansNystrom,
    PivotedNystrom,
    nearest,
    random_places,
    sensitivities,
)
from approx_attention.coresets.clustering import (
    cholesky_places,
    farthest_places,
    k_means,
    lasting_places,
    spread_places,
    with_nystrom_weights,
)
from approx_attention.coresets.halving import SIGN_RULES, group_length, halve, kernel_points, spread_over, tree_order
from tests.methods.test_coreset import KEY, answers, clustered, error_of, summary
from tests.references import as_array, compiled, random_head

attend, halve, k_means, kernel_points = compiled(attend, halve, k_means, kernel_points)
nearest, with_nystrom_weights, sensitivities = compiled(nearest, with_nystrom_weights, sensitivities)
farthest_places, tree_order, tokens_of = compiled(farthest_places, tree_order, WeightedKV.of_tokens)
random_places, spread_places, cholesky_places, lasting_places = compiled(
    random_places, spread_places, cholesky_places, lasting_places
)


def weighted(k, v, mass):
    """Tokens with masses, whose values are ``v``."""
    k, v, mass = map(np.asarray, (k, v, mass))
    return WeightedKV(*map(as_array, (k, v * mass[:, None], mass)))


@functools.partial(jax.jit, static_argnums=2)
def spread_in_order(tokens, order, groups):
    return spread_over(kernel_points(tokens, jnp.float32(0.5)), order, groups)


def test_the_greedy_rule_against_a_loop():
    random = np.random.default_rng(16)
    features = random.normal(size=(20, 2, 7))
    difference = features[:, 0] - features[:, 1]
    mass = random.integers(1, 4, size=(20, 2)).astype(float)
    total, kept = np.zeros(7), []
    for d, (a, b) in zip(difference, mass, strict=True):
        keep = np.linalg.norm(total + b * d) < np.linalg.norm(total - a * d)
        total += b * d if keep else -a * d
        kept.append(keep)
    arrays = map(as_array, (difference @ difference.T, *mass.T, np.full(20, 0.3)))
    signs = compiled(SIGN_RULES["greedy"])(*arrays, 0.5)
    np.testing.assert_array_equal(signs, kept)


@pytest.mark.parametrize("rule", ["search", "greedy", "thinning"])
def test_signs_cancel_better_than_coins(rule):
    random = np.random.default_rng(17)
    difference = random.normal(size=(10, 64, 5))
    gram = difference @ difference.swapaxes(1, 2)
    one = as_array(np.ones(64))
    coin = as_array(random.uniform(size=(10, 64)))
    keep = jax.jit(jax.vmap(lambda gram, coin: SIGN_RULES[rule](gram, one, one, coin, 0.5)))(as_array(gram), coin)
    signs = np.where(keep, 1, -1)
    left = np.einsum("si,sij,sj->s", signs, gram, signs)
    by_coin = np.trace(gram, axis1=1, axis2=2)
    assert left.mean() < {"search": 0.02, "greedy": 0.1, "thinning": 0.6}[rule] * by_coin.mean()


@pytest.mark.parametrize("interleaved", [True, False])
def test_halving_keeps_one_of_each_pair_and_its_mass(interleaved):
    _, k, v = random_head(18, 1, 44, 6, 3)
    mass = np.random.default_rng(0).integers(0, 4, 44)
    points = kernel_points(weighted(k, v, mass), jnp.float32(0.5))
    half = halve(points, as_array(np.linspace(0, 1, 22)), rule="greedy", block=12, interleaved=interleaved)
    np.testing.assert_array_equal(half.mass, mass.reshape(22, 2).sum(1))
    place = np.asarray(half.place)
    np.testing.assert_array_equal(place // 2, np.arange(22))
    assert (mass[place][np.asarray(half.mass) > 0] > 0).all()


BY_CHANCE = ["thinformer", "balance_kv", Halving(rule="walk"), Halving(rule="thinning")]


@pytest.mark.parametrize("algorithm", BY_CHANCE, ids=str)
def test_no_place_in_the_sequence_is_preferred(algorithm):
    _, k, v = random_head(49, 1, 32, 4, 2, spread=0.3)
    run = jax.jit(jax.vmap(lambda key: summary(k, v, None, key, size=8, algorithm=algorithm)))
    small = run(jax.random.split(KEY, 400))
    place = np.abs(np.asarray(small.k)[:, :, None] - np.asarray(k)[None, None]).sum(-1).argmin(-1)
    weight = np.zeros(32)
    np.add.at(weight, place.reshape(-1), np.asarray(small.mass).reshape(-1) / 400)
    assert weight.max() < 1.8 * weight.mean()
    assert weight.min() > 0.3 * weight.mean()


@pytest.mark.parametrize("rule", ["walk", "thinning", "compress"])
def test_random_rules_keep_masses_on_average(rule):
    random = np.random.default_rng(50)
    difference = random.normal(size=(32, 5))
    gram = as_array(difference @ difference.T)
    heavy, light = (as_array(np.full(32, x)) for x in (9e-3, 1e-3))
    coins = as_array(random.uniform(size=(300, 32)))
    keep = jax.jit(jax.vmap(lambda coin: SIGN_RULES[rule](gram, heavy, light, coin, 0.5)))(coins)
    assert np.asarray(keep).mean() == pytest.approx(0.9, abs=0.05)


def test_a_value_that_is_not_a_number_costs_no_other_token():
    _, k, v = random_head(51, 1, 128, 6, 3)
    v = np.array(v)
    v[7, 0] = np.nan
    small = summary(np.asarray(k), v, np.arange(128) < 80, size=16, algorithm="halving")
    assert np.asarray(small.mass).sum() == pytest.approx(80)


def test_large_groups_do_not_overflow():
    count, groups = 131036, 65500
    nothing = np.zeros((count, 1))
    points = spread_in_order(weighted(nothing, nothing, np.ones(count)), np.arange(count, dtype=np.int32), groups)
    assert np.asarray(points.mass, np.float64).sum() == count


def test_an_unfactorable_kernel_leaves_finite_gradients():
    _, k, v = random_head(52, 1, 300, 2, 2, spread=0.3)
    algorithm = KMeansNystrom(ridge=1e-8)
    loss = lambda k, v: summary(k, v, size=150, algorithm=algorithm).value_sum.sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(k, v)
    assert all(np.isfinite(x).all() for x in gradients)


def test_the_tree_brings_neighbours_together():
    _, k, v = random_head(19, 1, 300, 3, 1)
    mass = np.arange(300) < 250
    points = kernel_points(weighted(np.where(mass[:, None], k, 0), v, mass), jnp.float32(0.5))
    order = np.asarray(tree_order(points, 4))
    assert sorted(order) == list(range(300))
    assert (order[250:] >= 250).all()
    apart = [np.linalg.norm(np.diff(np.asarray(k)[x], axis=0), axis=1)[::2].mean() for x in (order[:250], range(250))]
    assert apart[0] < 0.75 * apart[1]


@pytest.mark.parametrize(("num_keys", "groups"), [(7, 3), (64, 16), (100, 9), (5, 5)])
def test_groups_get_equally_many(num_keys, groups):
    _, k, v = random_head(20, 1, num_keys, 3, 1)
    mass = (np.arange(num_keys) % 4 != 3).astype(np.float32)
    points = spread_in_order(WeightedKV(k, v, mass), np.argsort(mass == 0, stable=True).astype(np.int32), groups)
    held = np.asarray(points.mass) > 0
    counts = held.reshape(groups, group_length(num_keys, groups)).sum(1)
    assert counts.sum() == mass.sum()
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(np.sort(np.asarray(points.place)[held]), np.flatnonzero(mass))


def test_nearest_and_merged_against_a_loop():
    _, k, v = random_head(21, 1, 50, 4, 2)
    mass = np.random.default_rng(0).integers(0, 3, 50)
    tokens = weighted(k, v, mass)
    start = as_array(np.arange(6), jnp.int32)
    clusters = jax.tree.map(np.asarray, k_means(tokens, start, 1))
    present = np.asarray(mass)[:6] > 0
    distance = np.linalg.norm(np.asarray(k)[:, None] - np.asarray(k)[None, :6], axis=-1)
    label = np.where(present[None], distance, np.inf).argmin(1)
    np.testing.assert_array_equal(nearest(k, as_array(np.asarray(k)[:6]), as_array(present, bool)), label)
    for cluster in range(6):
        members = label == cluster
        total = np.asarray(mass)[members].sum()
        assert float(clusters.mass[cluster]) == total
        if total:
            mean = (np.asarray(k) * np.asarray(mass)[:, None])[members].sum(0) / total
            np.testing.assert_allclose(clusters.k[cluster], mean, atol=1e-5)
            np.testing.assert_allclose(
                clusters.value_sum[cluster], np.asarray(tokens.value_sum)[members].sum(0), atol=1e-5
            )


def test_farthest_places_against_a_loop():
    k = np.random.default_rng(22).normal(size=(40, 4)).astype(np.float32)
    chosen = [int(np.linalg.norm(k, axis=1).argmax())]
    while len(chosen) < 7:
        chosen.append(int(np.linalg.norm(k[:, None] - k[None, chosen], axis=-1).min(1).argmax()))
    np.testing.assert_array_equal(farthest_places(as_array(k), as_array(np.ones(40), bool), 7), chosen)


@pytest.mark.parametrize("places", [random_places, spread_places, cholesky_places, lasting_places])
def test_places_are_distinct_and_real(places):
    _, k, v = random_head(23, 1, 60, 4, 2)
    tokens = tokens_of(k, v, as_array(np.arange(60) % 3 != 0, bool))
    argument = {random_places: (tokens.mass, 12), spread_places: (tokens, 12), lasting_places: (tokens, 12)}.get(
        places, (tokens, jnp.float32(1), 12)
    )
    place = np.asarray(places(*argument, KEY))
    assert len(set(place)) == 12
    assert (place % 3 != 0).all()


def test_outliers_are_seeded():
    k, v = clustered(24, 400, num_clusters=3, noise=0.01)
    k[17] = -3 * k[0]
    places = np.asarray(spread_places(tokens_of(as_array(k), as_array(v)), 8, KEY))
    assert 17 in places


def test_nystrom_weights_against_float64():
    _, k, v = random_head(25, 1, 50, 4, 2, spread=0.7)
    mass = np.random.default_rng(0).integers(1, 4, 50).astype(np.float64)
    tokens, places = weighted(k, v, mass), np.arange(9)
    landmarks = weighted(np.asarray(k)[:9], np.asarray(v)[:9], np.ones(9))
    solved = with_nystrom_weights(tokens, landmarks, jnp.float32(0.5), 1e-3)
    x, c, v = (np.asarray(a, np.float64) for a in (k, np.asarray(k)[places], v))

    def kernel(a, b):
        return np.exp(0.5 * (a @ b.T - (a**2).sum(1)[:, None] / 2 - (b**2).sum(1)[None] / 2))

    middle = mass @ v / mass.sum()
    scale = np.exp((x**2).sum(1) / 4)
    right = kernel(c, x) @ (scale[:, None] * mass[:, None] * np.c_[v - middle, np.ones(50)])
    weights = np.linalg.solve(kernel(c, c) + 1e-3 * np.eye(9), right) / np.exp((c**2).sum(1) / 4)[:, None]
    np.testing.assert_allclose(solved.mass, weights[:, -1], rtol=2e-3)
    np.testing.assert_allclose(solved.value_sum, weights[:, :-1] + weights[:, -1:] * middle, rtol=5e-3, atol=5e-3)


def test_nystrom_weights_are_never_worse_than_the_merge_by_much():
    for spread in (0.5, 2.0, 5.0):
        _, k, v = random_head(26, 1, 300, 5, 3, spread=spread)
        radius = float(np.linalg.norm(np.asarray(k) - np.asarray(k).mean(axis=0), axis=1).max())
        solved, merged = (
            error_of(k, v, summary(k, v, size=40, algorithm=a), radius) for a in (KMeansNystrom(), KMeansMerge())
        )
        assert solved < 2 * merged


@pytest.mark.slow
def test_more_landmarks_than_the_rank_of_the_kernel():
    q, k, v = random_head(27, 5, 200, 2, 2, spread=0.3)
    for algorithm in ("kmeans_nystrom", "nystrom_rpc", PivotedNystrom(ridge=1e-6)):
        out = attend(q, summary(k, v, size=150, algorithm=algorithm)).out
        np.testing.assert_allclose(out, answers(q, k, v), atol=1e-3)


def test_sensitivities_against_a_loop():
    _, k, v = random_head(28, 1, 30, 4, 2)
    tokens = tokens_of(k, v, as_array(np.arange(30) != 3, bool))
    x = np.asarray(tokens.k, np.float64)
    weights = np.exp(1.3 * x @ x.T) * np.asarray(tokens.mass)[None]
    expected = np.diagonal(weights) / weights.sum(1) * np.asarray(tokens.mass)
    np.testing.assert_allclose(sensitivities(tokens, jnp.float32(1.3), KEY, sample=29), expected, rtol=1e-4)


def test_lasting_places_against_a_loop():
    random = np.random.default_rng(21)
    k, mass = random.normal(size=(24, 3)), random.integers(1, 5, size=24).astype(float)
    tokens = weighted(k, k, mass)
    order = np.asarray(jax.random.uniform(KEY, (24,), jnp.float32))
    costs = []
    for i in range(24):
        larger = [j for j in range(24) if (mass[j], order[j]) > (mass[i], order[i])]
        ward = [mass[i] * mass[j] / (mass[i] + mass[j]) * np.sum((k[i] - k[j]) ** 2) for j in larger]
        costs.append(min(ward, default=np.inf))
    expected = set(np.argsort(costs)[::-1][:9])
    assert set(np.asarray(lasting_places(tokens, 9, KEY)).tolist()) == expected


def test_lasting_places_are_those_of_distinct_keys_and_never_of_padding():
    _, k, v = random_head(22, 1, 30)
    k = as_array(np.tile(np.asarray(k)[:10], (3, 1)))  # each of ten keys three times
    real = as_array(np.arange(30) != 4, bool)
    places = np.asarray(lasting_places(tokens_of(k, v, real), 10, KEY))
    assert 4 not in places
    assert len({tuple(row) for row in np.asarray(k)[places]}) == 10
