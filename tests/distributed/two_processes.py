"""``python -m tests.distributed.two_processes OUT NUMBER PORT [DYING]``: four devices in one process or in two.

NUMBER is the index of this process, or ``alone``. Process DYING kills itself after all have met; the other must notice.
"""

import os
import pathlib
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from approx_attention import distributed

METHODS = {
    "exact": {},
    "local": {"window_size": 5},
    "favor": {"num_features": 16, "block_size": 4},
    "mean_pool": {"num_landmarks": 16, "block_size": 4},
}
NOTICED_WITHIN = 10  # seconds


def main(out: pathlib.Path, number: str, port: str, dying: str | None = None) -> None:
    processes = 1 if number == "alone" else 2
    jax.config.update("jax_num_cpu_devices", 4 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            processes,
            int(number),
            coordinator_bind_address=f"127.0.0.1:{port}",
            initialization_timeout=60,
            heartbeat_timeout_seconds=NOTICED_WITHIN,
            shutdown_timeout_seconds=NOTICED_WITHIN,
        )
    mesh = jax.make_mesh((4,), ("sequence",))
    layout = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    random = np.random.default_rng(0)
    tensors = [
        jax.make_array_from_callback(x.shape, layout, lambda index, x=x: x[index])
        for x in (random.normal(size=(2, 32, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    ]
    found = {}
    for name, settings in METHODS.items():
        for is_causal in (False, True):

            @jax.jit
            def attend(query, key, value, name=name, is_causal=is_causal, settings=settings):
                return distributed.attention(
                    query, key, value, mesh=mesh, axis="sequence", method=name, rng=jax.random.key(5),
                    is_causal=is_causal, **settings,
                )  # fmt: skip

            result = multihost_utils.process_allgather(attend(*tensors), tiled=True)
            found[f"{name} {is_causal}"] = np.asarray(result)
            if number == dying:
                print("dies", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    if number in ("alone", "0"):
        np.savez(out, **found)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
