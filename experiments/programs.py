"""The main programs of a study, and whether an accelerator that is not there can run one.

``python -m experiments.programs LIBRARY CASE`` compiles one in a separate process that `experiments.check` starts, as
`benchmarks.compiled` does with a case of `benchmarks.ahead_of_time`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import ahead_of_time
from benchmarks.ahead_of_time import Platform

# Bytes that a program may take: of a v5e what its compiler grants, of an H200 the share that JAX reserves by default.
MEMORY: Mapping[str, float] = {"tpu": 15.75 * 2**30, "gpu": 0.75 * 150e9}

# A function of arrays, and their shapes.
Program = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of a study at the scale ``gpu``, with its first seed.

    Attributes:
        platform: what it is compiled for.
        study: its name.
        configuration: of the study.
        program: a name of `programs`.
        settings: fingerprint of the configuration.
    """

    platform: Platform
    study: str
    configuration: str
    program: str
    settings: str

    def __str__(self) -> str:
        return f"{self.study}, {self.configuration}, {self.program}"


def programs(module: Any, config: Any) -> dict[str, Callable[[], Program]]:
    """The programs of a configuration that take its memory and time, by name.

    They are those that the study names in ``programs``, or the step of what it trains; others have none.
    """
    from experiments.training import step_program

    if hasattr(module, "programs"):
        return module.programs(config)
    steps = [functools.partial(step_program, own) for own in config.trains()] if has_programs(module) else []
    return {f"train step {number}" if number else "train step": step for number, step in enumerate(steps)}


def has_programs(module: Any) -> bool:
    """Whether the programs of a study are known."""
    return hasattr(module, "programs") or hasattr(module.Config, "trains")


def compiled(case: Case) -> dict[str, Any]:
    """Compiles a case.

    Returns:
        CPU seconds of the compiler, tracing included, and the bytes of the device that the program takes: what goes in
        and comes out, temporaries and the program itself.
    """
    import jax

    from experiments.studies import Run, read_study

    study = read_study(case.study, "gpu")
    run = Run.of(study, case.configuration, study.seeds[0], {})
    function, arguments = programs(study.module, run.config)[case.program]()
    here = ahead_of_time.chip(case.platform)
    # A third of the time, and nearly the same memory: 1.5 % more of a language model.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(lambda *x: x, *arguments)
    )
    start = time.process_time()
    memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
    seconds = round(time.process_time() - start, 1)
    assert memory is not None
    parts = [f"{part}_size_in_bytes" for part in ("argument", "output", "temp", "generated_code")]
    taken = sum(getattr(memory, part) for part in parts) - memory.alias_size_in_bytes
    return {"compiler_seconds": seconds, "bytes": taken}


if __name__ == "__main__":
    ahead_of_time.main(Case, compiled)
