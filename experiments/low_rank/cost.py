"""Time of attention with Linformer's projections against exact attention, by the number of tokens."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from rich.console import Console

from approx_attention import attention
from approx_attention.evaluation import LARGEST_LOGITS, time_interleaved
from experiments.config import Count, Seeded, Several
from experiments.fits import slope
from experiments.results import Frame, Record
from experiments.show import figure_of_times, having, pivot, significant, table_of_times

# Holds all logits at once, as the exact attention of the paper does.
DENSE = "exact, jax.nn"


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Heads of one sequence, its lengths, and the numbers of slots.

    Attributes:
        fit_from: the shortest length that counts for the slope of the time.
    """

    lengths: Several[Count]
    slots: Several[Count]
    num_heads: Count = 8
    head_dim: Count = 64
    fit_from: Count = 2048
    rounds: Count = 5


def _linformer(query: jax.Array, key: jax.Array, value: jax.Array, e: jax.Array, f: jax.Array) -> jax.Array:
    return attention(query, key, value, method="linformer", projection_k=e, projection_v=f)


def _calls(config: Config, length: int) -> dict[str, tuple[Callable[..., jax.Array], Any]]:
    """Every form as a function and its arguments; one projection for all heads, of keys and of values."""
    keys = jax.random.split(jax.random.key(config.seed), 5)
    tensors = [jax.random.normal(key, (1, length, config.num_heads, config.head_dim)) for key in keys[:3]]
    exact: dict[str, Callable[..., jax.Array]] = {"exact": functools.partial(attention, method="exact")}
    if 4 * config.num_heads * length**2 <= LARGEST_LOGITS:
        exact[DENSE] = jax.nn.dot_product_attention
    calls: dict[str, tuple[Callable[..., jax.Array], Any]] = {name: (form, tensors) for name, form in exact.items()}
    for slots in (slots for slots in config.slots if slots < length):
        both = [jax.random.normal(key, (slots, length)) / length**0.5 for key in keys[3:]]
        calls[f"linformer, {slots}"] = _linformer, [*tensors, *both]
    return calls


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Seconds of each form at each length, and how many times as long exact attention takes.

    ``time_saved`` is against `DENSE`, where it was run, and ``time_saved_of_fastest`` against the faster exact form.
    """
    records: list[Record] = []
    seconds: dict[str, dict[int, float]] = {}
    for length in config.lengths:
        calls = {
            name: functools.partial(jax.jit(form).lower(*args).compile(), *args)
            for name, (form, args) in _calls(config, length).items()
        }
        timings = time_interleaved(calls, rounds=config.rounds, patience=60)
        took = {name: timing.least for name, timing in timings.items()}
        fastest = min(time for name, time in took.items() if name.startswith("exact"))
        for name, time in took.items():
            seconds.setdefault(name, {})[length] = time
            saved: Record = {"time_saved": took[DENSE] / time} if DENSE in took else {}
            saved["time_saved_of_fastest"] = fastest / time
            records.append({"method": name, "length": length, "seconds": time, **saved})
        console.print(f"{length} tokens: " + ", ".join(f"{name} {1e3 * time:.3g} ms" for name, time in took.items()))
    for name, by_length in seconds.items():
        fitted = slope({n: time for n, time in by_length.items() if n >= config.fit_from})
        records.append({"method": name, **fitted})
    return records


def table(records: Frame) -> Iterable[str]:
    """Milliseconds by length, and how many times as long exact attention takes."""
    yield from table_of_times(records, "attention by the number of tokens")
    for figure, title in (
        ("time_saved", "How many times as long exact attention takes that holds all logits at once"),
        ("time_saved_of_fastest", "How many times as long the faster exact attention takes"),
    ):
        yield title
        yield pivot(having(records, figure), "method", "length", figure, cell=significant, quoted=False)


figure = figure_of_times
