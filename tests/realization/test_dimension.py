"""The number of channels that patterns need: searches, bounds from both sides, and the decision for one channel."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from approx_attention import SparsePattern, dimension_bound
from approx_attention.realization import (
    failure_bound,
    minimal_dimension,
    one_dimensional_order,
    realizable_in_one_dimension,
)
from approx_attention.realization.constructions import Search, draw_until_accepted
from approx_attention.realization.dimension import log_t_tail
from tests.realization.test_realization import KEY, N


def failures(method, d, num_tokens, num_keys, num_draws, width):
    """The share of draws that are not accepted with the first ``d`` of ``width`` channels."""
    keys = jax.random.split(jax.random.key(11), num_draws)
    return 1 - np.mean(np.asarray(accepted(keys, d, method, num_tokens, num_keys, width)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def accepted(keys, d, method, num_tokens, num_keys, width):
    def draw(key):
        key_pattern, key_draw = jax.random.split(key)
        pattern = SparsePattern.random(key_pattern, num_tokens, num_keys)
        search = Search(method, width, jnp.dtype(jnp.float32))
        return draw_until_accepted(pattern, (0.1, 0.1, math.inf), None, d, key_draw, search=search).certificate.ok

    return jax.lax.map(draw, keys, batch_size=50)


@pytest.mark.parametrize(("d", "measured"), [(35, 0.32), (40, 0.13), (50, 0.023)])
def test_least_squares_fail_as_often_as_the_bound_says(d, measured):
    bound = failure_bound(64, 2, d)
    rate = failures("ls", d, 64, 2, 300, width=50)
    assert rate <= bound + 3 * math.sqrt(bound * (1 - bound) / 300)
    # The bound is not loose: at least half of it is reached.
    assert rate >= 0.5 * bound - 3 * math.sqrt(bound * (1 - bound) / 300)
    assert abs(rate - measured) < 4 * math.sqrt(2 * measured * (1 - measured) / 300)


@pytest.mark.parametrize("freedom", [1, 2, 7, 60, 500])
@pytest.mark.parametrize("sharpness", [1e-6, 0.1, 0.5, 2.0])
def test_the_tail_of_student(freedom, sharpness):
    expected = stats.t.logsf(math.sqrt(freedom) * sharpness, freedom)
    np.testing.assert_allclose(log_t_tail(freedom, sharpness), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("n", "k", "exact_dim", "closed"),
    [(64, 1, 20, 24), (64, 8, 120, 146), (256, 2, 48, 56), (1024, 4, 112, 128), (4096, 8, 257, 290)],
)
def test_least_squares_bounds_by_their_definitions(n, k, exact_dim, closed):
    found = dimension_bound(n, k, 0.1, 0.1, kind="least_squares_exact")
    assert (found.dim, found.standing, found.vacuous) == (exact_dim, "proved", exact_dim >= n)
    assert n * (n - k) * stats.t.sf(math.sqrt((exact_dim - k + 1) / k), exact_dim - k + 1) <= 0.5
    assert n * (n - k) * stats.t.sf(math.sqrt((exact_dim - k) / k), exact_dim - k) > 0.5
    assert dimension_bound(n, k, 0.1, 0.1, kind="least_squares").dim == closed
    lifted = dimension_bound(n, k, 0.1, 0.1, kind="least_squares_exact", tau=4 * math.log(10)).dim
    spread = dimension_bound(n, k, 0.1, 0.1, kind="least_squares_exact", tau=4 * math.log(10), gamma=4.0).dim
    assert found.dim < lifted < spread or k == 1


def test_least_squares_bounds_where_they_are_hardest():
    for kind in ("least_squares", "least_squares_exact"):
        # A row that sees every key still has to be interpolated.
        assert dimension_bound(8, 8, 0.1, 0.1, kind=kind).dim == 8
    # With almost no slack in the gap, tails of a billion degrees of freedom are summed.
    gap, tau = math.log(10), math.log(10) + 1e-3
    closed, exact_dim = (
        dimension_bound(1024, 4, 0.1, 0.1, kind=kind, tau=tau).dim for kind in ("least_squares", "least_squares_exact")
    )
    sharpness = (tau - gap) / math.sqrt(4) / tau
    normal = stats.norm.isf(0.5 / (1024 * 1020)) ** 2 / sharpness**2
    np.testing.assert_allclose(exact_dim, normal, rtol=1e-3)
    assert exact_dim < closed < 1.3 * exact_dim


def test_bounds_of_projections_by_their_definitions():
    assert dimension_bound(1024, 4, 0.1, 0.1, kind="johnson_lindenstrauss") == (650133, False, "proved", True)
    kappa = math.log(10) / math.log(1.5)
    heuristic = dimension_bound(1024, 2, 0.1, 0.5, kind="projection_heuristic")
    gaussian = 8 * kappa**2 * math.log(1024 * 2)
    assert heuristic == (math.ceil(gaussian), False, "heuristic", True)
    orthogonal = dimension_bound(1024, 2, 0.1, 0.5, kind="orthogonal_heuristic")
    assert orthogonal == (math.ceil(gaussian * 1024 / (gaussian + 1024)), False, "heuristic", False)
    strong = dimension_bound(128, 4, 0.1, 0.5, kind="donoho_tanner_strong")
    assert strong == (31, False, "asymptotic", False)
    assert dimension_bound(128, 4, 0.1, 0.5, kind="donoho_tanner_weak").dim < strong.dim
    assert dimension_bound(128, 4, 0.1, 0.5, kind="trigonometric").dim == 8
    assert dimension_bound(4, 1, 0.1, 0.5, kind="packing", max_logit=100.0) == (1, True, "proved", True)
    for options in ({"gamma": 4.0}, {"p": 0.01}):
        more = dimension_bound(1024, 4, 0.1, 0.1, kind="johnson_lindenstrauss", **options)
        assert more.dim > 650133


def test_the_bound_of_johnson_and_lindenstrauss_is_enough():
    d = dimension_bound(N, 1, 0.5, 0.0, kind="johnson_lindenstrauss").dim
    assert d > 100
    assert failures("projection", d, N, 1, 20, width=d) == 0


@pytest.mark.slow
def test_the_search_finds_what_draws_need():
    permutation = functools.partial(SparsePattern.random, num_tokens=N, keys_per_row=2)
    found = minimal_dimension(permutation, 0.1, 0.1, key=KEY, trials=3)
    assert len(found.per_trial) == 3
    assert found.dim == sorted(found.per_trial)[1]
    assert 6 < found.dim <= dimension_bound(N, 2, 0.1, 0.1, kind="least_squares_exact").dim
    again = minimal_dimension(permutation, 0.1, 0.1, key=KEY, trials=1, quantile=1.0)
    assert again.per_trial == found.per_trial[:1]
    hopeless = minimal_dimension(permutation, 0.1, 0.1, key=KEY, trials=1, max_dim=4)
    assert hopeless.dim == math.inf
    # Interpolation starts with one channel per key of a row, which may exceed the limit.
    full = SparsePattern.from_dense(np.ones((4, 4), np.float32))
    assert minimal_dimension(full, 0.1, 0.1, key=KEY, trials=1, max_dim=3).dim == math.inf
    assert minimal_dimension(full, 0.1, 0.1, key=KEY, trials=1, max_dim=4).dim == 4


@pytest.mark.slow
@pytest.mark.parametrize("num_keys", [2, 3, 4])
def test_one_channel_against_all_orders_of_keys(num_keys):
    orders = list(itertools.permutations(range(num_keys)))
    ends = [{frozenset(order[:i]) for i in range(num_keys + 1)} for order in orders]
    ends = [sets | {frozenset(range(num_keys)) - s for s in sets} for sets in ends]
    random, decisions = np.random.default_rng(0), set()
    for _ in range(300):
        rows = [
            np.flatnonzero(bits)
            for bits in random.random((random.integers(1, 6), num_keys)) < random.random()
            if bits.any()
        ]
        if not rows:
            continue
        pattern = SparsePattern.from_indices(rows, num_keys=num_keys)
        expected = any(all(frozenset(row.tolist()) in sets for row in rows) for sets in ends)
        assert realizable_in_one_dimension(pattern) is expected
        decisions.add(expected)
        if expected:
            queries, keys = one_dimensional_order(pattern)
            logits, seen = np.outer(queries, keys), np.asarray(pattern.to_dense()) > 0
            assert all(
                row[on].min() > row[~on].max(initial=-num_keys - 9) for row, on in zip(logits, seen, strict=True)
            )
    assert decisions == ({True} if num_keys == 2 else {True, False})
