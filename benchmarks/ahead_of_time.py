"""One program compiled for an absent accelerator: ``python -m benchmarks.ahead_of_time LIBRARY CASE``.

It runs in a separate process, started by `benchmarks.compiled`: no case can end or slow down another. Only the
measured parts of the library are imported, so that ``LIBRARY`` may be the source tree of another version.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from benchmarks.hlo import counted

Platform = Literal["tpu", "gpu"]

CHIPS = {"tpu": "TPU v5e", "gpu": "H200 (sm_90a)"}
# The first chip of a topology.
_TOPOLOGIES = {"tpu": "v5e:2x2x1", "gpu": "h200"}

# The compiler's description of an H200, as a process on one reports it.
_H200 = """
platform_name: "CUDA" device_description_str: "NVIDIA H200" dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 150000000000
}
"""
# libtpu queries the machine for its TPUs unless it is told which one to assume.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of `attention`.

    Attributes:
        platform: the target of the compiler.
        method: its name in ``METHODS``.
        length: tokens of each sequence.
        is_causal: whether queries see earlier keys alone.
        backward: the gradient, with the forward pass that it needs, instead of the forward pass.
        batch: number of sequences.
        options: the method's hyper-parameters.
        least_effort: compile as cheaply as the compiler can; such a program is not counted.
        backend: the result of `jax.default_backend` during the trace: ``"cpu"``, as when programs are exported.
    """

    platform: Platform
    method: str
    length: int
    is_causal: bool = False
    backward: bool = False
    batch: int = 1
    num_heads: int = 8
    head_dim: int = 64
    dtype: str = "bfloat16"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    least_effort: bool = False
    backend: str = "cpu"

    def __str__(self) -> str:
        words = [self.method, f"n={self.length}", f"B={self.batch}", f"N={self.num_heads}"]
        words += ["causal"] * self.is_causal + ["with gradient"] * self.backward
        return " ".join(words + [f"from a process on a {self.backend.upper()}"] * (self.backend != "cpu"))


def chip(platform: Platform, topology: str | None = None) -> Any:
    """The sharding of tensors on an absent chip, the first of a topology; by default that of `CHIPS`."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    name = topology or _TOPOLOGIES[platform]
    if platform == "tpu":
        described = topologies.get_topology_desc(topology_name=name, platform="tpu")
    else:
        described = topologies.get_topology_desc(
            topology_name=name, platform="cuda", target_config=_H200, topology="1x1x1"
        )
    return SingleDeviceSharding(described.devices[0])


def compiled(case: Case) -> dict[str, Any]:
    """Compile a case and count the operations of the program.

    Returns:
        CPU seconds of the compiler, tracing included; bytes of the inputs q, k, v; and, unless the compiler makes the
        least effort, bytes of temporaries and of the program, and the counts of `benchmarks.hlo`.
    """
    import jax
    import jax.numpy as jnp

    from approx_attention import METHODS, attention

    here = chip(case.platform)
    if case.least_effort:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    if case.backend != "cpu":
        jax.default_backend = lambda: case.backend
    shape = (case.batch, case.length, case.num_heads, case.head_dim)
    tensor = jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype), sharding=here)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=here)
    is_random = METHODS[case.method].capabilities.needs_key
    # `is_causal` is passed only where it is needed, because some methods do not have it.
    options = {**case.options, **({"is_causal": True} if case.is_causal else {})}

    def forward(q, k, v, rng=None):
        return attention(q, k, v, method=case.method, rng=rng, **options)

    def gradient(q, k, v, cotangent, rng=None):
        return jax.vjp(lambda q, k, v: forward(q, k, v, rng), q, k, v)[1](cotangent)

    function, tensors = (gradient, 4 * [tensor]) if case.backward else (forward, 3 * [tensor])
    start = time.process_time()
    program = jax.jit(function).lower(*tensors, *[rng] * is_random).compile()
    row: dict[str, Any] = {"compiler_seconds": round(time.process_time() - start, 1)}
    row["input_bytes"] = 3 * math.prod(shape) * tensor.dtype.itemsize
    if case.least_effort:
        return row
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    row["temp_bytes"] = memory.temp_size_in_bytes
    # The CUDA plug-in does not report the size of its code.
    row["program_bytes"] = memory.generated_code_size_in_bytes or None
    return row | dataclasses.asdict(counted(text))


def main(case_type: Callable[..., Any] = Case, compile_case: Callable[[Any], dict[str, Any]] = compiled) -> None:
    """Print the row of one case as JSON, on the last line."""
    library, case = sys.argv[1:]
    os.environ.update(_WITHOUT_TPU | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"})
    sys.path.insert(0, library)
    try:
        row = compile_case(case_type(**json.loads(case)))
    except Exception as error:  # failures are part of the measurement
        row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print(f"\n{json.dumps(row)}")


if __name__ == "__main__":
    main()
