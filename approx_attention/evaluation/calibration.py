"""The sizes at which a plan measures a method, and those that it chooses of them."""

import bisect
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from approx_attention.evaluation.error_laws import ErrorLaw
from approx_attention.evaluation.plans import Curve
from approx_attention.registry import get_method

_Setting = TypeVar("_Setting")
# A usual size of at least this counts tokens or features; a smaller one counts other things, such as blocks.
_LEAST_COUNT = 64
# How often a method is measured again at the size that the fit proposes.
REFINEMENTS = 4
# A bound that is the tolerance but for rounding meets it: the fit passes through logarithms and back.
ROUNDING = 1 + 1e-9


def calibrate(
    name: str,
    num_keys: int,
    tolerance: float,
    max_bytes: int | None,
    measure: Callable[[int], tuple[float, float]],
    held: Callable[[int], int],
) -> Curve | None:
    """Measure a method at a few sizes, where the fit expects the tolerance to be met, and at the most bytes allowed.

    The last only where nothing in the budget meets the tolerance: what comes nearest uses all that it may.
    """
    greatest, starts = _greatest_size(name, num_keys), first_sizes(name, num_keys)
    if not starts:
        return None
    errors, bounds = {}, {}
    for size in starts:
        errors[size], bounds[size] = measure(size)
    for _ in range(REFINEMENTS):
        size = ErrorLaw.fit(bounds).size(tolerance)
        # So far beyond the greatest size the fit is hardly wrong by enough.
        if size > 2 * greatest:
            break
        # Downwards not far beyond what was measured, in one step.
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
    """The sizes at which a method is measured first; none where there are too few tokens."""
    usual, greatest = get_method(name).usual_size, _greatest_size(name, num_keys)
    if greatest < 2:
        return []
    # Equal ratios, for the fit is a power law.
    start = (num_keys / 64, num_keys / 16, num_keys / 4) if usual >= _LEAST_COUNT else (usual / 4, usual, 4 * usual)
    return list(dict.fromkeys(_round_size(size, greatest) for size in start))


def all_sizes(name: str, num_keys: int) -> list[int]:
    """The sizes at which a method is measured where every head chooses: each twice the one before, to the greatest."""
    greatest, starts = _greatest_size(name, num_keys), first_sizes(name, num_keys)
    if not starts:
        return []
    steps = range(math.ceil(math.log2(greatest / starts[0])) + 1)
    return list(dict.fromkeys(min(starts[0] * 2**step, greatest) for step in steps))


def _greatest_size(name: str, num_keys: int) -> int:
    """The greatest size to look at: half of the tokens, and of sizes that count other things eight times the usual."""
    usual = get_method(name).usual_size
    greatest = num_keys // 2 if usual >= _LEAST_COUNT else min(8 * usual, num_keys // 2)
    return greatest - greatest % 2


def _round_size(size: float, greatest: int) -> int:
    """The least even size from this one on with at most three significant bits.

    Cosines and sines come in pairs. With few sizes, layers share compiled programs.
    """
    # An integer that rounding has moved up stays itself.
    size = max(2, math.ceil(size - 1e-9))
    step = max(2, 2 ** (size.bit_length() - 3))
    return min(-(-size // step) * step, greatest)


def chosen_settings(
    settings: Iterable[_Setting], *, meets: Callable[[_Setting], bool], fits: Callable[[_Setting], bool]
) -> list[_Setting]:
    """The smallest setting that meets the tolerance, and where it is not in the budget the largest that is, if any."""
    settings = list(settings)
    chosen = [setting for setting in settings if meets(setting)][:1]
    if not any(fits(setting) for setting in chosen):
        chosen += ([setting for setting in settings if fits(setting)] or settings[:1])[-1:]
    return list(dict.fromkeys(chosen))
