"""The sizes at which a plan measures a method, and the choice among them."""

import bisect
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from approx_attention.evaluation.error_laws import ErrorLaw
from approx_attention.evaluation.plans import Curve
from approx_attention.registry import get_method

_Setting = TypeVar("_Setting")
# A usual size of at least this counts tokens or features; a smaller one counts other units, such as blocks.
_LEAST_COUNT = 64
# Number of further measurements of a method, at the size that the fit proposes.
REFINEMENTS = 4
# A bound equal to the tolerance up to rounding meets it: the fit computes logarithms and exponentials.
ROUNDING = 1 + 1e-9


def calibrate(
    name: str,
    num_keys: int,
    tolerance: float,
    max_bytes: int | None,
    measure: Callable[[int], tuple[float, float]],
    held: Callable[[int], int],
) -> Curve | None:
    """Measure a method at a few sizes, at the size where the fit meets the tolerance, and at the byte budget.

    The byte budget only if no size within it meets the tolerance.

    Args:
        name: a method with a size.
        num_keys: the number of keys.
        tolerance: the largest relative error that is allowed.
        max_bytes: upper bound of the cache bytes per key head and sequence; None for no bound.
        measure: ``size -> (relative error, upper bound of that of other units)``.
        held: ``size -> cache bytes``, which grow with the size.

    Returns:
        The errors by size with the fitted laws; None if there are too few tokens.
    """
    greatest, starts = _greatest_size(name, num_keys), first_sizes(name, num_keys)
    if not starts:
        return None
    errors, bounds = {}, {}
    for size in starts:
        errors[size], bounds[size] = measure(size)
    for _ in range(REFINEMENTS):
        size = ErrorLaw.fit(bounds).size(tolerance)
        # This far beyond the largest size, the error of the fit is hardly large enough to matter.
        if size > 2 * greatest:
            break
        # In one step, not far below the measured sizes.
        size = _round_size(max(size, min(bounds) / 4), greatest)
        if size in bounds:
            break
        errors[size], bounds[size] = measure(size)
    law = ErrorLaw.fit(bounds)
    if max_bytes is not None and not any(
        law.error(size) <= tolerance * ROUNDING and held(size) <= max_bytes for size in bounds
    ):
        # Cache bytes grow with the size.
        sizes = range(2, greatest + 1, 2)
        fitting = bisect.bisect_right(sizes, max_bytes, key=held)
        if fitting and (size := sizes[fitting - 1]) not in bounds:
            errors[size], bounds[size] = measure(size)
    return Curve(dict(sorted(errors.items())), ErrorLaw.fit(errors), ErrorLaw.fit(bounds))


def first_sizes(name: str, num_keys: int) -> list[int]:
    """The sizes at which a method is measured first; none if there are too few tokens."""
    usual, greatest = get_method(name).usual_size, _greatest_size(name, num_keys)
    if greatest < 2:
        return []
    # Equal ratios, because the fit is a power law.
    start = (num_keys / 64, num_keys / 16, num_keys / 4) if usual >= _LEAST_COUNT else (usual / 4, usual, 4 * usual)
    return list(dict.fromkeys(_round_size(size, greatest) for size in start))


def all_sizes(name: str, num_keys: int) -> list[int]:
    """The sizes at which a method is measured for a choice per head: powers of two times the first, to the largest."""
    greatest, starts = _greatest_size(name, num_keys), first_sizes(name, num_keys)
    if not starts:
        return []
    steps = range(math.ceil(math.log2(greatest / starts[0])) + 1)
    return list(dict.fromkeys(min(starts[0] * 2**step, greatest) for step in steps))


def _greatest_size(name: str, num_keys: int) -> int:
    """The largest size to measure: half of the tokens, or eight times the usual size for sizes in other units."""
    usual = get_method(name).usual_size
    greatest = num_keys // 2 if usual >= _LEAST_COUNT else min(8 * usual, num_keys // 2)
    return greatest - greatest % 2


def _round_size(size: float, greatest: int) -> int:
    """The smallest even size of at least this one with at most three significant bits.

    Even, because cosines and sines come in pairs. With few sizes, layers share compiled programs.
    """
    # An integer that rounding has moved up stays unchanged.
    size = max(2, math.ceil(size - 1e-9))
    step = max(2, 2 ** (size.bit_length() - 3))
    return min(-(-size // step) * step, greatest)


def chosen_settings(
    settings: Iterable[_Setting], *, meets: Callable[[_Setting], bool], fits: Callable[[_Setting], bool]
) -> list[_Setting]:
    """Choose the settings to propose.

    Args:
        settings: settings in ascending order of cost.
        meets: whether a setting meets the tolerance.
        fits: whether a setting is within the budget.

    Returns:
        The smallest setting that meets the tolerance; if there is none or it exceeds the budget, also the largest
        setting within the budget, or the smallest of all if none is.
    """
    settings = list(settings)
    chosen = [setting for setting in settings if meets(setting)][:1]
    if not any(fits(setting) for setting in chosen):
        chosen += ([setting for setting in settings if fits(setting)] or settings[:1])[-1:]
    return list(dict.fromkeys(chosen))
