"""Attention over pairs of keys: exact, by the polynomial method and by messages along a path of two edges."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from approx_attention import tensor_attention, tensor_polynomial, tree_attention
from approx_attention.evaluation import environment, time_interleaved
from benchmarks.exact import peak_flops

HEAD_DIM, DEGREE = 8, 4
# Dense at first, where the times of the two forms cross.
LENGTHS = (16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
LONGEST_EXACT = 1024
# Messages under exact attention are quadratic.
LONGEST_TREE = 8192
# The head on which the exact form is compared with the machine's peak.
PEAK_LENGTH, PEAK_HEAD_DIM = 512, 64
# The figure that Meta reports for the windowed form on an H100, in bfloat16 (2-simplicial attention in TLX).
META_TERAFLOPS = 588
WINDOW = {"length": 16384, "num_heads": 8, "head_dim": 128, "window": (32, 512)}


def inputs(length: int, head_dim: int) -> tuple[Any, Any, Any]:
    """q, two sets of keys and two of values of one head, Gaussian, with small logits."""
    x = jax.random.normal(jax.random.key(0), (5, length, head_dim)) / math.sqrt(head_dim)
    return x[0], (x[1], x[2]), (x[3], x[4])


def all_forms() -> dict[str, tuple[Callable[..., jax.Array], int]]:
    """The forms of attention over pairs of keys, and the longest sequence at which each is measured."""
    path = functools.partial(tree_attention, parents=(-1, 0))
    return {
        "exact": (tensor_attention, LONGEST_EXACT),
        "polynomial": (functools.partial(tensor_polynomial, degree=DEGREE), LENGTHS[-1]),
        "tree exact": (path, LONGEST_TREE),
        "tree mean_pool": (functools.partial(path, method="mean_pool"), LENGTHS[-1]),
    }


def with_gradient(form: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The gradient of a form's squared norm with respect to all tensors, the forward pass included."""

    def loss(q: Any, k: Any, v: Any) -> jax.Array:
        return jnp.sum(form(q, k, v) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


def measure(longest: int, rounds: int) -> dict[str, Any]:
    """All forms by length, forward and with gradients; the exact form's share of the peak; windows on a GPU."""
    console, rows = Console(), []
    for backward in (False, True):
        for length in [n for n in LENGTHS if n <= longest]:
            arguments = inputs(length, HEAD_DIM)
            compiled: dict[str, Any] = {
                name: jax.jit(with_gradient(form) if backward else form).lower(*arguments).compile()
                for name, (form, longest_here) in all_forms().items()
                if length <= longest_here // (2 if backward and longest_here < LENGTHS[-1] else 1)
            }
            calls = {name: functools.partial(form, *arguments) for name, form in compiled.items()}
            timings = time_interleaved(calls, rounds=rounds, patience=30)
            for name, timing in timings.items():
                memory = compiled[name].memory_analysis().temp_size_in_bytes
                rows.append({"length": length, "arm": name, "backward": backward, "seconds": timing.least,
                             "median_seconds": timing.median, "temp_bytes": memory})  # fmt: skip
            shown = "  ".join(f"{name} {timing.least * 1e3:.3g}" for name, timing in timings.items())
            console.print(f"n={length} {'with gradients' if backward else 'forward'} ms: {shown}")
    return {
        "num_heads": 1,
        "head_dim": HEAD_DIM,
        "degree": DEGREE,
        "rounds": rounds,
        "peak_flops_per_second": peak_flops(),
        "environment": environment(),
        "rows": rows,
        "exact_at_peak": _exact_at_peak(rounds),
        "windowed": None if jax.default_backend() == "cpu" else _windowed(rounds),
    }


def _exact_at_peak(rounds: int) -> dict[str, Any]:
    """The exact form on a head of usual width: two products of 2 n^3 D operations each, exponentials uncounted."""
    arguments = inputs(PEAK_LENGTH, PEAK_HEAD_DIM)
    call = functools.partial(jax.jit(tensor_attention).lower(*arguments).compile(), *arguments)
    seconds = time_interleaved({"exact": call}, rounds=rounds, patience=60)["exact"].least
    flops = 4 * PEAK_LENGTH**3 * PEAK_HEAD_DIM
    return {"length": PEAK_LENGTH, "head_dim": PEAK_HEAD_DIM, "seconds": seconds, "flops_per_second": flops / seconds}


def _windowed(rounds: int) -> dict[str, Any]:
    """The exact windowed causal form in bfloat16, with the window of the 2-simplicial paper's kernel."""
    shape = (5, WINDOW["num_heads"], WINDOW["length"], WINDOW["head_dim"])
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    form = jax.vmap(functools.partial(tensor_attention, is_causal="both", window=WINDOW["window"]))
    arguments = x[0], (x[1], x[2]), (x[3], x[4])
    call = functools.partial(jax.jit(form).lower(*arguments).compile(), *arguments)
    seconds = time_interleaved({"windowed": call}, rounds=rounds, patience=60)["windowed"].least
    pairs = WINDOW["num_heads"] * WINDOW["length"] * math.prod(WINDOW["window"])
    flops = 4 * pairs * WINDOW["head_dim"]
    return {**WINDOW, "seconds": seconds, "flops_per_second": flops / seconds, "reported_by_meta": META_TERAFLOPS}
