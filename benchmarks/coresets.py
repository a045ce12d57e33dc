"""Coresets: times to build and to compile them, and the speedup of attention over them."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

from approx_attention import WeightedKV, attend, attention, fold_scale, summarize_coreset
from approx_attention.core import each
from approx_attention.coresets import ALGORITHMS, Algorithm, Halving, PivotedNystrom
from approx_attention.evaluation import environment, time_interleaved
from benchmarks.exact import HEAD_DIM, NUM_HEADS, inputs, peak_flops

LENGTH, SIZE = 16384, 1024
ARMS: dict[str, Algorithm] = {
    "guarded": ALGORITHMS["guarded"],
    "kmeans_nystrom": ALGORITHMS["kmeans_nystrom"],
    "kmeans_merge": ALGORITHMS["kmeans_merge"],
    "halving, blocks of 2048": Halving(block=2048),
    "halving, blocks of 256": Halving(rule="greedy", block=256),
    "halving, blocks of 256, any order": Halving(rule="greedy", order="random", block=256),
    "halving_fitted": ALGORITHMS["halving_fitted"],
    "stratified": ALGORITHMS["stratified"],
    "thinformer": ALGORITHMS["thinformer"],
    "nystrom_rpc, 16 bins": PivotedNystrom(bins=16),
    "uniform": ALGORITHMS["uniform"],
}


def _heads_first(x: Array) -> Array:
    return jnp.moveaxis(x[0], 1, 0)


def _build(algorithm: Algorithm, key: Array, value: Array, rng: Array) -> WeightedKV:
    def head(args: tuple[Array, Array, Array]) -> WeightedKV:
        k, v, rng = args
        return summarize_coreset(fold_scale(k, k)[1], v, rng, coreset_size=SIZE, algorithm=algorithm)

    heads = _heads_first(key), _heads_first(value), jax.random.split(rng, NUM_HEADS)
    return each(head, heads)


def _answer(query: Array, small: WeightedKV) -> Array:
    def head(args: tuple[Array, WeightedKV]) -> Array:
        # As in `attention`, a head is sliced from the tensor in place.
        q, small = query[0, :, args[0]], args[1]
        return attend(fold_scale(q, q)[0], small).out

    heads = jnp.arange(NUM_HEADS), small
    return each(head, heads)


def measure(rounds: int) -> dict[str, Any]:
    """Times of one exact pass, of the build of each coreset, and of attention over it."""
    query, key, value, _ = inputs(LENGTH)
    rng = jax.random.key(0)
    exact = jax.jit(functools.partial(attention, method="exact")).lower(query, key, value).compile()
    calls: dict[str, Callable[[], Any]] = {"exact": functools.partial(exact, query, key, value)}
    compile_seconds = {}
    for name, algorithm in ARMS.items():
        start = time.perf_counter()
        build = jax.jit(functools.partial(_build, algorithm)).lower(key, value, rng).compile()
        compile_seconds[name] = time.perf_counter() - start
        calls[f"build {name}"] = functools.partial(build, key, value, rng)
        small = build(key, value, rng)
        if name in ("guarded", "uniform"):
            answer = jax.jit(_answer).lower(query, small).compile()
            calls[f"attend {name}"] = functools.partial(answer, query, small)
    timings = time_interleaved(calls, rounds=rounds, patience=60)
    rows = [{"arm": name, "seconds": t.least, "median_seconds": t.median} for name, t in timings.items()]
    for row in rows:
        share = row["seconds"] / timings["exact"].least
        Console().print(f"{row['arm']:45} {1e3 * row['seconds']:8.1f} ms  {share:.3f} of exact")
    return {
        "length": LENGTH,
        "size": SIZE,
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "rounds": rounds,
        "peak_flops_per_second": peak_flops(),
        "environment": environment(),
        "compile_seconds": compile_seconds,
        "rows": rows,
    }
