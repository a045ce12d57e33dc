"""Time of a decoding step of exact third-order attention and of the polynomial method, by the tokens before it."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console

from approx_attention import tensor_attention
from approx_attention.evaluation import time_interleaved
from approx_attention.tensor import running_tensor_polynomial
from experiments.config import Count, Seeded, Several, Whole
from experiments.fits import slope
from experiments.results import Frame, Record
from experiments.show import figure_of_times, table_of_times
from experiments.tensor.inputs import small_logits


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """How many tokens come before, and how many are then decoded one by one.

    Attributes:
        exact_to: beyond this many tokens the exact step, which looks at all pairs of them, is left out.
    """

    lengths: Several[Count]
    degrees: Several[Count]
    head_dim: Count = 8
    steps: Count = 64
    exact_to: Whole = 2**14
    rounds: Count = 5


def programs(config: Config) -> dict[str, Any]:
    """What an accelerator must have room for: every form after the most tokens."""

    def exact() -> Any:
        longest = max(n for n in config.lengths if n <= config.exact_to)
        return _one_by_one, jax.eval_shape(
            lambda: [small_logits(n, config.head_dim, 0) for n in (longest, config.steps)]
        )

    def polynomial(degree: int) -> Any:
        decoder = running_tensor_polynomial(config.head_dim, degree=degree)
        state = jax.eval_shape(lambda: decoder.init(config.head_dim))
        new = jax.eval_shape(lambda: small_logits(config.steps, config.head_dim, 0))
        return functools.partial(_decode, decoder), (state, new)

    of_degrees = {f"degree {degree}": functools.partial(polynomial, degree) for degree in config.degrees}
    return {"exact": exact, **of_degrees}


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Seconds of decoding a token after a number of others, and the slope of its log."""
    seconds: dict[str, dict[int, float]] = {}
    for length in config.lengths:
        past = small_logits(length, config.head_dim, config.seed)
        new = small_logits(config.steps, config.head_dim, config.seed + 1)
        calls = {}
        if length <= config.exact_to:
            calls["exact"] = functools.partial(jax.jit(_one_by_one).lower(past, new).compile(), past, new)
        for degree in config.degrees:
            decoder = running_tensor_polynomial(config.head_dim, degree=degree)
            state = _state_after(decoder, past)
            decode = jax.jit(functools.partial(_decode, decoder)).lower(state, new).compile()
            calls[f"degree {degree}"] = functools.partial(decode, state, new)
        for name, timing in time_interleaved(calls, rounds=config.rounds, patience=30).items():
            seconds.setdefault(name, {})[length] = timing.least / config.steps
    records: list[Record] = []
    for name, by_length in seconds.items():
        records += [{"method": name, "length": n, "seconds": s} for n, s in by_length.items()]
        records.append({"method": name, **slope(by_length)})
    return records


def _one_by_one(past: Any, new: Any) -> Any:
    """Each new query over all pairs of what came before and its own token."""

    def step(args: tuple[Any, Any, Any]) -> Any:
        q, k, v = args

        def with_own(old: Any, own: Any) -> Any:
            return tuple(jnp.concatenate([x, y[None]]) for x, y in zip(old, own, strict=True))

        return tensor_attention(q[None], with_own(past[1], k), with_own(past[2], v))[0]

    return lax.map(step, new)


def _decode(decoder: Any, state: Any, new: Any) -> Any:
    q, k, v = new
    q = q / math.sqrt(q.shape[-1])

    def step(state: Any, token: Any) -> Any:
        state, answer = decoder.step(state, *jax.tree.map(lambda x: x[None], token))
        return state, answer.out[0]

    return lax.scan(step, state, (q, k, v))[1]


@functools.partial(jax.jit, static_argnums=0)
def _state_after(decoder: Any, past: Any) -> Any:
    q, k, v = past
    state = decoder.init(v[0].shape[1])
    return lax.scan(lambda state, token: (decoder.step(state, *_rows(token))[0], None), state, (q, k, v))[0]


def _rows(token: Any) -> Any:
    return jax.tree.map(lambda x: x[None], token)


def table(records: Frame) -> Iterable[str]:
    """Milliseconds of a step by the number of tokens before it, and exponents."""
    yield from table_of_times(records, "decoding a token, by the number of tokens before it")


figure = figure_of_times
