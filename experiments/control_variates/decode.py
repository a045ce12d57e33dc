"""Time of a decoding step and bytes of cache by the number of tokens before it, against exact attention."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from rich.console import Console

from approx_attention import HeadsDecoder, attention
from approx_attention.evaluation import time_interleaved
from experiments.config import Count, Seeded, Several, SeveralBy
from experiments.fits import slope
from experiments.models import AttentionConfig
from experiments.results import Frame, Record
from experiments.show import figure_of_times, having, in_kib, pivot, table_of_times

# The fastest of the exact forms at each length.
EXACT = "exact"
CACHED = "exact, cached"
Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """A batch of sequences, the numbers of tokens before, and how many tokens are decoded one by one."""

    lengths: Several[Count]
    methods: SeveralBy[AttentionConfig]
    batch: Count = 16
    num_heads: Count = 8
    head_dim: Count = 64
    steps: Count = 64
    rounds: Count = 5

    def __post_init__(self) -> None:
        if taken := self.methods.keys() & {EXACT, CACHED, *PLAIN}:
            raise ValueError(
                f"methods must not include {min(taken)!r}: exact attention is always timed, in all its forms"
            )


def _tokens(config: Config, length: int) -> tuple[Array, Array, Array]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), length), 3)
    shape = config.batch, length, config.num_heads, config.head_dim
    query, key, value = (jax.random.normal(key, shape) for key in keys)
    return query, key, value


def _decode(step: Call, cache: Any, new: Any) -> Array:
    """The outputs of tokens that are decoded one after the other."""
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], new)
    return lax.scan(lambda cache, token: step(cache, *token)[::-1], cache, tokens)[1]


def _plain(attend: Call) -> Call:
    """A step of exact attention over a preallocated array of all keys, and the number of those that are there."""

    def step(cache: Any, query: Array, key: Array, value: Array) -> tuple[Array, Any]:
        seen, *past = cache
        k, v = (lax.dynamic_update_slice_in_dim(x, new, seen, 1) for x, new in zip(past, (key, value), strict=True))
        lengths = jnp.full(query.shape[0], seen + 1, jnp.int32)
        return attend(query, k, v, key_value_seq_lengths=lengths), (seen + 1, k, v)

    return step


PLAIN: dict[str, Call] = {
    "exact, jax.nn": jax.nn.dot_product_attention,
    **{
        f"exact, {form}": functools.partial(attention, method="exact", implementation=form)
        for form in ("blocked", "dense")
    },
}


def _bytes(cache: Any, config: Config) -> float:
    """Per sequence and head."""
    return sum(x.nbytes for x in jax.tree.leaves(cache)) / (config.batch * config.num_heads)


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Seconds of decoding a token of every sequence, with the slope of their log, and bytes of cache of a head."""
    records: list[Record] = []
    seconds: dict[str, dict[int, float]] = {}
    new = _tokens(config, config.steps)
    for length in config.lengths:
        past = _tokens(config, length)
        room = [jnp.pad(x, ((0, 0), (0, config.steps), (0, 0), (0, 0))) for x in past[1:]]
        plain = (jnp.array(length, jnp.int32), *room)
        steps: dict[str, tuple[Call, Any]] = {name: (_plain(attend), plain) for name, attend in PLAIN.items()}
        held = {EXACT: _bytes(plain[1:], config)}
        cached = {**config.methods, CACHED: AttentionConfig()}
        for name, method in cached.items():
            sizes: Any = {"num_kv_heads": config.num_heads, "head_dim": config.head_dim}
            sizes |= {"max_length": length + config.steps} if method.method == "exact" else {}
            decoder = HeadsDecoder(method.method, **sizes, **method.arguments())
            empty = decoder.init(config.batch, jax.random.key(config.seed))
            cache = jax.jit(decoder.extend)(empty, *past)[1]
            held[name] = _bytes(cache.heads, config)
            steps[name] = decoder.extend, cache
        calls = {
            name: functools.partial(jax.jit(functools.partial(_decode, step)), cache, new)
            for name, (step, cache) in steps.items()
        }
        timings = time_interleaved(calls, rounds=config.rounds, patience=60)
        found = {name: timings[name].least / config.steps for name in config.methods}
        found[EXACT] = min(timing.least for name, timing in timings.items() if name not in found) / config.steps
        for name, time in found.items():
            seconds.setdefault(name, {})[length] = time
            records.append({"method": name, "length": length, "seconds": time, "held_bytes": held[name]})
    return records + [{"method": name, **slope(by_length)} for name, by_length in seconds.items()]


def table(records: Frame) -> Iterable[str]:
    """Milliseconds of a step and bytes of cache, by the number of tokens before it."""
    yield from table_of_times(records, "decoding a token of every sequence, by the number of tokens before it")
    yield "Cache of a head and sequence, by the number of tokens"
    held = having(records, "held_bytes")
    yield pivot(held, "method", "length", "held_bytes", cell=lambda of: in_kib(of[0]), quoted=False)


figure = figure_of_times
