"""FAVOR+, LARA and EVA against the fastest exact attention and, if installed, their counterparts in PyTorch."""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

from approx_attention import METHODS, attention
from approx_attention.evaluation import environment, time_interleaved
from benchmarks.exact import HEAD_DIM, NUM_HEADS, inputs, jax_arms, peak_flops, torch_arm, torch_version, with_gradient

SETTINGS: dict[str, dict[str, Any]] = {
    "favor": {"num_features": 256},
    "lara": {"num_landmarks": 64},
    "eva": {"window_size": 128, "num_chunks": 64},
}


def performer_version() -> str | None:
    """The version of the optional package performer-pytorch, or None."""
    found = importlib.util.find_spec("performer_pytorch")
    return importlib.metadata.version("performer-pytorch") if found else None


def performer_arm(length: int, backward: bool) -> Callable[[], Any]:
    """performer-pytorch's FAVOR+ with the same number of features, on the same tensors in its own layout."""
    torch = importlib.import_module("torch")
    peer = importlib.import_module("performer_pytorch.performer_pytorch")
    attend = peer.FastAttention(HEAD_DIM, nb_features=SETTINGS["favor"]["num_features"])
    *qkv, cotangent = (torch.tensor(np.asarray(x).swapaxes(1, 2).copy()) for x in inputs(length))
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return attend(*qkv)

        return forward
    for x in qkv:
        x.requires_grad_(True)
    return lambda: torch.autograd.grad(attend(*qkv), qkv, cotangent)


def measure(longest: int, rounds: int) -> dict[str, Any]:
    """Bidirectional, forward at all lengths and with gradients up to 8192; the figures of a row are from one run."""
    console, rows = Console(), []
    lengths = [n for n in (1024, 2048, 4096, 8192, 16384, 32768) if n <= longest]
    for backward in (False, True):
        for length in lengths:
            if backward and length > 8192:
                continue
            first = len(rows)
            arguments = inputs(length) if backward else inputs(length)[:3]
            compiled = {f"exact {name}": arm for name, arm in jax_arms(length, False, backward).items()}
            for name, settings in SETTINGS.items():
                rng = jax.random.key(0) if METHODS[name].capabilities.needs_key else None
                form = functools.partial(attention, method=name, rng=rng, **settings)
                compiled[name] = jax.jit(with_gradient(form) if backward else form).lower(*arguments).compile()
            calls: dict[str, Callable[[], Any]] = {
                name: functools.partial(form, *arguments) for name, form in compiled.items()
            }
            if torch_version():
                calls["PyTorch exact"] = torch_arm(length, False, backward)
                if performer_version():
                    calls["performer-pytorch"] = performer_arm(length, backward)
            for name, timing in time_interleaved(calls, rounds=rounds, patience=60).items():
                flops = None
                if name in SETTINGS and not backward:
                    size = SETTINGS[name][METHODS[name].size or ""]
                    flops = NUM_HEADS * METHODS[name].cost(length, length, HEAD_DIM, HEAD_DIM, size)
                rows.append(
                    {
                        "length": length,
                        "arm": name,
                        "is_causal": False,
                        "backward": backward,
                        "seconds": timing.least,
                        "median_seconds": timing.median,
                        "flops_per_second": None if flops is None else flops / timing.least,
                    }
                )
            shown = "  ".join(f"{row['arm']} {row['seconds'] * 1e3:.1f}" for row in rows[first:])
            console.print(f"n={length} {'fwd+bwd' if backward else 'fwd'} ms: {shown}")
    return {
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "settings": SETTINGS,
        "rounds": rounds,
        "peak_flops_per_second": peak_flops(),
        "environment": environment() | {"torch": torch_version(), "performer-pytorch": performer_version()},
        "rows": rows,
    }
