"""Times of compiled calls, and the length from which on one is faster than another."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds per call over several calls: the least, to which other work adds nothing, and the median."""

    least: float
    median: float


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 5, patience: float = 30.0
) -> dict[str, Timing]:
    """Time compiled calls in turn, so that a busy moment of the machine falls on all of them.

    Args:
        calls: functions without arguments, each already compiled; called once before the clock starts.
        rounds: how often each is timed.
        patience: seconds after which no further round is begun.

    Returns:
        The `Timing` of each call.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - begun > patience:
            break
    return {name: Timing(min(times), statistics.median(times)) for name, times in seconds.items()}


def break_even(seconds: Mapping[int, float], baseline: Mapping[int, float], *, margin: float = 0.0) -> int | None:
    """The shortest measured length from which on a method is faster than a baseline at every measured length.

    Args:
        seconds: time of the method by sequence length.
        baseline: time of the baseline, at those lengths at least.
        margin: the share by which it must be faster, for times that are known to so much.

    Returns:
        The length, or None where the method is no faster at the longest.

    Example:
        >>> from approx_attention.evaluation import break_even
        >>> break_even({512: 2.0, 1024: 2.0, 2048: 4.0}, {512: 1.0, 1024: 3.0, 2048: 9.0})
        1024
    """
    from_here = None
    for length in sorted(seconds, reverse=True):
        if seconds[length] * (1 + margin) >= baseline[length]:
            break
        from_here = length
    return from_here
