"""Linformer and Nystrom against the fastest exact attention and their PyTorch versions; fast sketches against dense."""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

from approx_attention import attention
from approx_attention.core import draw_sketch
from approx_attention.evaluation import environment, time_interleaved
from benchmarks.exact import HEAD_DIM, NUM_HEADS, inputs, jax_arms, peak_flops, torch_version

SLOTS = (128, 256, 512, 1024, 2048)
LANDMARKS = 64
# The sizes in the comparison with PyTorch packages.
PEER_SLOTS = 256
SKETCHES = ("gaussian", "count", "sparse_jl", "hadamard", "uniform_rows")


def peer_version(name: str) -> str | None:
    """The version of an optional package, or None."""
    return importlib.metadata.version(name) if importlib.util.find_spec(name.replace("-", "_")) else None


def peer_arms(length: int) -> dict[str, Callable[[], Any]]:
    """The attention of `linformer` and `nystrom-attention` without their linear layers, one tensor as q, k and v."""
    torch = importlib.import_module("torch")
    width = NUM_HEADS * HEAD_DIM
    x = torch.tensor(np.asarray(inputs(length)[0]).reshape(1, length, width).copy())
    modules = {}
    if peer_version("linformer"):
        peer = importlib.import_module("linformer.linformer")
        module = peer.LinformerSelfAttention(width, length, k=PEER_SLOTS, heads=NUM_HEADS)
        module.to_q = module.to_k = module.to_v = module.to_out = torch.nn.Identity()
        modules["linformer (PyTorch)"] = module
    if peer_version("nystrom-attention"):
        peer = importlib.import_module("nystrom_attention")
        module = peer.NystromAttention(width, HEAD_DIM, NUM_HEADS, num_landmarks=LANDMARKS, residual=False)
        module.to_qkv = _thrice(torch)
        module.to_out = torch.nn.Identity()
        modules["nystrom-attention (PyTorch)"] = module

    def arm(module: Any) -> Callable[[], Any]:
        def forward() -> Any:
            with torch.no_grad():
                return module(x)

        return forward

    return {name: arm(module.eval()) for name, module in modules.items()}


def _thrice(torch: Any) -> Any:
    class Thrice(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.cat([x, x, x], -1)

    return Thrice()


def _linformer(query: Any, key: Any, value: Any, of_keys: Any, of_values: Any) -> Any:
    return attention(query, key, value, method="linformer", projection_k=of_keys, projection_v=of_values)


def measure(longest: int, rounds: int) -> dict[str, Any]:
    """Bidirectional forward passes at all lengths and sizes, with temporary memory; and sketches of 8192 rows."""
    console, rows = Console(), []
    for length in [n for n in (512, 1024, 2048, 4096, 8192, 16384, 32768) if n <= longest]:
        arguments = inputs(length)[:3]
        compiled = {f"exact {name}": arm for name, arm in jax_arms(length, False, False).items()}
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(form, *arguments) for name, form in compiled.items()
        }
        for slots in [k for k in SLOTS if k < length]:
            matrices = jax.random.normal(jax.random.key(1), (2, slots, length)) / np.sqrt(length)

            name = f"linformer {slots}"
            compiled[name] = jax.jit(_linformer).lower(*arguments, *matrices).compile()
            calls[name] = functools.partial(compiled[name], *arguments, *matrices)
        name = f"nystrom {LANDMARKS}"
        form = functools.partial(attention, method="nystrom", num_landmarks=LANDMARKS)
        compiled[name] = jax.jit(form).lower(*arguments).compile()
        calls[name] = functools.partial(compiled[name], *arguments)
        if torch_version():
            calls |= peer_arms(length)
        for name, timing in time_interleaved(calls, rounds=rounds, patience=60).items():
            memory = compiled[name].memory_analysis().temp_size_in_bytes if name in compiled else None
            rows.append({"length": length, "arm": name, "is_causal": False, "backward": False,
                         "seconds": timing.least, "median_seconds": timing.median, "temp_bytes": memory})  # fmt: skip
        shown = "  ".join(f"{row['arm']} {row['seconds'] * 1e3:.1f}" for row in rows if row["length"] == length)
        console.print(f"n={length} ms: {shown}")
    return {
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "slots": list(SLOTS),
        "landmarks": LANDMARKS,
        "rounds": rounds,
        "peak_flops_per_second": peak_flops(),
        "environment": environment()
        | {"torch": torch_version()}
        | {name: peer_version(name) for name in ("linformer", "nystrom-attention")},
        "rows": rows,
        "sketches": _sketches(rounds),
    }


def _sketches(rounds: int, num_rows: int = 8192, size: int = 256) -> dict[str, Any]:
    """Seconds to apply a sampled sketch to the keys of one head, and to sample and apply it."""
    x = jax.random.normal(jax.random.key(2), (num_rows, HEAD_DIM))
    key = jax.random.key(3)
    applied, drawn = {}, {}
    for kind in SKETCHES:
        sketch = draw_sketch(key, kind, size, num_rows)
        apply = jax.jit(lambda sketch, x: sketch @ x).lower(sketch, x).compile()
        both = jax.jit(lambda key, x, kind=kind: draw_sketch(key, kind, size, num_rows) @ x).lower(key, x).compile()
        applied[kind] = functools.partial(apply, sketch, x)
        drawn[kind] = functools.partial(both, key, x)
    found = {name: time_interleaved(calls, rounds=rounds) for name, calls in (("applied", applied), ("drawn", drawn))}
    return {
        "num_rows": num_rows,
        "size": size,
        **{name: {kind: timing.least for kind, timing in of.items()} for name, of in found.items()},
    }
