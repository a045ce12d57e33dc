"""Time and memory of one attention layer as the sequence grows, against the fastest exact attention."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from approx_attention.evaluation import LARGEST_LOGITS, break_even, time_interleaved
from approx_attention.registry import get_method
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.models import AttentionConfig, ModelConfig, SelfAttention
from experiments.run_files import read_json, write_json


@dataclasses.dataclass(frozen=True)
class LongContextConfig(Seeded):
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
        self.arms()

    def arms(self) -> dict[str, AttentionConfig]:
        """The methods of this direction, each at the size."""
        arms = {}
        for name in self.methods:
            method = get_method(name)
            if self.direction == "bidirectional" or method.capabilities.causal:
                size = {method.size: self.size} if method.size else {}
                arms[name] = AttentionConfig(name, {**size, **self.settings.get(name, {})})
        return arms


@dataclasses.dataclass(frozen=True)
class TimeAndMemory:
    """What is kept of a form at a length."""

    seconds: Positive
    bytes: NonNegative


def run(config: LongContextConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Seconds of every method and exact form at each length, the slopes of log time, and break-even lengths."""
    is_causal, arms = config.direction == "causal", config.arms()
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
            for name, attention in (exact | arms).items()
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
    names = dict.fromkeys(name for n in config.lengths for name in measured[str(n)])
    seconds, memory = (
        {name: {n: by[name][what] for n in config.lengths if name in (by := measured[str(n)])} for name in names}
        for what in ("seconds", "bytes")
    )
    best = {n: min(s[n] for name, s in seconds.items() if name.startswith("exact") and n in s) for n in config.lengths}
    rows = {"best exact": best, **{name: seconds[name] for name in arms}}
    return {
        "methods": {
            name: {
                "seconds": {str(n): t for n, t in times.items()},
                "slope": slope({n: t for n, t in times.items() if n >= config.fit_from}),
                "break_even": None if name == "best exact" else break_even(times, best),
                "speedup_at_longest": best[max(best)] / times[max(times)],
            }
            for name, times in rows.items()
        },
        "exact_forms": {n: {str(m): t for m, t in s.items()} for n, s in seconds.items() if n.startswith("exact")},
        "temp_bytes": {name: {str(n): b for n, b in by.items()} for name, by in memory.items()},
    }


def slope(seconds: Mapping[Any, float]) -> dict[str, float] | None:
    """Least-squares slope of log time against log length, with the half-width of its 95 % interval."""
    if len(seconds) < 3:
        return None
    from scipy import stats

    line: Any = stats.linregress(np.log(list(seconds)), np.log(list(seconds.values())))
    return {
        "value": float(line.slope),
        "half_width": float(line.stderr * stats.t.ppf(0.975, len(seconds) - 2)),
    }


def _layer(config: LongContextConfig, attention: AttentionConfig, is_causal: bool) -> Callable[..., Any]:
    return _passes(
        config,
        SelfAttention(config.model, attention, is_causal=is_causal, draw=(config.seed, 0), rngs=nnx.Rngs(config.seed)),
    )


def _jax_nn_layer(config: LongContextConfig, is_causal: bool) -> Callable[..., Any]:
    layer = SelfAttention(
        config.model, AttentionConfig(), is_causal=is_causal, draw=(config.seed, 0), rngs=nnx.Rngs(config.seed)
    )

    def attention_fn(query: jax.Array, key: jax.Array, value: jax.Array, **_: None) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)

    layer.attention_fn = nnx.static(attention_fn)
    return _passes(config, layer)


def _passes(config: LongContextConfig, layer: SelfAttention) -> Callable[..., Any]:
    if config.passes == "forward":
        return layer
    # What a method draws is not trained, and its counters are no floating-point numbers.
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def loss(parameters: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, parameters, rest)(x).astype(jnp.float32) ** 2)

    return lambda x: jax.grad(loss, argnums=(0, 1))(parameters, x)
