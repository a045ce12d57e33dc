"""One program of fused kernels compiled ahead of time: ``python -m benchmarks.kernel_programs LIBRARY CASE``.

It runs in a separate process, started by `benchmarks.kernels`, like a case of `benchmarks.ahead_of_time`.
"""

import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import ahead_of_time, kernel_dumps
from benchmarks.ahead_of_time import Platform

NUM_HEADS = 8
TOPOLOGIES = {"v5e": "v5e:2x2x1", "v6e": "v6e:2x2x1", "H200": "h200"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of `kernels.state` over 8 heads.

    Attributes:
        platform: the target of the compiler.
        chip: a name of `TOPOLOGIES`.
        length: number of queries, and of keys.
        is_causal: whether queries see earlier keys alone.
        backward: the gradient, with the forward pass that it needs, instead of the forward pass.
        tiles: the sizes of the tiles of a TPU, forward and backward; None for the default.
    """

    platform: Platform
    chip: str
    length: int
    head_dim: int
    dtype: str = "bfloat16"
    is_causal: bool = False
    backward: bool = False
    tiles: Sequence[Sequence[int]] | None = None

    def __str__(self) -> str:
        words = [self.chip, f"n={self.length}", f"d={self.head_dim}", self.dtype]
        words += ["causal"] * self.is_causal + ["with gradient"] * self.backward
        return " ".join(words + [f"tiles={self.tiles}"] * (self.tiles is not None))


def compiled(case: Case) -> dict[str, Any]:
    """Compile a case.

    Returns:
        CPU seconds of the compiler, tracing included; bytes of temporaries; the tiles; and for each kernel the figures
        of `benchmarks.kernel_dumps`.
    """
    with tempfile.TemporaryDirectory() as dump:
        # The compiler reads these flags when it is loaded.
        if case.platform == "tpu":
            flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_llo_pass_label_regex=final_bundles"
        else:
            os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump}"
        row = _compiled(case)
        folder = pathlib.Path(dump)
        if case.platform == "tpu":
            found = kernel_dumps.of_tpu(folder, is_full=not case.is_causal)
        else:
            found = kernel_dumps.of_gpu(folder)
    return row | {"kernels": {name: found[name] for name in sorted(found)}}


def _compiled(case: Case) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from approx_attention import kernels

    tiles = _tiles(case)
    here = ahead_of_time.chip(case.platform, TOPOLOGIES[case.chip])

    def of_head(q, k, v):
        right = 0 if case.is_causal else None
        return kernels.state(q, k, v, right=right, scale=case.head_dim**-0.5, implementation="pallas", tiles=tiles)

    def forward(q, k, v):
        state = jax.vmap(of_head)(q, k, v)
        return state.out, state.lse

    def gradient(q, k, v, *cotangents):
        return jax.vjp(forward, q, k, v)[1](cotangents)

    shape = NUM_HEADS, case.length, case.head_dim
    tensors = 3 * [jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype), sharding=here)]
    cotangents = [jax.ShapeDtypeStruct(x, jnp.float32, sharding=here) for x in (shape, shape[:2])]
    function, operands = (gradient, tensors + cotangents) if case.backward else (forward, tensors)
    start = time.process_time()
    program = jax.jit(function).lower(*operands).compile()
    seconds = round(time.process_time() - start, 1)
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "compiler_seconds": seconds,
        "temp_bytes": memory.temp_size_in_bytes,
        "tiles": {name: tile._asdict() for name, tile in tiles._asdict().items()},
    }


def _tiles(case: Case) -> Any:
    from approx_attention.kernels import default_tiles

    platform = "cuda" if case.platform == "gpu" else "tpu"
    tiles = default_tiles(platform, case.head_dim, case.head_dim, case.dtype)
    if case.tiles is None:
        return tiles
    return type(tiles)(*(type(tile)(*sizes) for tile, sizes in zip(tiles, case.tiles, strict=True)))


if __name__ == "__main__":
    ahead_of_time.main(Case, compiled)
