"""Time and memory of one attention layer as the sequence grows, against the fastest exact attention."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.evaluation import LARGEST_LOGITS, break_even, time_interleaved
from approx_attention.registry import get_method
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.fits import slope
from experiments.models import AttentionConfig, ModelConfig, SelfAttention
from experiments.results import Frame, Record
from experiments.run_files import read_json, write_json
from experiments.show import curves, having, milliseconds, parts, pivot, slopes, thousands

# The fastest exact attention at each length.
BEST = "best exact"


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """One layer, the lengths it is timed at, and the size of every method's summary."""

    model: ModelConfig
    lengths: Several[Count]
    methods: Several[str]
    direction: Literal["bidirectional", "causal"] = "causal"
    passes: Literal["forward", "forward_backward"] = "forward"
    size: Count = 256
    settings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    fit_from: Count = 2048
    rounds: Count = 5

    def __post_init__(self) -> None:
        for name in self.settings:
            if name not in self.methods:
                raise ValueError(f"settings are given for {name!r}, which is not among {', '.join(self.methods)}")
        self.attentions()

    def attentions(self) -> dict[str, AttentionConfig]:
        """The methods of this direction, each at the size."""
        methods = {}
        for name in self.methods:
            method = get_method(name)
            if self.direction == "bidirectional" or method.capabilities.causal:
                size = {method.size: self.size} if method.size else {}
                methods[name] = AttentionConfig(name, {**size, **self.settings.get(name, {})})
        return methods


@dataclasses.dataclass(frozen=True)
class TimeAndMemory:
    """What is kept of a form at a length."""

    seconds: Positive
    bytes: NonNegative


def programs(config: Config) -> dict[str, Any]:
    """What an accelerator must have room for: every layer at the longest length."""
    shape = (1, max(config.lengths), config.model.model_dim)
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(config.model.dtype))
    methods = {"exact blocked": AttentionConfig("exact", {"implementation": "blocked"}), **config.attentions()}
    return {
        name: lambda attention=attention: (_layer(config, attention, config.direction == "causal"), (x,))
        for name, attention in methods.items()
    }


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Seconds of every method and exact form at each length, the slopes of log time, and break-even lengths."""
    is_causal, methods = config.direction == "causal", config.attentions()
    exact = {f"exact {form}": AttentionConfig("exact", {"implementation": form}) for form in ("blocked", "dense")}
    # Each length is kept once it is measured, so that a killed run goes on with the next.
    kept = directory / "lengths.json"
    measured: dict[str, Any] = {}
    if kept.exists():
        measured = read_json(kept, dict[str, dict[str, TimeAndMemory]], "the lengths are timed again")
    for length in config.lengths:
        if str(length) in measured:
            continue
        shape = (1, length, config.model.model_dim)
        x = jax.random.normal(jax.random.key(config.seed), shape, config.model.dtype)
        fits = 4 * config.model.num_heads * length**2 <= LARGEST_LOGITS // 2
        forms: dict[str, Callable[..., Any]] = {
            name: _layer(config, attention, is_causal)
            for name, attention in (exact | methods).items()
            if name != "exact dense" or fits
        }
        if fits:
            forms["exact jax.nn"] = _jax_nn_layer(config, is_causal)
        compiled: dict[str, Any] = {name: jax.jit(form).lower(x).compile() for name, form in forms.items()}
        calls = {name: functools.partial(form, x) for name, form in compiled.items()}
        timings = time_interleaved(calls, rounds=config.rounds, patience=60)
        measured[str(length)] = {
            name: {"seconds": timing.least, "bytes": compiled[name].memory_analysis().temp_size_in_bytes}
            for name, timing in timings.items()
        }
        write_json(kept, measured)
        shown = ", ".join(f"{name} {timing.least * 1e3:.3g} ms" for name, timing in timings.items())
        console.print(f"{directory.name} n={length}: {shown}")
    records: list[Record] = [
        {"method": name, "length": length, "seconds": entry["seconds"], "temp_bytes": entry["bytes"]}
        for length in config.lengths
        for name, entry in measured[str(length)].items()
    ]
    best = {
        length: min(entry["seconds"] for name, entry in measured[str(length)].items() if name.startswith("exact"))
        for length in config.lengths
    }
    records += [{"method": BEST, "length": length, "seconds": seconds} for length, seconds in best.items()]
    for name in (BEST, *methods):
        times = best if name == BEST else {n: measured[str(n)][name]["seconds"] for n in config.lengths}
        even = None if name == BEST else break_even(times, best)
        records.append(
            {
                "method": name,
                **slope({n: t for n, t in times.items() if n >= config.fit_from}),
                "break_even": math.inf if even is None else even,
                "speedup_at_longest": best[max(best)] / times[max(times)],
            }
        )
    return records


def table(records: Frame) -> Iterable[str]:
    """Milliseconds by length, slope and break-even, by configuration."""
    fits = having(records, "speedup_at_longest")

    def fact(figure: str, shown: Callable[[float], str]) -> Callable[[Any, Frame], str]:
        def column(name: str, own: Frame) -> str:
            same = (fits["method"] == name) & (fits["configuration"] == own["configuration"].iloc[0])
            return shown(fits[same][figure].iloc[0])

        return column

    for name, own in parts(records):
        times = having(own, "seconds")
        listed = times[times["method"].isin(fits["method"])]
        more = {
            **slopes(own, "method"),
            "break-even": fact("break_even", lambda n: "never" if math.isinf(n) else f"{n:.0f}"),
            "faster at the longest": fact("speedup_at_longest", lambda x: f"{x:.1f}x"),
        }
        yield f"`{name}`: milliseconds of a layer by the number of tokens, slope of log time with its 95 % interval"
        yield pivot(listed, "method", "length", "seconds", cell=milliseconds, more=more)


def figure(records: Frame) -> Figure:
    """Time by length, a panel for each configuration."""
    times = having(records, "seconds")
    shown = times[times["method"].isin(having(records, "speedup_at_longest")["method"])]
    return curves(
        shown.assign(ms=1e3 * shown["seconds"]),
        x="length",
        y="ms",
        by="method",
        labels=("tokens", "time of a layer (ms)"),
        ticks=thousands,
        dotted=[BEST],
        columns=2,
        size=(5.0, 3.6),
        titles=lambda name: name.replace("_", " and "),
    )


def _layer(config: Config, attention: AttentionConfig, is_causal: bool, attention_fn: Any = None) -> Callable[..., Any]:
    """A layer with a method, or with another function in its place, as a function of its input."""
    draw, rngs = (config.seed, 0), nnx.Rngs(config.seed)
    layer = SelfAttention(config.model, attention, is_causal=is_causal, draw=draw, rngs=rngs)
    if attention_fn is not None:
        layer.attention_fn = nnx.static(attention_fn)
    return _passes(config, layer)


def _jax_nn_layer(config: Config, is_causal: bool) -> Callable[..., Any]:
    def attention_fn(query: jax.Array, key: jax.Array, value: jax.Array, **_: None) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)

    return _layer(config, AttentionConfig(), is_causal, attention_fn)


def _passes(config: Config, layer: SelfAttention) -> Callable[..., Any]:
    if config.passes == "forward":
        return layer
    # What a method draws is not trained, and its counters are no floating-point numbers.
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def loss(parameters: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, parameters, rest)(x).astype(jnp.float32) ** 2)

    return lambda x: jax.grad(loss, argnums=(0, 1))(parameters, x)
