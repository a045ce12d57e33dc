"""Time of exact third-order attention and of the polynomial method as sequences grow."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from approx_attention import tensor_attention, tensor_polynomial
from approx_attention.evaluation import time_interleaved
from experiments.config import Count, Seeded, Several, Whole
from experiments.fits import slope
from experiments.results import Frame, Record
from experiments.show import figure_of_times, having, reached, table_of_times
from experiments.tensor.inputs import small_logits


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Lengths at which both are timed, and from which lengths on a slope is fitted to each.

    Attributes:
        backward: time the gradient with respect to all tensors, the forward pass included.
    """

    exact_lengths: Several[Count]
    polynomial_lengths: Several[Count]
    degrees: Several[Count]
    head_dim: Count = 8
    backward: bool = False
    exact_from: Whole = 256
    polynomial_from: Whole = 1024
    rounds: Count = 5


def with_gradient(form: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the squared norm of what a form of attention answers, with respect to all tensors."""

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(form(q, k, v) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


def _forms(config: Config) -> dict[str, Callable[..., Any]]:
    forms = {"exact": tensor_attention}
    forms |= {f"degree {g}": functools.partial(tensor_polynomial, degree=g) for g in config.degrees}
    return {name: with_gradient(form) if config.backward else form for name, form in forms.items()}


def programs(config: Config) -> dict[str, Any]:
    """What an accelerator must have room for: every form at its longest."""

    def at_its_longest(name: str, form: Callable[..., Any]) -> Any:
        longest = max(config.exact_lengths if name == "exact" else config.polynomial_lengths)
        return form, jax.eval_shape(lambda: small_logits(longest, config.head_dim, config.seed))

    return {name: functools.partial(at_its_longest, name, form) for name, form in _forms(config).items()}


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Seconds of a call by length, slopes of log time, and the length from which the polynomial method is faster."""
    forms = _forms(config)
    seconds: dict[str, dict[int, float]] = {name: {} for name in forms}
    for length in sorted({*config.exact_lengths, *config.polynomial_lengths}):
        arguments = small_logits(length, config.head_dim, config.seed)
        calls = {}
        for name, form in forms.items():
            if length in (config.exact_lengths if name == "exact" else config.polynomial_lengths):
                calls[name] = functools.partial(jax.jit(form).lower(*arguments).compile(), *arguments)
        timings = time_interleaved(calls, rounds=config.rounds, patience=30)
        for name, timing in timings.items():
            seconds[name][length] = timing.least
        shown = ", ".join(f"{name} {timing.least * 1e3:.3g} ms" for name, timing in timings.items())
        console.print(f"{directory.name} n={length}: {shown}")
    records: list[Record] = []
    for name, by_length in seconds.items():
        records += [{"method": name, "length": n, "seconds": s} for n, s in by_length.items()]
        least = config.exact_from if name == "exact" else config.polynomial_from
        fits: Record = {"method": name, **slope({n: s for n, s in by_length.items() if n >= least})}
        if name != "exact":
            rank = math.comb(config.head_dim + int(name.removeprefix("degree ")), config.head_dim)
            fits["crossover"] = crossover(by_length, seconds["exact"])
            fits["crossover_of_flops"] = math.sqrt(3 * rank * (config.head_dim + 1) / (2 * config.head_dim))
        records.append(fits)
    return records


def crossover(seconds: Mapping[int, float], baseline: Mapping[int, float]) -> float:
    """The length from which on a method is faster than a baseline, between measured lengths.

    0 if it is everywhere, infinite if nowhere.
    """
    logs = {n: math.log(seconds[n] / baseline[n]) for n in sorted(seconds.keys() & baseline.keys())}
    slower = [n for n, ratio in logs.items() if ratio >= 0]
    faster = [n for n in logs if n > max(slower, default=0)]
    if not slower or not faster:
        return 0.0 if faster else math.inf
    last, first = slower[-1], faster[0]
    share = logs[last] / (logs[last] - logs[first])
    return math.exp((1 - share) * math.log(last) + share * math.log(first))


def table(records: Frame) -> Iterable[str]:
    """Milliseconds of a call by length, exponents, and where each polynomial is faster than exact attention."""
    crossings = having(records, "crossover")

    def faster(name: str, own: Frame) -> str:
        same = (crossings["method"] == name) & (crossings["configuration"] == own["configuration"].iloc[0])
        if not same.any():
            return ""
        measured, by_operations = (list(crossings[same][figure]) for figure in ("crossover", "crossover_of_flops"))
        return f"{reached(measured)} ({by_operations[0]:.0f})"

    yield from table_of_times(records, "a call by the number of tokens", {"faster from n (by operations)": faster})


figure = figure_of_times
