"""The fused kernels of `approx_attention.kernels`, compiled for accelerators on a machine without one; no times.

The compiler for TPUs also reports the length of the schedule of a tile, that for GPUs the number of registers. Tiles
are chosen by these figures.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.ahead_of_time import Platform
from benchmarks.compiled import compile_each
from benchmarks.kernel_programs import NUM_HEADS, Case

CHIPS: dict[Platform, tuple[str, ...]] = {"tpu": ("v5e", "v6e"), "gpu": ("H200",)}
HEAD_DIMS = (64, 128)
LENGTHS = (4096, 32768, 131072)

# Tiles that a search compares, as rows, columns and strip, for a v5e.
FORWARD_TILES = (
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (1024, 1024, 256),
    (512, 1024, 512),
    (512, 2048, 512),
)
BACKWARD_TILES = (
    (1024, 512, 512),
    (512, 1024, 512),
    (1024, 1024, 512),
    (512, 512, 512),
    (512, 1024, 1024),
    (512, 1024, 256),
    (256, 1024, 512),
)

# Requirements: bundles for 1024 logits on a v5e, d = 128, forward and in both kernels of the gradient together.
MOST_BUNDLES, MOST_BUNDLES_BACKWARD = 5.2, 13
# Bytes of VMEM that a kernel may take, and of shared memory of an H200; there should be no spills.
MOST_VMEM, MOST_SHARED = 16 * 2**20, 227 * 2**10


def cases(platform: Platform) -> Iterator[Case]:
    """Default tiles on every chip, then the search."""
    for chip in CHIPS[platform]:
        for head_dim in HEAD_DIMS:
            for length in LENGTHS:
                for dtype in ("bfloat16", "float32") if length == LENGTHS[0] else ("bfloat16",):
                    for is_causal in (False, True) if length == LENGTHS[0] else (True,):
                        for backward in (False, True):
                            yield Case(platform, chip, length, head_dim, dtype, is_causal, backward)
    if platform == "tpu":
        for head_dim in HEAD_DIMS:
            for backward in (False, True):
                yield from _search(head_dim, backward)


def _search(head_dim: int, backward: bool) -> Iterator[Case]:
    """Cases that differ only in the tile of one pass."""
    for tile in BACKWARD_TILES if backward else FORWARD_TILES:
        tiles = (FORWARD_TILES[0], tile) if backward else (tile, BACKWARD_TILES[0])
        yield Case("tpu", "v5e", LENGTHS[0], head_dim, backward=backward, tiles=tiles)


def measure(
    platform: Platform,
    python: pathlib.Path,
    library: pathlib.Path,
    known: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
    *,
    limit: float = 900.0,
    again: bool = False,
) -> None:
    """Compile the kernels for a platform; the arguments are those of `compiled.compile_each`."""
    compile_each(
        cases(platform),
        {"platform": platform, "num_heads": NUM_HEADS},
        python,
        library,
        known,
        write,
        module="benchmarks.kernel_programs",
        sources=("approx_attention/kernels",),
        limit=limit,
        again=again,
    )
