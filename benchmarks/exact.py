"""Exact attention: this library against `jax.nn.dot_product_attention` and, if installed, PyTorch."""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from approx_attention import attention
from approx_attention.evaluation import environment, time_interleaved

NUM_HEADS, HEAD_DIM = 8, 64
# A configuration that stores all logits is left out if the logits take more bytes than this.
LARGEST_LOGITS = 2**30


def torch_version() -> str | None:
    """The version of the optional package PyTorch, or None."""
    return importlib.metadata.version("torch") if importlib.util.find_spec("torch") else None


def peak_flops(rounds: int = 9) -> dict[str, float]:
    """FLOP/s of a square float32 matrix product, in JAX and, if installed, in PyTorch."""
    size = 4096
    x = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    product = jax.jit(jnp.matmul)
    calls: dict[str, Callable[[], Any]] = {"jax": functools.partial(product, jnp.asarray(x), jnp.asarray(x))}
    if torch_version():
        torch = importlib.import_module("torch")
        calls["torch"] = functools.partial(torch.matmul, torch.tensor(x), torch.tensor(x))
    return {name: 2 * size**3 / timing.least for name, timing in time_interleaved(calls, rounds=rounds).items()}


def inputs(length: int, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """query, key, value and a cotangent, each ``[1, T, 8, 64]``."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, (1, length, NUM_HEADS, HEAD_DIM)).astype(dtype) for key in keys)


def num_flops(length: int, is_causal: bool, backward: bool) -> float:
    """Floating-point operations of the products alone: 2 forward, 5 backward, half of the pairs when causal."""
    return 2 * NUM_HEADS * length**2 * HEAD_DIM * (7 if backward else 2) / (2 if is_causal else 1)


def with_gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The function's forward and backward pass."""

    def both(query, key, value, cotangent):
        out, pullback = jax.vjp(function, query, key, value)
        return out, pullback(cotangent)

    return both


def jax_arms(length: int, is_causal: bool, backward: bool) -> dict[str, Any]:
    """Compiled configurations in JAX by name."""
    forms: dict[str, Callable[..., jax.Array]] = {
        "blocked": functools.partial(attention, method="exact", implementation="blocked", is_causal=is_causal)
    }
    if 4 * NUM_HEADS * length**2 <= LARGEST_LOGITS:
        forms["dense"] = functools.partial(attention, method="exact", implementation="dense", is_causal=is_causal)
        forms["jax.nn"] = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    query, key, value, cotangent = inputs(length)
    arguments = (query, key, value, cotangent) if backward else (query, key, value)
    return {
        name: jax.jit(with_gradient(form) if backward else form).lower(*arguments).compile()
        for name, form in forms.items()
    }


def torch_arm(length: int, is_causal: bool, backward: bool) -> Callable[[], Any]:
    """PyTorch's fused attention on the same tensors, in its own layout."""
    torch = importlib.import_module("torch")
    tensors = [torch.tensor(np.asarray(x).swapaxes(1, 2).copy()) for x in inputs(length)]
    *qkv, cotangent = tensors
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=is_causal)
    if not backward:
        return lambda: attend(*qkv)
    for x in qkv:
        x.requires_grad_(True)
    return lambda: torch.autograd.grad(attend(*qkv), qkv, cotangent)


def measure(longest: int, rounds: int) -> dict[str, Any]:
    """All lengths, directions and passes; the figures of a row are from one run."""
    console, rows = Console(), []
    peak = peak_flops()
    console.print(f"peak: { ({name: f'{value / 1e9:.0f} GFLOP/s' for name, value in peak.items()}) }")
    lengths = [n for n in (512, 1024, 2048, 4096, 8192, 16384, 32768) if n <= longest]
    for length in lengths:
        for backward in (False, True):
            if backward and length > 8192:
                continue
            for is_causal in (False, True):
                compiled = jax_arms(length, is_causal, backward)
                arguments = inputs(length) if backward else inputs(length)[:3]
                calls: dict[str, Callable[[], Any]] = {
                    name: functools.partial(form, *arguments) for name, form in compiled.items()
                }
                if torch_version():
                    calls["torch"] = torch_arm(length, is_causal, backward)
                timings = time_interleaved(calls, rounds=rounds, patience=60)
                flops = num_flops(length, is_causal, backward)
                for name, timing in timings.items():
                    memory = compiled[name].memory_analysis().temp_size_in_bytes if name in compiled else None
                    rows.append(
                        {
                            "length": length,
                            "arm": name,
                            "is_causal": is_causal,
                            "backward": backward,
                            "seconds": timing.least,
                            "median_seconds": timing.median,
                            "temp_bytes": memory,
                            "flops_per_second": flops / timing.least,
                        }
                    )
                    console.print(
                        f"n={length} {'causal' if is_causal else 'full'} {'fwd+bwd' if backward else 'fwd'} {name}: "
                        f"{timing.least * 1e3:.1f} ms"
                    )
    return {
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "rounds": rounds,
        "peak_flops_per_second": peak,
        "environment": environment() | {"torch": torch_version()},
        "rows": rows,
    }
