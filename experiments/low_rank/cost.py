"""Time and memory of attention with Linformer's projections against exact attention, by the number of tokens."""

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

# The paper compares with the first; the fastest exact attention of today may be the second.
DENSE, BLOCKED = "exact, all logits at once", "exact, in blocks"


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


def _exact(implementation: Any) -> Callable[..., jax.Array]:
    return functools.partial(attention, method="exact", implementation=implementation)


def _linformer(query: jax.Array, key: jax.Array, value: jax.Array, e: jax.Array, f: jax.Array) -> jax.Array:
    return attention(query, key, value, method="linformer", projection_k=e, projection_v=f)


def _calls(config: Config, length: int) -> dict[str, tuple[Callable[..., jax.Array], Any]]:
    """Every form as a function and its arguments; one projection for all heads, of keys and of values."""
    keys = jax.random.split(jax.random.key(config.seed), 5)
    tensors = [jax.random.normal(key, (1, length, config.num_heads, config.head_dim)) for key in keys[:3]]
    calls: dict[str, tuple[Callable[..., jax.Array], Any]] = {BLOCKED: (_exact("blocked"), tensors)}
    if 4 * config.num_heads * length**2 <= LARGEST_LOGITS:
        calls[DENSE] = _exact("dense"), tensors
    for slots in (slots for slots in config.slots if slots < length):
        both = [jax.random.normal(key, (slots, length)) / length**0.5 for key in keys[3:]]
        calls[f"linformer, {slots}"] = _linformer, [*tensors, *both]
    return calls


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Seconds and bytes of temporary arrays of each form at each length, how many times more exact attention takes.

    ``time_saved`` and ``memory_saved`` are those against `DENSE`, where it was run; ``time_saved_of_fastest`` is that
    against the faster of the exact forms.
    """
    records: list[Record] = []
    seconds: dict[str, dict[int, float]] = {}
    for length in config.lengths:
        forms = _calls(config, length)
        compiled: dict[str, Any] = {name: jax.jit(form).lower(*args).compile() for name, (form, args) in forms.items()}
        calls = {name: functools.partial(compiled[name], *args) for name, (_, args) in forms.items()}
        took = {name: timing.least for name, timing in time_interleaved(calls, rounds=config.rounds).items()}
        held = {name: compiled[name].memory_analysis().temp_size_in_bytes for name in forms}
        fastest = min(took[name] for name in (DENSE, BLOCKED) if name in took)
        for name, time in took.items():
            seconds.setdefault(name, {})[length] = time
            row: Record = {"method": name, "length": length, "seconds": time, "temporary_bytes": held[name]}
            if DENSE in took:
                row |= {"time_saved": took[DENSE] / time, "memory_saved": held[DENSE] / max(held[name], 1)}
            records.append(row | {"time_saved_of_fastest": fastest / time})
        console.print(f"{length} tokens: " + ", ".join(f"{name} {1e3 * time:.3g} ms" for name, time in took.items()))
    for name, by_length in seconds.items():
        fitted = slope({n: time for n, time in by_length.items() if n >= config.fit_from})
        records.append({"method": name, **fitted})
    return records


def table(records: Frame) -> Iterable[str]:
    """Milliseconds by length, and how many times more exact attention takes."""
    yield from table_of_times(records, "attention")
    for figure, title in (
        ("time_saved", "How many times longer exact attention takes with all logits at once"),
        ("time_saved_of_fastest", "How many times longer the faster exact attention takes"),
        ("memory_saved", "How many times more temporary bytes exact attention takes with all logits at once"),
    ):
        yield title
        yield pivot(having(records, figure), "method", "length", figure, cell=significant, quoted=False)


figure = figure_of_times
