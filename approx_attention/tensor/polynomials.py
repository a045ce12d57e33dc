r"""Polynomial approximations of the exponential on :math:`[-\beta, \beta]`, and the error of attention weights.

Attention divides by a normaliser, so a constant factor cancels: the error of a polynomial P is the variation of the
ratio :math:`P(x) e^{-x}` over the logits, not its distance from the exponential.

All computations here are static, in Python numbers and float64: degrees, bounds and root mean squares must be known
when tracing. For traced arrays use coefficients that do not depend on them, such as Taylor's.
"""

import decimal
import functools
import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.polynomial import chebyshev, polynomial

from approx_attention.core import check_choice, check_count, known_number, shown

Coefficients = Literal["taylor", "chebyshev", "minimax", "hermite"]

# The parameter of each kind in addition to the degree.
_TAKES: dict[str, str | None] = {"taylor": None, "chebyshev": "bound", "minimax": "bound", "hermite": "rms"}

# Coefficients in float64 cannot represent the improvement of higher degrees.
MAX_DEGREE = 64

# Rounding of coefficients adds an error of 1e-16 exp(2 bound): beyond this no certificate is possible.
MAX_CERTIFIED = 18.0

_ZERO = np.array([Decimal(0)])


def exp_coefficients(
    kind: str, degree: int, *, bound: float | None = None, rms: float | None = None
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    r"""Compute the coefficients c of a polynomial :math:`P(x) = \sum_k c_k x^k` that approximates :math:`e^x`.

    .. math:: \text{taylor: } c_k = \frac1{k!}, \qquad
              \text{chebyshev: } P(x) = I_0(\beta) + 2 \sum_{k \le g} I_k(\beta)\, T_k(x / \beta), \qquad
              \text{minimax: } \min_P \max_{|x| \le \beta} |P(x) e^{-x} - 1|, \\
              \text{hermite: } \min_P E_{x \sim N(0, \sigma^2)} (P(x) - e^x)^2, \quad
              c_k = \frac{e^{\sigma^2/2}}{k!} \sum_{j \le (g-k)/2} \frac{(-\sigma^2/2)^j}{j!}.

    Taylor polynomials of even degree are positive everywhere, and so safe for any logits. Minimax has the best
    certificate (`ratio_range`) for logits with a known bound; it is computed for this bound, by Remez exchange in
    decimal arithmetic. Hermite has the smallest measured error for logits with a small root mean square, but no
    certificate.

    Args:
        kind: ``"taylor"``, ``"chebyshev"``, ``"minimax"`` or ``"hermite"``.
        degree: the degree g, known when tracing.
        bound: :math:`\beta`, the largest magnitude of a logit; for ``"chebyshev"`` and ``"minimax"``.
        rms: :math:`\sigma`, the root mean square of the logits; for ``"hermite"``.

    Returns:
        The coefficients of ascending powers ``[degree + 1]``.

    Raises:
        ValueError: an unknown kind; a missing, superfluous or invalid bound or root mean square.
        TypeError: a traced degree, bound or root mean square.

    Example:
        >>> from approx_attention.tensor import exp_coefficients
        >>> exp_coefficients("taylor", 2).tolist()
        [1.0, 1.0, 0.5]
        >>> exp_coefficients("minimax", 2, bound=1.0).round(3).tolist()
        [1.027, 1.114, 0.469]

    Reference:
        :cite:p:`alman2023fast`, section 3; :cite:p:`aggarwal2022optimal`; :cite:p:`remez1934sur` for the
        exchange.
    """
    check_choice("coefficients", kind, get_args(Coefficients))
    degree = check_count("degree", degree, 0)
    check_taken(kind, bound=bound, rms=rms)
    if kind == "taylor":
        return _taylor(degree)
    if kind == "hermite":
        return _hermite(degree, _static(kind, "rms", rms))
    bound = _static(kind, "bound", bound)
    # exp(709) is the largest float64.
    if bound > 700:
        raise ValueError(f"bound must be at most 700, got {bound}: no polynomial approximates exp over such logits")
    if bound == 0:
        return _taylor(degree)
    return np.array(_chebyshev(degree, bound) if kind == "chebyshev" else _minimax(degree, bound)[0])


def check_taken(coefficients: object, *, bound: float | None, rms: float | None) -> None:
    """Raise ``ValueError`` for a bound or root mean square that the coefficients, a kind or numbers, do not use."""
    takes = None
    if isinstance(coefficients, str):
        check_choice("coefficients", coefficients, get_args(Coefficients))
        takes = _TAKES[coefficients]
    for name, value in (("bound", bound), ("rms", rms)):
        if value is not None and name != takes:
            kinds = " and ".join(repr(kind) for kind, number in _TAKES.items() if number == name)
            given = repr(coefficients) if isinstance(coefficients, str) else "coefficients that are numbers"
            raise ValueError(f"{name} is only for coefficients {kinds}, got {name}={shown(value)} with {given}")


def num_coefficients(coefficients: Any) -> int:
    """The number of coefficients given as numbers.

    Args:
        coefficients: a sequence or an array ``[degree + 1]``, possibly traced.

    Returns:
        The degree plus 1.

    Raises:
        TypeError: not a vector of real numbers, or an empty one.
    """
    # The shape and dtype of a traced array suffice. Kind V: bfloat16 and other types that NumPy does not know.
    given = coefficients if hasattr(coefficients, "dtype") else np.asarray(coefficients)
    if given.ndim != 1 or given.shape[0] == 0 or given.dtype.kind not in "iufV":
        raise TypeError(
            f"coefficients must be one of {', '.join(get_args(Coefficients))}, or real numbers [degree + 1], got "
            f"{shown(coefficients)}"
        )
    return given.shape[0]


def taken_by(kind: str, *, bound: float | None = None, rms: float | None = None) -> dict[str, float | None]:
    """Select the bound or the root mean square that a kind of coefficients uses, as an argument of `exp_coefficients`.

    Args:
        kind: the kind of coefficients.
        bound: the bound of the logits.
        rms: the root mean square of the logits.

    Returns:
        The number that the kind uses, by name; empty if it uses none.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> from approx_attention.tensor import taken_by
        >>> taken_by("chebyshev", bound=2.0, rms=1.0), taken_by("taylor", bound=2.0)
        ({'bound': 2.0}, {})
    """
    check_choice("coefficients", kind, get_args(Coefficients))
    return {name: value for name, value in (("bound", bound), ("rms", rms)) if name == _TAKES[kind]}


def minimax_error(degree: int, bound: float) -> float:
    r"""Compute the least relative error of a polynomial, :math:`\min_P \max_{|x| \le \beta} |P(x) e^{-x} - 1|`.

    In exact arithmetic. Rounding the coefficients of `exp_coefficients` to float64 adds an error of about
    :math:`10^{-16} e^{2\beta}`, which `ratio_range` includes.

    Args:
        degree: the degree g.
        bound: :math:`\beta > 0`.

    Returns:
        The error.

    Raises:
        ValueError: an invalid degree or bound.

    Example:
        >>> from approx_attention.tensor import minimax_error
        >>> round(minimax_error(2, 1.0), 4)
        0.0397

    Reference:
        As `exp_coefficients`.
    """
    degree, bound = check_count("degree", degree, 0), _static("minimax_error", "bound", bound)
    if not 0 < bound <= 700:
        raise ValueError(f"bound must be positive and at most 700, got {bound}")
    return _minimax(degree, bound)[1]


def ratio_range(coefficients: np.ndarray | Sequence[float], bound: float) -> tuple[float, float]:
    r"""Compute the smallest and the largest :math:`P(x) e^{-x}` over :math:`[-\beta, \beta]`.

    They are at the ends or where :math:`P' = P`. All such points, and all roots of P, are found in exact arithmetic to
    2^-53 of the interval; the values are exact up to the final rounding. The range is that of the coefficients in
    float64, whose rounding adds about :math:`10^{-16} e^{2\beta}` for minimax. It does not include the rounding of sums
    in attention.

    Args:
        coefficients: coefficients of ascending powers ``[degree + 1]``.
        bound: :math:`\beta \ge 0`.

    Returns:
        ``(lo, hi)``. ``lo`` is at most 0 if P has a root, or may have one within the precision. ``hi`` is infinite, or
        ``lo`` minus infinity, on overflow.

    Raises:
        ValueError: coefficients that are not a finite vector, an invalid bound.
        TypeError: a bound that is not a concrete number.

    Example:
        >>> from approx_attention.tensor import ratio_range
        >>> lo, hi = ratio_range([1, 1, 1 / 2], 1.0)
        >>> round(lo, 4), round(hi, 4)
        (0.9197, 1.3591)
    """
    try:
        given = np.asarray(coefficients, np.float64)
    except (TypeError, ValueError, OverflowError):
        given = np.zeros(0)
    if given.ndim != 1 or not given.size or not np.all(np.isfinite(given)):
        raise ValueError(f"coefficients must be a vector of finite numbers, got {shown(coefficients)}")
    bound = _static("ratio_range", "bound", bound)

    whole = _whole_numbers(given, bound)
    # P' - P in a common unit too: the bound is a quotient of integers, and so is the derivative with respect to x /
    # bound.
    over, under = bound.as_integer_ratio()
    slope = [*[under * k * c for k, c in enumerate(whole)][1:], 0]
    slope = [rise - over * c for rise, c in zip(slope, whole, strict=True)]
    ratios = [_ratio(given, bound, x) for x in (-1.0, 1.0, *_real_roots_within(slope))]
    if _real_roots_within(whole):
        ratios.append(0.0)
    return min(ratios), max(ratios)


def weight_bound(lo: float, hi: float) -> float:
    r"""Bound the error of attention weights whose exponentials have errors of factors between ``lo`` and ``hi``.

    .. math:: \tfrac12 \sum_j |\tilde w_j - w_j| \le \frac{\sqrt{hi/lo} - 1}{\sqrt{hi/lo} + 1}
              = \tanh\bigl(\tfrac14 \ln \tfrac{hi}{lo}\bigr).

    The error of an output is then at most this times the range of the values in its channel. The weights are positive.

    Args:
        lo: the smallest factor.
        hi: the largest factor.

    Returns:
        The bound of the total variation, below 1; infinite if ``lo`` is not positive.

    Raises:
        TypeError: factors that are not concrete numbers.
        ValueError: ``lo`` exceeds ``hi``.

    Example:
        >>> from approx_attention.tensor import exp_coefficients, ratio_range, weight_bound
        >>> weight_bound(0.99, 1.01) < 0.00501
        True
        >>> weight_bound(*ratio_range(exp_coefficients("taylor", 1), 2.0))
        inf

    Reference:
        A derivation of this library: with factors :math:`f_j` the sum is :math:`\sum_j w_j |f_j - \bar f| /
        \bar f`, which is largest for a distribution on the two points ``lo`` and ``hi``.
    """
    lo, hi = known_number("lo", lo), known_number("hi", hi)
    if not lo <= hi:
        raise ValueError(f"hi must be at least lo = {lo}, got {hi}")
    if lo <= 0:
        return math.inf
    return math.tanh(math.log1p((hi - lo) / lo) / 4)


def choose_degree(
    tolerance: float,
    bound: float,
    dim: int,
    *,
    coefficients: str = "minimax",
    rms: float | None = None,
    max_rank: int = 50_000,
) -> int:
    r"""Find the smallest even degree whose weights meet a tolerance for all logits in :math:`[-\beta, \beta]`.

    Even, because polynomials of odd degree become negative just beyond the bound.

    Args:
        tolerance: the largest total variation between the weights (`weight_bound`), between 0 and 1.
        bound: :math:`\beta`.
        dim: the number d of channels, for the rank :math:`\binom{d+g}{g}`.
        coefficients: the kind of coefficients (`exp_coefficients`).
        rms: as in `exp_coefficients`, for ``"hermite"``.
        max_rank: the largest accepted rank.

    Returns:
        The degree.

    Raises:
        ValueError: the rank exceeds ``max_rank``, no degree meets the tolerance, or ``rms`` is for another kind.

    Example:
        >>> from approx_attention.tensor import choose_degree
        >>> choose_degree(1e-2, 1.0, 16), choose_degree(1e-2, 1.0, 16, coefficients="taylor")
        (4, 4)
    """
    dim = check_count("dim", dim)
    max_rank = check_count("max_rank", max_rank, most=None)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
    if coefficients in ("minimax", "chebyshev") and bound > MAX_CERTIFIED:
        raise ValueError(
            f"no {coefficients} polynomial with float64 coefficients is accurate for logits beyond {MAX_CERTIFIED:g}, "
            f"got {bound}: bound the logits"
        )
    numbers = {**taken_by(coefficients, bound=bound), "rms": rms}
    for degree in range(0, MAX_DEGREE + 1, 2):
        polynomial_coefficients = exp_coefficients(coefficients, degree, **numbers)
        if weight_bound(*ratio_range(polynomial_coefficients, bound)) <= tolerance:
            break
    else:
        raise ValueError(
            f"no {coefficients} polynomial of even degree up to {MAX_DEGREE} meets tolerance {tolerance} for logits up "
            f"to {bound}"
        )
    rank = math.comb(dim + degree, degree)
    if rank > max_rank:
        raise ValueError(
            f"an error of {tolerance} for logits up to {bound} needs degree {degree}, whose rank for {dim} channels is "
            f"{rank}, more than max_rank = {max_rank}: project to fewer channels, or bound the logits"
        )
    return degree


def _static(owner: str, name: str, value: float | None) -> float:
    """Return a concrete number that is finite and not negative."""
    if value is None:
        raise ValueError(f"{owner} needs {name}")
    number = known_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {shown(value)}")
    return number


def _taylor(degree: int) -> np.ndarray:
    """1 / k!."""
    return np.array([1 / math.factorial(k) for k in range(degree + 1)])


def _hermite(degree: int, rms: float) -> np.ndarray:
    """The projection of exp on Hermite polynomials in closed form; in fractions, because terms alternate."""
    # At this limit the factor exp(rms^2 / 2) is 1e195.
    if rms > 30:
        raise ValueError(f"rms must be at most 30, got {rms}: no polynomial approximates exp over such logits")
    variance = Fraction(rms) ** 2 / 2
    terms = [(-variance) ** j / math.factorial(j) for j in range(degree // 2 + 1)]
    sums = [sum(terms[: (degree - k) // 2 + 1]) / math.factorial(k) for k in range(degree + 1)]
    return math.exp(rms * rms / 2) * np.array(sums, np.float64)


def _ratio(coefficients: np.ndarray, bound: float, x: float) -> float:
    """P(t) e^-t at t = bound x: the sum is exact and rounded once."""
    at, total = Fraction(bound) * Fraction(x), Fraction(0)
    for c in reversed(coefficients.tolist()):
        total = total * at + Fraction(c)
    if total == 0:
        return 0.0
    try:
        ratio = float(total) * math.exp(-at)
    except OverflowError:
        ratio = math.inf
    if 0 < abs(ratio) < math.inf:
        return ratio
    # A factor may overflow although the product does not.
    size = math.log(abs(total.numerator)) - math.log(total.denominator) - float(at)
    size = math.exp(size) if size < 709 else math.inf
    return size if total > 0 else -size


def _whole_numbers(coefficients: np.ndarray, bound: float) -> list[int]:
    """The coefficients of P(bound x), as a polynomial of x, as integers in a common unit."""
    terms = [Fraction(c) * Fraction(bound) ** k for k, c in enumerate(coefficients.tolist())]
    # Floats are integers over powers of 2, so the largest denominator is the common one.
    unit = max(term.denominator for term in terms)
    return [int(term * unit) for term in terms]


def _real_roots_within(whole: list[int]) -> list[float]:
    """Points in [-1, 1] such that every real root of an integer polynomial in [-1, 1] is within 2^-53 of a point.

    A polynomial whose Bernstein coefficients on an interval have one sign has no root inside. Intervals are halved
    until this holds or they are short enough; arithmetic is exact, so no root is lost. If two roots, also complex ones,
    are closer to each other than this, there may be a point without a root.
    """
    degree = max((k for k, c in enumerate(whole) if c), default=0)
    if degree == 0:
        return []
    # Powers of x + 1, then the Bernstein form on [-1, 1].
    shifted = np.array(whole[: degree + 1], object)
    for k in range(degree):
        for j in range(degree - 1, k - 1, -1):
            shifted[j] -= shifted[j + 1]
    factorials = [math.factorial(k) for k in range(degree + 1)]
    powers = [(c << k) * factorials[k] * factorials[degree - k] for k, c in enumerate(shifted.tolist())]
    form = np.array([sum(math.comb(i, k) * powers[k] for k in range(i + 1)) for i in range(degree + 1)], object)
    doubled = np.array([1 << (degree - i) for i in range(degree + 1)], object)
    found, waiting = [], [(form, -1.0, 2.0)]
    while waiting:
        form, start, width = waiting.pop()
        found.extend(end for c, end in ((form[0], start), (form[-1], start + width)) if c == 0)
        signs = {c > 0 for c in form.tolist() if c}
        if len(signs) < 2:
            continue
        width /= 2
        if width < 2.0**-53:
            found.append(start + width)
            continue
        left, right = [form[0]], [form[-1]]
        for _ in range(degree):
            form = form[:-1] + form[1:]
            left.append(form[0])
            right.append(form[-1])
        halves = np.array(left, object) * doubled, (np.array(right, object) * doubled)[::-1]
        waiting.extend((half, begin, width) for half, begin in zip(halves, (start, start + width), strict=True))
    return found


@functools.lru_cache
def _chebyshev(degree: int, bound: float) -> tuple[float, ...]:
    """The truncated Chebyshev series of exp, with enough digits for the cancellation of powers."""
    with decimal.localcontext(prec=40 + degree + math.ceil(bound)):
        half = Decimal(bound) / 2
        series = []
        for k in range(degree + 1):
            terms = [half**k / math.factorial(k)]
            for j in range(1, 40 + degree + math.ceil(2 * bound)):
                terms.append(terms[-1] * half * half / (j * (j + k)))
            series.append(sum(terms) if k == 0 else 2 * sum(terms))
        powers = np.asarray(chebyshev.cheb2poly(np.array(series, object)), object)
        return tuple(float(c) for c in powers / np.array([Decimal(bound) ** k for k in range(degree + 1)]))


@functools.lru_cache
def _minimax(degree: int, bound: float) -> tuple[tuple[float, ...], float]:
    r"""The polynomial with the least relative error, and this error, by Remez exchange.

    With the error E levelled at :math:`g + 2` points, :math:`P(x_i) = e^{x_i} (1 + (-1)^i E)`. The divided difference
    of order :math:`g + 1` gives E, and lower orders give P. The extrema of the error of P are at the ends and at the
    roots of :math:`P' = P`, which are all real: these are the next points.
    """
    small = (math.lgamma(degree + 2) - (degree + 1) * math.log(bound / 2)) / math.log(10)
    # 40 digits for the result and Newton's form, more for the cancellation of powers, and more for a small error.
    with decimal.localcontext(prec=40 + degree + math.ceil(bound + max(small, 0))):
        # Initialised with the extrema of a Chebyshev polynomial.
        points = np.array([Decimal(-bound * math.cos(math.pi * i / (degree + 1))) for i in range(degree + 2)])
        sign = np.array([Decimal((-1) ** i) for i in range(degree + 2)])
        # The exchange takes about ten rounds; after 100 it raises.
        for _ in range(100):
            value = np.array([x.exp() for x in points])
            smooth, level = _divided_differences(points, value), _divided_differences(points, sign * value)
            newton = smooth - smooth[-1] / level[-1] * level
            powers = _powers(newton[:-1], points)
            points[1:-1] = _real_roots(_derivative(powers) - powers, points[1:-1])
            decay = np.array([(-x).exp() for x in points])
            error = abs(polynomial.polyval(points, powers) * decay - 1)
            # Levelled to 12 digits: the exchange converges quadratically, and coefficients are rounded to 16.
            if max(error) - min(error) <= Decimal("1e-12") * max(error):
                return tuple(float(c) for c in powers), float(max(error))
    raise ArithmeticError(f"the Remez exchange for degree {degree} and bound {bound} has not converged")


def _divided_differences(x: np.ndarray, f: np.ndarray) -> np.ndarray:
    """The coefficients of Newton's form of the polynomial through points (x, f)."""
    for k in range(1, len(x)):
        f = np.append(f[:k], (f[k:] - f[k - 1 : -1]) / (x[k:] - x[:-k]))
    return f


def _powers(newton: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The coefficients of powers of a polynomial in Newton's form."""
    powers = newton[-1:]
    steps = len(newton) - 1
    for x, c in zip(points[:steps][::-1], newton[:steps][::-1], strict=True):
        powers = np.append(c, powers) - x * np.append(powers, _ZERO)
    return powers


def _derivative(powers: np.ndarray) -> np.ndarray:
    """The coefficients of the derivative, padded with a zero for the highest power."""
    return np.append(powers[1:] * np.arange(1, len(powers)), _ZERO)


def _real_roots(powers: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The roots of a polynomial with real roots only, by Ehrlich-Aberth iteration from distinct points."""
    roots, slope = start, _derivative(powers)
    # It converges cubically from points near the roots, long before the limit of 200 steps.
    for _ in range(200):
        step = polynomial.polyval(roots, powers) / polynomial.polyval(roots, slope)
        apart = [sum((1 / (x - y) for j, y in enumerate(roots) if j != i), Decimal(0)) for i, x in enumerate(roots)]
        step = step / (1 - step * np.array(apart))
        roots = roots - step
        if max(map(abs, step), default=0) <= Decimal("1e-16") * max(map(abs, roots), default=0):
            break
    return np.sort(roots)
