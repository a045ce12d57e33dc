"""The search for the worst query covers the whole ball: soft queries inside, and sharp ones on its sphere."""

import functools
import itertools

import jax
import numpy as np
import pytest

from approx_attention import WeightedKV, bounds
from approx_attention.evaluation import sup_error
from tests.references import as_array, random_head


def weighted(k, v, mass):
    """The tokens with these masses: all summaries have one length, because the search is compiled for each."""
    mass = np.asarray(mass, np.float32)
    return WeightedKV(k, as_array(np.asarray(v) * mass[:, None]), as_array(mass))


def masses_doubled(k, v, side):
    """The tokens, with those of one side counted twice."""
    return weighted(k, v, np.where(side, 2, 1))


def answers(q, k, value_sum, mass):
    """Outputs of attention over weighted tokens, in float64."""
    q, k, value_sum, mass = (np.asarray(x, np.float64) for x in (q, k, value_sum, mass))
    logits = q @ k.T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights @ value_sum / (weights @ mass)[:, None]


def on_a_grid(k, v, summary, radius):
    """The largest error at any query of a line, on a grid that is dense at every scale."""
    ends = np.geomspace(1e-7, 1, 4000) * radius
    q = np.concatenate([-ends, [0], ends, np.linspace(-radius, radius, 8001)])[:, None]
    difference = answers(q, k, v, np.ones(len(k))) - answers(q, summary.k, summary.value_sum, summary.mass)
    return np.linalg.norm(difference, axis=1).max() / np.linalg.norm(v, axis=1).max()


@pytest.mark.parametrize("spread", [1.0, pytest.param(0.01, marks=pytest.mark.slow), 100.0])
def test_two_points_at_every_radius(spread):
    k = np.repeat([1.0, -1.0], 20)[:, None] * spread
    k, v = as_array(k), as_array(k * [1, 0])
    bad = masses_doubled(k, v, np.arange(40) < 20)
    for radius in (0.1, 1.0, 8.0, 30.0, 300.0, 3000.0):
        found = sup_error(k, v, bad, radius)
        assert float(found.error) == pytest.approx(on_a_grid(k, v, bad, radius), rel=0.01)
        assert abs(float(found.query[0])) <= radius * (1 + 1e-6)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_one_channel_against_a_dense_grid(seed):
    _, k, v = random_head(seed, 1, 40, 1, 2)
    summaries = [
        masses_doubled(k, v, np.asarray(k)[:, 0] > 0),
        masses_doubled(k, v, np.arange(40) % 3 == 0),
        weighted(k, v, np.arange(40) < 20),
    ]
    for summary in summaries:
        for radius in (0.3, 20.0, 200.0):
            found = float(sup_error(k, v, summary, radius).error)
            assert found >= 0.98 * on_a_grid(k, v, summary, radius), (radius, summary.mass[:4])


def test_a_larger_ball_never_has_a_smaller_error():
    _, k, v = random_head(3, 1, 60, 4)
    bad = masses_doubled(k, v, np.asarray(k)[:, 0] > 0)
    errors = [float(sup_error(k, v, bad, radius).error) for radius in (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)]
    assert all(after >= 0.98 * before for before, after in itertools.pairwise(errors))


def test_more_starts_never_find_less():
    _, k, v = random_head(4, 1, 60, 4)
    moved = np.asarray(v) + np.float32(0.1) * np.asarray(k)
    searches = [functools.partial(sup_error, num_starts=starts) for starts in (1, 6)] + [sup_error]  # 24 by default
    for summary in (masses_doubled(k, v, np.asarray(k)[:, 0] > 0), weighted(k, moved, np.ones(60))):
        found = [float(search(k, v, summary, 6.0).error) for search in searches]
        # Batches of different sizes are rounded differently, so ascents end at points that differ by less than a step.
        assert all(after >= before * (1 - 1e-3) for before, after in itertools.pairwise(found)), found


def test_keys_that_are_one_point_or_none():
    _, _, v = random_head(0, 1, 60, 4)
    k = as_array(np.ones((60, 4)))
    for real in (None, np.zeros(60, bool), np.arange(60) < 1):
        found = sup_error(k, v, weighted(k, v, np.ones(60) if real is None else real), 5.0, kv_mask=real)
        assert not float(found.error) > 1e-5
    assert float(sup_error(k, v, weighted(k, v, np.arange(60) < 30), 5.0).error) > 0.01


def test_sensitivities_bound_every_radius_of_the_ball():
    k = as_array(np.repeat([1.0, 0.1, -1.0], 4)[:, None])
    sensitivity = jax.jit(functools.partial(bounds.sensitivity, num_steps=400))
    for radius in (1.0, 30.0, 300.0):
        least, most = map(np.asarray, sensitivity(k, radius))
        q = np.concatenate([np.geomspace(1e-4, 1, 2000), -np.geomspace(1e-4, 1, 2000), [0]])[:, None] * radius
        logits = q @ np.asarray(k, np.float64).T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        reached = np.max(weights / weights.sum(axis=1, keepdims=True), axis=0)
        assert np.all(reached <= most * (1 + 1e-5))
        assert np.all(least <= most)
