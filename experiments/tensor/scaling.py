"""Time of exact third-order attention and of the polynomial method as sequences grow, and of a decoding step."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console

from approx_attention import tensor_attention, tensor_polynomial
from approx_attention.evaluation import time_interleaved
from approx_attention.tensor import running_tensor_polynomial
from experiments.config import Count, Seeded, Several, Whole
from experiments.harness.long_context import slope


@dataclasses.dataclass(frozen=True)
class TensorScalingConfig(Seeded):
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


@dataclasses.dataclass(frozen=True)
class TensorDecodeConfig(Seeded):
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


def tensors(length: int, head_dim: int, seed: int) -> tuple[Any, Any, Any]:
    """Gaussian queries, and two sets of keys and of values, with small logits."""
    x = jax.random.normal(jax.random.key(seed), (5, length, head_dim)) / math.sqrt(head_dim)
    return x[0], (x[1], x[2]), (x[3], x[4])


def with_gradient(form: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the squared norm of what a form of attention answers, with respect to all tensors."""

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(form(q, k, v) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


def run_scaling(config: TensorScalingConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Seconds of a call by length, slopes of log time, and the length from which the polynomial method is faster."""
    forms: dict[str, Callable[..., Any]] = {"exact": tensor_attention}
    forms |= {f"degree {g}": functools.partial(tensor_polynomial, degree=g) for g in config.degrees}
    seconds: dict[str, dict[int, float]] = {name: {} for name in forms}
    for length in sorted({*config.exact_lengths, *config.polynomial_lengths}):
        arguments = tensors(length, config.head_dim, config.seed)
        calls = {}
        for name, form in forms.items():
            if length in (config.exact_lengths if name == "exact" else config.polynomial_lengths):
                timed = with_gradient(form) if config.backward else form
                calls[name] = functools.partial(jax.jit(timed).lower(*arguments).compile(), *arguments)
        timings = time_interleaved(calls, rounds=config.rounds, patience=30)
        for name, timing in timings.items():
            seconds[name][length] = timing.least
        shown = ", ".join(f"{name} {timing.least * 1e3:.3g} ms" for name, timing in timings.items())
        console.print(f"{directory.name} n={length}: {shown}")
    methods: dict[str, Any] = {}
    for name, by_length in seconds.items():
        least = config.exact_from if name == "exact" else config.polynomial_from
        methods[name] = {
            "seconds": {str(n): s for n, s in by_length.items()},
            "slope": slope({n: s for n, s in by_length.items() if n >= least}),
        }
        if name != "exact":
            rank = math.comb(config.head_dim + int(name.removeprefix("degree ")), config.head_dim)
            methods[name]["crossover"] = crossover(by_length, seconds["exact"])
            methods[name]["crossover_of_flops"] = math.sqrt(3 * rank * (config.head_dim + 1) / (2 * config.head_dim))
    return {"methods": methods}


def crossover(seconds: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """The length from which on a method is faster than a baseline, between measured lengths; 0 if it is everywhere."""
    lengths = sorted(seconds.keys() & baseline.keys())
    ratios = [math.log(seconds[n] / baseline[n]) for n in lengths]
    if not ratios or ratios[-1] >= 0:
        return None
    slower = [i for i, ratio in enumerate(ratios) if ratio >= 0]
    if not slower:
        return 0.0
    i = slower[-1]
    share = ratios[i] / (ratios[i] - ratios[i + 1])
    return math.exp((1 - share) * math.log(lengths[i]) + share * math.log(lengths[i + 1]))


def run_decode(config: TensorDecodeConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Seconds of decoding a token after so many others, and the slope of its log."""
    seconds: dict[str, dict[int, float]] = {}
    for length in config.lengths:
        past = tensors(length, config.head_dim, config.seed)
        new = tensors(config.steps, config.head_dim, config.seed + 1)
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
    return {
        "methods": {
            name: {"seconds": {str(n): s for n, s in by_length.items()}, "slope": slope(by_length)}
            for name, by_length in seconds.items()
        }
    }


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
