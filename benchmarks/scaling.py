"""Time and memory of every method as the sequence grows, and the length from which it beats exact attention."""

import functools
from typing import Any

import jax
from rich.console import Console

from approx_attention import METHODS, attention
from approx_attention.compare import environment
from approx_attention.diagnostics import time_interleaved
from benchmarks.exact import HEAD_DIM, NUM_HEADS, inputs, jax_arms, peak_flops, with_gradient

SIZE = 256
SETTINGS = {"local": 128}


def measure(longest: int, rounds: int) -> dict[str, Any]:
    """Every method but exact at one size, interleaved with the exact forms at each length."""
    console, rows = Console(), []
    lengths = [n for n in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536) if n <= longest]
    for backward in (False, True):
        for is_causal in (False, True):
            for length in lengths:
                if backward and length > 8192:
                    continue
                arguments = inputs(length) if backward else inputs(length)[:3]
                compiled = {f"exact {name}": arm for name, arm in jax_arms(length, is_causal, backward).items()}
                for name, method in METHODS.items():
                    if not method.capabilities.subquadratic or (is_causal and not method.capabilities.causal):
                        continue
                    size = {method.size: SETTINGS.get(name, SIZE)} if method.size else {}
                    rng = jax.random.key(0) if method.capabilities.needs_key else None
                    form = functools.partial(attention, method=name, rng=rng, is_causal=is_causal, **size)
                    compiled[name] = jax.jit(with_gradient(form) if backward else form).lower(*arguments).compile()
                calls = {name: functools.partial(form, *arguments) for name, form in compiled.items()}
                timings = time_interleaved(calls, rounds=rounds, patience=60)
                for name, timing in timings.items():
                    rows.append(
                        {
                            "length": length,
                            "arm": name,
                            "size": None if name.startswith("exact") else SETTINGS.get(name, SIZE),
                            "is_causal": is_causal,
                            "backward": backward,
                            "seconds": timing.least,
                            "median_seconds": timing.median,
                            "temp_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
                        }
                    )
                shown = "  ".join(f"{name} {timing.least * 1e3:.1f}" for name, timing in timings.items())
                console.print(
                    f"n={length} {'causal' if is_causal else 'full'} {'fwd+bwd' if backward else 'fwd'} ms: {shown}"
                )
    return {
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "size": SIZE,
        "rounds": rounds,
        "peak_flops_per_second": peak_flops(),
        "environment": environment(),
        "rows": rows,
    }
