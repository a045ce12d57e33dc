"""The range of P e^-x is never too narrow: short dips below zero are found next to much larger ratios."""

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest

from approx_attention.tensor import Coefficients, exp_coefficients, ratio_range, taken_by, weight_bound

DIGITS = 90


def exactly(coefficients, x):
    """P(x) as an integer over an integer, at a number without rounding; fractions would be reduced at every step."""
    x, coefficients = Fraction(x), [Fraction(float(c)) for c in coefficients]
    unit = max(c.denominator for c in coefficients)  # all are powers of two
    total, power = 0, 1
    for c in reversed(coefficients):
        total = total * x.numerator + c.numerator * (unit // c.denominator) * power
        power *= x.denominator
    return total, unit * power // x.denominator


def value(coefficients, x):
    """P(x) in exact arithmetic."""
    return Fraction(*exactly(coefficients, x))


def ratio(coefficients, x):
    """P(x) exp(-x), at a Decimal."""
    numerator, denominator = exactly(coefficients, x)
    return Decimal(numerator) / Decimal(denominator) * (-x).exp()


def extremes(coefficients, bound, points=241):
    """The least and the greatest ratio on a grid of points of Chebyshev, refined about each extreme of the grid."""
    with localcontext(prec=DIGITS):
        golden = (Decimal(5).sqrt() - 1) / 2
        grid = [Decimal(-bound * math.cos(math.pi * i / (points - 1))) for i in range(points)]
        ratios = [ratio(coefficients, x) for x in grid]
        found = [ratios[0], ratios[-1]]
        for i in range(1, points - 1):
            sign = 1 if ratios[i] <= min(ratios[i - 1], ratios[i + 1]) else -1
            if sign == -1 and ratios[i] < max(ratios[i - 1], ratios[i + 1]):
                continue
            # Golden sections: of the two inner points, one is kept from step to step.
            low, high = grid[i - 1], grid[i + 1]
            inner = [high - golden * (high - low), low + golden * (high - low)]
            left, right = (sign * ratio(coefficients, x) for x in inner)
            for _ in range(34):
                if left < right:
                    high, right = inner[1], left
                    inner = [high - golden * (high - low), inner[0]]
                    left = sign * ratio(coefficients, inner[0])
                else:
                    low, left = inner[0], right
                    inner = [inner[1], low + golden * (high - low)]
                    right = sign * ratio(coefficients, inner[1])
            found.append(ratio(coefficients, low))
        return float(min(found)), float(max(found))


@pytest.mark.parametrize("kind", get_args(Coefficients))
@pytest.mark.parametrize("bound", [1.0, 10.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (30.0, 60.0)), 100.0])
def test_every_kind_against_a_refined_grid_in_many_digits(kind, bound):
    for degree, rms in ((0, 1.0), (1, 3.0), (2, 1.0), (5, 1.0), (9, 3.0), (14, 1.0)):
        coefficients = exp_coefficients(kind, degree, **taken_by(kind, bound=bound, rms=rms))
        lo, hi = ratio_range(coefficients, bound)
        least, greatest = extremes(coefficients, bound)
        assert lo <= least + 1e-14 * abs(least)
        assert hi >= greatest - 1e-14 * abs(greatest)
        # The range is too wide only where P is nearly 0.
        assert lo >= least - 1e-6 * abs(least) or (lo == 0 and least < 1e-14 * hi) or lo < 0
        assert hi == pytest.approx(greatest, rel=1e-6)


@pytest.mark.parametrize("degree", [2, 5, 8, 14, *(pytest.param(x, marks=pytest.mark.slow) for x in (11, 20, 26, 32))])
@pytest.mark.parametrize("kind", ["taylor", "chebyshev", "hermite"])
def test_no_bound_is_promised_where_a_polynomial_is_not_positive(kind, degree):
    for bound in (1.0, 3.0, 8.0, 20.0, 60.0, 100.0):
        coefficients = exp_coefficients(kind, degree, **taken_by(kind, bound=bound, rms=min(bound / 4, 5.0)))
        x = np.unique(np.concatenate([np.linspace(-bound, bound, 101), bound - np.geomspace(1e-6, 2 * bound, 60)]))
        some_negative = any(value(coefficients, t) <= 0 for t in x.tolist() if abs(t) <= bound)
        lo, hi = ratio_range(coefficients, bound)
        if some_negative:
            assert lo <= 0
            assert weight_bound(lo, hi) == math.inf
        if kind == "taylor" and degree % 2 == 0:
            assert lo > 0  # positive everywhere, and reported as positive


@pytest.mark.parametrize("bound", [1.0, 5.0, 10.0, 40.0, 100.0])
def test_planted_dips_are_found(bound):
    random = np.random.default_rng(0)
    for depth, factors in itertools.product((1e-4, 1e-8, 1e-12), (0, 2, 5)):
        centre = float(bound * random.uniform(-0.99, 0.99))
        exact = [Fraction(centre) ** 2 - Fraction(depth), -2 * Fraction(centre), Fraction(1)]
        for _ in range(factors):  # (x - a)^2 + b^2 is positive
            a, b = Fraction(float(random.normal())), Fraction(float(random.uniform(0.5, 2)))
            factor = [a * a + b * b, -2 * a, Fraction(1)]
            exact = [
                sum(exact[i] * factor[k - i] for i in range(len(exact)) if 0 <= k - i < 3)
                for k in range(len(exact) + 2)
            ]
        coefficients = np.array([float(c) for c in exact])
        lo, hi = ratio_range(coefficients, bound)
        # Rounded coefficients may fill the dip; the polynomial with the rounded coefficients counts.
        dip = min(value(coefficients, centre + shift * math.sqrt(depth)) for shift in (-0.5, 0.0, 0.5))
        if dip <= 0:
            assert lo <= 0, (bound, depth, factors)
            assert weight_bound(lo, hi) == math.inf
            with localcontext(prec=DIGITS):
                assert lo <= float(ratio(coefficients, Decimal(centre))) * (1 - 1e-12)
        assert dip <= 0 or factors, "nothing was planted"


def test_dips_that_were_missed():
    coefficients = [9.8**2 - 1e-6, -19.6, 1.0]
    lo, hi = ratio_range(coefficients, 10.0)
    assert lo == pytest.approx(-1e-6 * math.exp(-9.8), rel=1e-5)
    assert weight_bound(lo, hi) == math.inf
    lo, hi = ratio_range(exp_coefficients("hermite", 14, rms=1.0), 60.0)
    assert lo < -0.6
    assert weight_bound(lo, hi) == math.inf


def test_roots_that_only_touch_and_those_that_just_do_not():
    assert ratio_range([1.0, -2.0, 1.0], 3.0)[0] == 0  # (x - 1)^2
    assert ratio_range([0.0, 0.0, 1.0], 700.0)[0] == 0
    for root in (0.3, 1 / 3, math.pi):
        square = np.array([float(Fraction(root) ** 2), -2 * root, 1.0])
        assert ratio_range(square, 4.0)[0] <= max(float(value(square, root)), 0)
        # Far enough from zero to be resolved, and still small.
        lifted = square + np.array([1e-10, 0, 0])
        lo, hi = ratio_range(lifted, 4.0)
        assert lo == pytest.approx(float(value(lifted, root)) * math.exp(-root), rel=1e-6)
        assert 0.99 < weight_bound(lo, hi) < 1
    assert ratio_range([1.0, -1.0], 1.0)[0] == 0  # at the end
    assert ratio_range([1.0], 2.0) == pytest.approx((math.exp(-2), math.exp(2)))
    assert ratio_range([0.0], 2.0) == (0, 0)
    assert ratio_range([3.0, 1.0], 0.0) == (3, 3)


def test_ratios_beyond_the_range_of_floats():
    lo, hi = ratio_range([1e300, 0.0, 1e300], 300.0)
    assert hi == math.inf
    assert lo == pytest.approx(1e300 * (1 + 300.0**2) * math.exp(-300), rel=1e-12)
    assert weight_bound(lo, hi) == 1
    lo, hi = ratio_range([1.0, 0.0, 1e-300], 1000.0)
    assert (lo, hi) == (pytest.approx(0, abs=1e-300), math.inf)
    lo, hi = ratio_range([1e200] * 30, 1000.0)  # its terms overflow, the ratio at the end does not
    assert lo == -math.inf
