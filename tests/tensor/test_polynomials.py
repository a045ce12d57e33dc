"""Polynomials that replace exp: coefficients have the properties of their names, and the certificates hold."""

import functools
import itertools
import math
from decimal import Decimal, localcontext
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Chebyshev, hermite_e, polynomial

from approx_attention.tensor import (
    Coefficients,
    choose_degree,
    exp_coefficients,
    minimax_error,
    polynomials,
    ratio_range,
    taken_by,
    weight_bound,
)

KINDS = get_args(Coefficients)

# The least degrees at which weights have these relative errors, by bound on the logits.
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
LEAST_DEGREES = {
    "taylor": {
        0.25: (1, 1, 3, 3, 5),
        0.5: (1, 3, 3, 5, 6),
        1: (2, 4, 5, 7, 9),
        2: (6, 7, 9, 10, 13),
        3: (9, 11, 13, 14, 17),
        4: (12, 14, 16, 18, 20),
        6: (20, 21, 23, 25, 28),
        8: (27, 29, 30, 32, 35),
        12: (41, 43, 44, 46, 50),
    },
    "chebyshev": {
        0.25: (1, 1, 2, 3, 4),
        0.5: (1, 2, 3, 4, 5),
        1: (2, 3, 4, 5, 7),
        2: (4, 5, 7, 8, 10),
        3: (6, 8, 9, 10, 12),
        4: (8, 10, 11, 12, 15),
        6: (13, 14, 16, 17, 19),
        8: (17, 19, 20, 21, 24),
        12: (26, 27, 29, 30, 33),
    },
    "minimax": {
        0.25: (1, 1, 2, 3, 4),
        0.5: (1, 2, 3, 4, 5),
        1: (2, 3, 4, 5, 7),
        2: (3, 4, 6, 7, 9),
        3: (4, 6, 7, 8, 11),
        4: (5, 7, 8, 10, 13),
        6: (7, 9, 11, 13, 16),
        8: (9, 12, 14, 15, 19),
        12: (13, 16, 18, 20, 24),
    },
}


@functools.cache
def certificate(kind, degree, bound, rms=None):
    coefficients = exp_coefficients(kind, degree, **taken_by(kind, bound=bound, rms=rms))
    return weight_bound(*ratio_range(coefficients, bound))


def exact_ratio(coefficients, x):
    """P(x) exp(-x) in 60 digits."""
    with localcontext(prec=60):
        powers = [Decimal(float(c)) for c in coefficients]
        return [sum(c * Decimal(t) ** k for k, c in enumerate(powers)) * (-Decimal(t)).exp() for t in x.tolist()]


@pytest.mark.parametrize("bound", [0.5, 2.0, 6.0])
def test_chebyshev_is_the_truncated_series(bound):
    series = Chebyshev.interpolate(np.exp, 60, domain=[-bound, bound])
    for degree in (0, 1, 5, 8):
        expected = series.truncate(degree + 1).convert(kind=np.polynomial.Polynomial).coef
        found = exp_coefficients("chebyshev", degree, bound=bound)
        x = np.linspace(-bound, bound, 7)
        np.testing.assert_allclose(
            polynomial.polyval(x, found), polynomial.polyval(x, expected), atol=1e-12 * np.exp(bound)
        )


@pytest.mark.parametrize("rms", [0.1, 1.0, 2.5])
def test_hermite_is_the_least_squares_fit(rms):
    nodes, weights = hermite_e.hermegauss(80)
    for degree in (0, 1, 4, 7):
        found = exp_coefficients("hermite", degree, rms=rms)
        error = polynomial.polyval(rms * nodes, found) - np.exp(rms * nodes)
        moments = polynomial.polyvander(nodes, degree).T @ (weights * error)
        scale = polynomial.polyvander(nodes, degree).T ** 2 @ (weights * np.exp(2 * rms * nodes))
        np.testing.assert_allclose(moments / np.sqrt(scale), 0, atol=1e-9)


@pytest.mark.parametrize("kind", ["chebyshev", "minimax", "hermite"])
def test_without_spread_every_kind_is_taylors(kind):
    taylor = exp_coefficients("taylor", 4)
    np.testing.assert_array_equal(taylor, [1, 1, 1 / 2, 1 / 6, 1 / 24])
    np.testing.assert_array_equal(exp_coefficients(kind, 4, **taken_by(kind, bound=0, rms=0)), taylor)
    np.testing.assert_allclose(exp_coefficients(kind, 4, **taken_by(kind, bound=1e-5, rms=1e-5)), taylor, rtol=1e-8)


@pytest.mark.parametrize(
    ("degree", "bound"), [(0, 0.5), (1, 2.0), (2, 8.0), (4, 1.0), (5, 4.0), (8, 3.0), (13, 12.0), (20, 6.0)]
)
def test_the_minimax_error_is_levelled(degree, bound):
    coefficients = exp_coefficients("minimax", degree, bound=bound)
    x = bound * -np.cos(np.linspace(0, np.pi, 4001))
    error = np.array([float(ratio - 1) for ratio in exact_ratio(coefficients, x)])
    # Extrema: the largest of each run of one sign.
    runs = [list(run) for _, run in itertools.groupby(error, key=lambda e: e > 0)]
    extrema = np.array([max(map(abs, run)) for run in runs])
    assert len(runs) == degree + 2
    rounding = 1e-16 * math.exp(2 * bound)
    np.testing.assert_allclose(extrema, extrema.max(), rtol=1e-4, atol=rounding)
    np.testing.assert_allclose(minimax_error(degree, bound), extrema.max(), rtol=1e-4, atol=rounding)


def test_no_other_kind_has_a_better_ratio_than_minimax():
    for degree, bound in itertools.product((1, 2, 5, 8), (0.5, 2.0, 4.0)):
        best = certificate("minimax", degree, bound)
        for kind in KINDS:
            assert certificate(kind, degree, bound, rms=bound / 3) >= best * (1 - 1e-9)


@pytest.mark.parametrize("kind", LEAST_DEGREES)
def test_the_least_degrees_are_those_of_the_theory(kind):
    for bound, degrees in LEAST_DEGREES[kind].items():
        for tolerance, degree in zip(TOLERANCES, degrees, strict=True):
            assert certificate(kind, degree, bound) <= tolerance < certificate(kind, degree - 1, bound), (bound, degree)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=9),
    st.floats(0.01, 8),
)
def test_the_range_of_the_ratio_is_that_of_a_fine_grid(coefficients, bound):
    lo, hi = ratio_range(coefficients, bound)
    x = bound * np.cos(np.linspace(0, np.pi, 20_001))
    ratio = polynomial.polyval(x, coefficients) * np.exp(-x)
    rounding = 1e-13 * polynomial.polyval(bound, np.abs(coefficients)) * math.exp(bound)
    assert lo <= ratio.min() + rounding
    assert hi >= ratio.max() - rounding
    # Two critical points may be closer than the spacing of the grid, but then the ratio is flat there.
    between = 1e-4 * polynomial.polyval(bound, np.abs(coefficients)) * math.exp(bound) * (1 + bound) ** 2
    assert ratio.min() - between <= lo <= hi <= ratio.max() + between


def test_the_ratio_of_taylor_has_its_closed_form():
    # Its derivative has the sign of -x^g, so for even g the extremes are at the ends.
    for degree, bound in ((2, 1.0), (6, 2.5), (12, 4.0)):
        lo, hi = ratio_range(exp_coefficients("taylor", degree), bound)
        partial = math.fsum(bound**k / math.factorial(k) for k in range(degree + 1))
        alternating = math.fsum((-bound) ** k / math.factorial(k) for k in range(degree + 1))
        assert lo == pytest.approx(partial * math.exp(-bound), rel=1e-14)
        assert hi == pytest.approx(alternating * math.exp(bound), rel=1e-12)
        remainder = bound ** (degree + 1) / math.factorial(degree + 1)
        assert 1 - remainder <= lo
        assert hi <= 1 + math.exp(bound) * remainder


def test_the_range_is_exact_where_floating_point_would_cancel():
    coefficients = exp_coefficients("minimax", 24, bound=12.0)
    lo, hi = ratio_range(coefficients, 12.0)
    ratio = exact_ratio(coefficients, 12 * np.cos(np.linspace(0, np.pi, 4001)))
    assert lo - 1 == pytest.approx(float(min(ratio) - 1), rel=1e-4)
    assert hi - 1 == pytest.approx(float(max(ratio) - 1), rel=1e-4)
    assert lo <= float(min(ratio)) * (1 + 1e-15)
    assert hi >= float(max(ratio)) * (1 - 1e-15)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=30),
    st.sampled_from([0.1, 0.5, 1.0, 2.0, 4.0]),
    st.sampled_from(KINDS),
    st.integers(0, 8),
)
def test_weights_are_never_further_off_than_their_bound(unit_logits, bound, kind, degree):
    logits = bound * np.array(unit_logits)
    coefficients = exp_coefficients(kind, degree, **taken_by(kind, bound=bound, rms=bound / 2))
    kernel, exponentials = polynomial.polyval(logits, coefficients), np.exp(logits)
    most = weight_bound(*ratio_range(coefficients, bound))
    if math.isfinite(most):
        error = np.abs(kernel / kernel.sum() - exponentials / exponentials.sum()).sum() / 2
        assert error <= most + 1e-13
        assert np.all(kernel > 0)


def test_the_bound_on_weights_is_reached():
    lo, hi = 0.7, 1.6
    share = np.linspace(0, 1, 100_001)
    mean = share * hi + (1 - share) * lo
    errors = (share * np.abs(hi - mean) + (1 - share) * np.abs(lo - mean)) / (2 * mean)
    assert errors.max() == pytest.approx(weight_bound(lo, hi), rel=1e-8)
    assert weight_bound(1.0, 1.0) == 0
    assert weight_bound(1.0, math.inf) == 1
    assert weight_bound(0.0, 1.0) == weight_bound(-1.0, 1.0) == math.inf


def test_polynomials_of_even_degree_are_positive_beyond_their_bound_and_those_of_odd_degree_are_not():
    x = np.linspace(-40, 40, 40_001)
    for degree in (2, 4, 6, 8):
        assert np.all(polynomial.polyval(x, exp_coefficients("taylor", degree)) > 0)
        assert np.all(polynomial.polyval(x[np.abs(x) < 12], exp_coefficients("minimax", degree, bound=2.0)) > 0)
        odd = exp_coefficients("minimax", degree - 1, bound=2.0)
        assert np.any(polynomial.polyval(x[np.abs(x) < 4], odd) < 0)


def test_certificates_improve_with_the_degree():
    for bound in (0.5, 2.0, 4.0):
        for kind in ("taylor", "minimax"):
            certified = [certificate(kind, degree, bound) for degree in range(0, 13, 2) if bound < degree + 2]
            assert all(after < before for before, after in itertools.pairwise(certified))


@pytest.mark.parametrize("kind", ["taylor", "minimax"])
@pytest.mark.parametrize(("tolerance", "bound"), [(1e-1, 1.0), (1e-2, 2.0), (1e-4, 0.25), (0.5, 0.1)])
def test_the_chosen_degree_is_the_least_even_one(kind, tolerance, bound):
    degree = choose_degree(tolerance, bound, 4, coefficients=kind)
    assert degree % 2 == 0
    assert certificate(kind, degree, bound) <= tolerance
    assert degree == 0 or certificate(kind, degree - 2, bound) > tolerance


def test_an_unaffordable_degree_says_what_it_would_need(monkeypatch):
    with pytest.raises(ValueError, match="needs degree 14, whose rank for 8 channels is 319770, more than max_rank"):
        choose_degree(1e-2, 4.0, 8, coefficients="taylor")
    assert choose_degree(1e-2, 4.0, 8, max_rank=12_870) == 8
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1, got 1.5"):
        choose_degree(1.5, 1.0, 2)
    monkeypatch.setattr(polynomials, "MAX_DEGREE", 10)
    with pytest.raises(ValueError, match="no chebyshev polynomial of even degree up to 10 meets tolerance 0.01"):
        choose_degree(1e-2, 8.0, 2, coefficients="chebyshev")


def test_bad_polynomials_are_refused():
    with pytest.raises(ValueError, match="coefficients must be one of .* did you mean 'minimax'"):
        exp_coefficients("minmax", 2, bound=1.0)
    with pytest.raises(ValueError, match="bound must be positive and at most 700, got 0.0"):
        minimax_error(2, 0.0)
    with pytest.raises(ValueError, match="minimax needs bound"):
        exp_coefficients("minimax", 2)
    with pytest.raises(ValueError, match="hermite needs rms"):
        exp_coefficients("hermite", 2)
    with pytest.raises(
        ValueError, match="bound is only for coefficients 'chebyshev' and 'minimax', got bound=1.0 with 'h"
    ):
        exp_coefficients("hermite", 2, bound=1.0)
    with pytest.raises(ValueError, match="got bound=-3.0 with 'taylor'"):
        exp_coefficients("taylor", 2, bound=-3.0)
    with pytest.raises(ValueError, match="rms is only for coefficients 'hermite', got rms=1.0 with 'minimax'"):
        choose_degree(1e-2, 1.0, 4, rms=1.0)
    with pytest.raises(ValueError, match="bound must be finite and not negative, got -1"):
        exp_coefficients("chebyshev", 2, bound=-1.0)
    with pytest.raises(ValueError, match="bound must be at most 700"):
        exp_coefficients("minimax", 2, bound=1e4)
    with pytest.raises(ValueError, match="rms must be at most 30"):
        exp_coefficients("hermite", 2, rms=40.0)
    with pytest.raises(ValueError, match="degree must be at least 0, got -1"):
        exp_coefficients("taylor", -1)
    with pytest.raises(TypeError, match="bound must be a number known when tracing"):
        jax.jit(lambda bound: exp_coefficients("minimax", 2, bound=bound))(1.0)
    with pytest.raises(ValueError, match="coefficients must be a vector of finite numbers"):
        ratio_range([1.0, math.nan], 1.0)


@pytest.mark.parametrize("kind", ["minimax", "chebyshev"])
def test_logits_beyond_what_float64_certifies_are_refused_at_once(kind):
    with pytest.raises(ValueError, match="is accurate for logits beyond 18, got 30"):
        choose_degree(1e-2, 30.0, 4, coefficients=kind)
