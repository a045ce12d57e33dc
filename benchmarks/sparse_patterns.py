"""Sparse attention: by blocks and by retrieval against exact attention, gathered against its memory traffic."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from rich.console import Console

from approx_attention import SparsePattern, attention, certify, sparse_attention
from approx_attention.evaluation import environment, time_interleaved
from approx_attention.sparse import BlockMap
from benchmarks.exact import HEAD_DIM, NUM_HEADS, inputs, jax_arms, peak_flops

# The approximate share of the causal pairs that the window and the global block see.
DENSITY = 0.05
BLOCK_SIZE = 64
KEYS_PER_QUERY = (4, 8, 16)
# Keys that each query reads, for methods that find keys by their logits or by a priority.
RETRIEVED = {"top_k": 64, "priority": 64, "lsh_top_k": 64, "lsh_priority": 64}
# Rows that the floor gathers at a time, as many as `sparse_attention` gathers.
ROWS = 512
CERTIFIED = {"num_tokens": 8192, "dimension": 128, "keys_per_row": 4}


def window_and_global(length: int) -> BlockMap:
    """The causal map of a window and one global block whose visited blocks are about `DENSITY` of the triangle."""
    options = {"block_size": BLOCK_SIZE, "num_queries": length, "num_keys": length}
    for before in range(1, length // BLOCK_SIZE):
        window = BlockMap.banded(before, 0, **options).visited
        blocks = BlockMap.from_blocks(window | (np.arange(window.shape[1])[None] < 1), **options).causal()
        if share_of_triangle(blocks) >= DENSITY:
            break
    return blocks


def share_of_triangle(blocks: BlockMap) -> float:
    """The share of the causal pairs that lie in visited blocks, including the parts of blocks above the diagonal."""
    return blocks.density * blocks.num_queries**2 / (blocks.num_queries * (blocks.num_queries + 1) / 2)


def _floor(key: Array, value: Array, places: Array) -> Array:
    """Fetch the same rows of keys and values, and add them up."""

    def of_head(head: Array) -> Array:
        k, v = key[0, :, head], value[0, :, head]

        def of_rows(places: Array) -> Array:
            k_own, v_own = lax.optimization_barrier((k[places], v[places]))
            return jnp.sum(k_own, axis=1) + jnp.sum(v_own, axis=1)

        rows = max(1, ROWS * KEYS_PER_QUERY[-1] // places.shape[1])
        return lax.map(of_rows, places.reshape(-1, min(rows, len(places)), places.shape[1])).reshape(-1, HEAD_DIM)

    return lax.map(of_head, jnp.arange(NUM_HEADS))


def retrieval_forms() -> dict[str, Callable[..., Array]]:
    """Causal attention over retrieved keys, as functions of query, key and value."""
    options: dict[str, Any] = {"is_causal": True, "rng": jax.random.key(2)}
    return {
        f"retrieved {name}": functools.partial(attention, method=name, keys_per_query=count, **options)
        for name, count in RETRIEVED.items()
    }


def measure(longest: int, rounds: int) -> dict[str, Any]:
    """Forward passes of all forms at all lengths, with temporary memory; and one certificate."""
    console, rows = Console(), []
    for length in [n for n in (4096, 8192, 16384, 32768) if n <= longest]:
        arguments = inputs(length)[:3]
        compiled = {f"exact {name}": arm for name, arm in jax_arms(length, True, False).items()}
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(form, *arguments) for name, form in compiled.items()
        }
        blocks = window_and_global(length)
        form = functools.partial(attention, method=sparse_attention, pattern=blocks, is_causal=True)
        compiled["blocks"] = jax.jit(form).lower(*arguments).compile()
        calls["blocks"] = functools.partial(compiled["blocks"], *arguments)
        for name, form in retrieval_forms().items():
            compiled[name] = jax.jit(form).lower(*arguments).compile()
            calls[name] = functools.partial(compiled[name], *arguments)
        for count in KEYS_PER_QUERY:
            pattern = SparsePattern.random(jax.random.key(1), length, count)

            def gathered(query: Array, key: Array, value: Array, pattern: SparsePattern) -> Array:
                return attention(query, key, value, method=sparse_attention, pattern=pattern)

            name = f"gathered {count}"
            compiled[name] = jax.jit(gathered).lower(*arguments, pattern).compile()
            calls[name] = functools.partial(compiled[name], *arguments, pattern)
            name = f"floor {count}"
            compiled[name] = jax.jit(_floor).lower(*arguments[1:], pattern.indices).compile()
            calls[name] = functools.partial(compiled[name], *arguments[1:], pattern.indices)
        for name, timing in time_interleaved(calls, rounds=rounds, patience=60).items():
            memory = compiled[name].memory_analysis().temp_size_in_bytes
            rows.append({"length": length, "arm": name, "is_causal": name.startswith(("exact", "blocks", "retrieved")),
                         "backward": False, "seconds": timing.least, "median_seconds": timing.median,
                         "temp_bytes": memory,
                         "density": share_of_triangle(blocks) if name == "blocks" else None})  # fmt: skip
        shown = "  ".join(f"{row['arm']} {row['seconds'] * 1e3:.1f}" for row in rows if row["length"] == length)
        console.print(f"n={length} ms: {shown}")
    seconds = _certificate_seconds(rounds)
    console.print(f"certificate {CERTIFIED}: {seconds:.2f} s")
    return {
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "block_size": BLOCK_SIZE,
        "keys_per_query": list(KEYS_PER_QUERY),
        "retrieved": RETRIEVED,
        "rounds": rounds,
        "peak_flops_per_second": peak_flops(),
        "environment": environment(),
        "rows": rows,
        "certificate": {**CERTIFIED, "seconds": seconds},
    }


def _certificate_seconds(rounds: int) -> float:
    """Seconds to certify one head with random inputs; the time does not depend on their values."""
    num_tokens, dimension = CERTIFIED["num_tokens"], CERTIFIED["dimension"]
    pattern = SparsePattern.random(jax.random.key(2), num_tokens, CERTIFIED["keys_per_row"])
    x = jax.random.normal(jax.random.key(3), (num_tokens, 2 * dimension))
    w_q, w_k = jax.random.normal(jax.random.key(4), (2, 2 * dimension, dimension))
    call = functools.partial(certify, x, w_q, w_k, pattern)
    return time_interleaved({"certificate": call}, rounds=rounds)["certificate"].least
