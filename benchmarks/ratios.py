"""Ratios of times on a CPU that show the distance of the forms from their floor; both times are from one run."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console

from approx_attention import METHODS, attention, sparse_attention
from approx_attention.evaluation import environment, time_interleaved
from benchmarks import decode
from benchmarks.exact import inputs, jax_arms, peak_flops, torch_arm, torch_version, with_gradient
from benchmarks.scaling import form_of
from benchmarks.sparse_patterns import share_of_triangle, window_and_global

LENGTH = 8192
Calls = dict[str, Callable[[], Any]]


def measure(rounds: int) -> dict[str, Any]:
    """The rows of all ratios: the two timed calls, the length, the seconds of both, and the limit of the ratio.

    All ratios are of times, so that a limit on speed is the inverse: "10 times as fast" is at most 0.1.
    """
    rows: list[dict[str, Any]] = []
    for of_one_kind in (_imports, _against_torch, _decoding, _block_sparse, _causal, _gradients):
        for row in of_one_kind(rounds):
            rows.append(row)
            Console().print(
                f"{row['what']} / {row['over']}, n = {row['length']}: "
                f"{row['seconds'] * 1e3:.1f} / {row['baseline_seconds'] * 1e3:.1f} ms = "
                f"{row['seconds'] / row['baseline_seconds']:.2f}, at most {row['bar']}"
            )
        jax.clear_caches()
    peak = peak_flops()
    return {"rounds": rounds, "peak_flops_per_second": peak, "environment": environment() | {"torch": torch_version()},
            "num_heads": 8, "head_dim": 64, "rows": rows}  # fmt: skip


def _row(what: str, over: str, length: int | None, seconds: float, baseline: float, bar: float) -> dict[str, Any]:
    return {"what": what, "over": over, "length": length, "seconds": seconds, "baseline_seconds": baseline, "bar": bar}


def _compiled(function: Callable[..., Any], length: int, *, backward: bool = False) -> Callable[[], Any]:
    arguments = inputs(length) if backward else inputs(length)[:3]
    return functools.partial(jax.jit(with_gradient(function) if backward else function), *arguments)


def _causal(rounds: int) -> Iterator[dict[str, Any]]:
    """The causal form of a method over its bidirectional one."""
    for name in ("favor", "eva", "mean_pool", "uniform_sample"):
        calls: Calls = {str(causal): _compiled(form_of(name, causal), LENGTH) for causal in (False, True)}
        timings = time_interleaved(calls, rounds=rounds)
        yield _row(f"{name}, causal", "bidirectional", LENGTH, timings["True"].least, timings["False"].least, 2)


def _gradients(rounds: int) -> Iterator[dict[str, Any]]:
    """Both passes of a causal form over its forward pass."""
    for name, method in METHODS.items():
        if not (method.capabilities.causal and method.capabilities.subquadratic):
            continue
        calls: Calls = {str(x): _compiled(form_of(name, True), LENGTH, backward=x) for x in (False, True)}
        timings = time_interleaved(calls, rounds=rounds)
        both, forward = timings["True"].least, timings["False"].least
        yield _row(f"{name}, causal, both passes", "forward", LENGTH, both, forward, 3)


def _decoding(rounds: int) -> Iterator[dict[str, Any]]:
    """The cache of all tokens over the fastest of the usual caches, for one token of a small language model."""
    for length in (1024, LENGTH, 4 * LENGTH):
        calls = decode.calls(length, ["exact"])[0]
        seconds = {name: x.least / decode.STEPS for name, x in time_interleaved(calls, rounds=rounds).items()}
        ours = seconds.pop("exact")
        fastest = min(seconds, key=lambda name: seconds[name])
        yield _row("decoding, exact", fastest, length, ours, seconds[fastest], round(1 / 0.9, 2))


def _against_torch(rounds: int) -> Iterator[dict[str, Any]]:
    """Exact attention over that of PyTorch, if it is installed."""
    for causal in (False, True) if torch_version() else ():
        arguments = inputs(4096)[:3]
        forms = jax_arms(4096, causal, False)
        calls: Calls = {
            "ours": functools.partial(forms["blocked"], *arguments),
            "torch": torch_arm(4096, causal, False),
        }
        timings = time_interleaved(calls, rounds=rounds)
        yield _row(f"exact{', causal' * causal}", "PyTorch", 4096, timings["ours"].least, timings["torch"].least, 1.15)


def _block_sparse(rounds: int) -> Iterator[dict[str, Any]]:
    """A causal window and a global block of 5 % of the pairs over causal exact attention."""
    length = 2 * LENGTH
    blocks = window_and_global(length)
    sparse = functools.partial(attention, method=sparse_attention, pattern=blocks, is_causal=True)
    exact = functools.partial(attention, method="exact", is_causal=True)
    calls: Calls = {"sparse": _compiled(sparse, length), "exact": _compiled(exact, length)}
    timings = time_interleaved(calls, rounds=rounds)
    share = f"{share_of_triangle(blocks):.1%} of the pairs by blocks"
    yield _row(share, "exact, causal", length, timings["sparse"].least, timings["exact"].least, 0.1)


def _imports(rounds: int) -> Iterator[dict[str, Any]]:
    """Starting Python with this library over starting it with JAX alone, both from bytecode as users have them."""
    own = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def start(module: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], env=own, check=True)
        return time.perf_counter() - begun

    seconds = [(start("approx_attention"), start("jax")) for _ in range(rounds + 1)][1:]
    ours, jax_alone = (min(x) for x in zip(*seconds, strict=True))
    yield _row("import approx_attention", "import jax", None, ours, jax_alone, 1.3)
