"""Times of compiled calls, and the length from which one method is faster than another."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Times of a function over several calls.

    Attributes:
        least: the shortest time of a call in seconds, which excludes most of the effect of other work on the machine.
        median: the median time of a call in seconds.
    """

    least: float
    median: float


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int = 5, patience: float = 30.0
) -> dict[str, Timing]:
    """Time compiled calls in turn, so that other work on the machine affects all of them.

    Args:
        calls: compiled functions without arguments by name, each called once before timing starts.
        rounds: number of timed calls of each.
        patience: seconds after which no further round starts.

    Returns:
        The `Timing` of each call by name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.evaluation import time_interleaved
        >>> add, x = jax.jit(jnp.add), jnp.ones(4)
        >>> timing = time_interleaved({"add": lambda: add(x, x)}, rounds=3)["add"]
        >>> 0 < timing.least <= timing.median
        True
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
    """Find the shortest measured length from which a method is faster than a baseline at every measured length.

    Args:
        seconds: time of the method by sequence length.
        baseline: time of the baseline, at least at these lengths.
        margin: the relative margin by which it must be faster, for the uncertainty of times.

    Returns:
        The length, or None if the method is not faster at the longest length.

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
