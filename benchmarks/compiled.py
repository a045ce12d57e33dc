"""Programs compiled for accelerators on a machine without one: memory, size and operations in sequence; no times.

The platform's compiler is libtpu, or the CUDA plug-in of jax: `make aot` installs each in a separate environment.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from approx_attention import METHODS
from approx_attention.evaluation import environment
from benchmarks.ahead_of_time import CHIPS, Case, Platform
from benchmarks.exact import HEAD_DIM, NUM_HEADS
from benchmarks.scaling import SIZE, size_of

ROOT = pathlib.Path(__file__).parent.parent
COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin"}

# Methods whose causal forms should be a few large operations at every length.
IN_PARALLEL = ("favor", "eva", "mean_pool", "linformer", "rfa", "cosformer", "polynomial", "uniform_sample", "coreset")
# The methods among them whose summaries of all prefixes take the most memory.
LARGEST = ("favor", "eva", "mean_pool")
LENGTHS = (32768, 131072)
# The length for all methods: whether a method compiles does not depend on it.
SHORT = 2048
# Not compiled for a TPU: the compiler takes longer for a singular value decomposition than for all other cases.
TOO_SLOW = {"tpu": ("svd",), "gpu": ()}

# Requirements for causal forms on an H200: sequential operations, forward and with gradient, at 32,768 tokens.
MOST_OPERATIONS: dict[str, int] = dict.fromkeys(IN_PARALLEL[:6], 150)
MOST_OPERATIONS |= {"polynomial": 300, "uniform_sample": 500, "coreset": 5000}
MOST_OPERATIONS_BACKWARD: dict[str, int] = dict.fromkeys(IN_PARALLEL[:7], 300)
# Temporaries of the causal forms, in multiples of q, k and v: forward, and with gradient.
MOST_MEMORY, MOST_MEMORY_BACKWARD = 4, 8
# Temporaries of blocked exact attention over 8 sequences of 32 heads.
MOST_EXACT_BYTES = 2 * 2**30
# Causal exact attention for a TPU: limits at the first length, and the growth at the second.
MOST_COMPILER_SECONDS, MOST_PROGRAM_BYTES, MOST_GROWTH = 12, 2 * 2**20, 0.2


def cases(platform: Platform) -> Iterator[Case]:
    """The programs of a platform: those with requirements, then every method once."""
    yield from _of_tpu(platform) if platform == "tpu" else _of_gpu(platform)
    for method, known in METHODS.items():
        if method not in TOO_SLOW[platform]:
            for backward in (False, True):
                is_causal = known.capabilities.causal
                yield _of(platform, method, SHORT, is_causal=is_causal, backward=backward, least_effort=True)


def _of_tpu(platform: Platform) -> Iterator[Case]:
    for backend in ("cpu", "tpu"):
        for length in LENGTHS:
            for backward in (False, True):
                yield Case(platform, "exact", length, is_causal=True, backward=backward, backend=backend)


def _of_gpu(platform: Platform) -> Iterator[Case]:
    for backend in ("cpu", "gpu"):
        many = {"batch": 8, "num_heads": 32, "options": {"implementation": "blocked"}}
        yield Case(platform, "exact", LENGTHS[0], **many, backend=backend)
    for method in IN_PARALLEL:
        for length in LENGTHS if method in LARGEST else LENGTHS[:1]:
            for backward in (False, True):
                yield _of(platform, method, length, is_causal=True, backward=backward)
    for method in LARGEST:
        for backward in (False, True):
            yield _of(platform, method, LENGTHS[0], is_causal=True, backward=backward, backend="gpu")


def _of(platform: Platform, method: str, length: int, **chosen: Any) -> Case:
    """A case of a method at its usual size."""
    size = METHODS[method].size
    options = {} if size is None else {size: size_of(method, METHODS[method])}
    return Case(platform, method, length, num_heads=NUM_HEADS, head_dim=HEAD_DIM, options=options, **chosen)


def measure(
    platform: Platform,
    python: pathlib.Path,
    library: pathlib.Path,
    known: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
    *,
    methods: Sequence[str] = (),
    limit: float = 900.0,
    again: bool = False,
) -> None:
    """Compile the cases of a platform; see `compile_each`.

    Args:
        platform: the platform to compile for.
        python: the interpreter of an environment that has the platform's compiler.
        library: the source tree whose ``approx_attention`` is compiled.
        known: an earlier document of this platform, or empty.
        write: writes the document so far.
        methods: compiles these alone; all if empty.
        limit: seconds after which a case is given up.
        again: compiles the rows of the same code too.
    """
    about = {"platform": platform, "chip": CHIPS[platform], "size": SIZE}

    def is_chosen(case: Case) -> bool:
        return not methods or case.method in methods

    compile_each(cases(platform), about, python, library, known, write, is_chosen=is_chosen, limit=limit, again=again)


def compile_each(
    asked: Iterable[Any],
    about: Mapping[str, Any],
    python: pathlib.Path,
    library: pathlib.Path,
    known: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
    *,
    module: str = "benchmarks.ahead_of_time",
    sources: Sequence[str] = ("approx_attention",),
    packages: Sequence[str] = (),
    is_chosen: Callable[[Any], bool] = lambda case: True,
    limit: float = 900.0,
    again: bool = False,
) -> None:
    """Compile cases, each in a separate process, and write the rows as they come.

    Args:
        asked: the cases, instances of a dataclass.
        about: the head of the document, with its ``platform``.
        python: the interpreter of an environment that has the platform's compiler.
        library: the source tree whose ``approx_attention`` is compiled.
        known: an earlier document of this platform, or empty. Its rows of the same code are not compiled again; rows
            of other code stay until they are replaced, and rows of removed cases are left out.
        write: writes the document so far.
        module: the module that a process runs, with the library and the case as arguments.
        sources: the folders and files of the library that determine how a case is compiled.
        packages: the packages that a case needs in addition to jax.
        is_chosen: compiles only the cases for which it returns True.
        limit: seconds after which a case is given up.
        again: compiles the rows of the same code too.

    Raises:
        RuntimeError: the platform's compiler is not installed there.
    """
    # Accelerators of this machine are not used.
    jax.config.update("jax_platforms", "cpu")
    platform = about["platform"]
    versions = _versions(python, COMPILERS[platform], packages)
    code, console = digest_of(library, versions, sources), Console()
    by_name = {_name(dataclasses.asdict(case)): case for case in asked}
    earlier = {_name(row["case"]): row for row in known.get("rows", [])}
    rows = {name: earlier[name] for name in by_name if name in earlier}

    def document() -> dict[str, Any]:
        return {
            **about,
            "code": code,
            "environment": environment() | versions,
            "rows": [rows[name] for name in by_name if name in rows],
        }

    for name, case in by_name.items():
        if not is_chosen(case):
            continue
        if not again and name in rows and rows[name]["code"] == code:
            continue
        result = _compiled_apart(case, python, library, limit, module)
        rows[name] = {"case": dataclasses.asdict(case), "code": code, **result}
        write(document())
        shown = {key: value for key, value in result.items() if key != "loops"}
        console.print(f"{platform} {case}: {shown}", highlight=False, soft_wrap=True)
    write(document())


def _compiled_apart(
    case: Any, python: pathlib.Path, library: pathlib.Path, limit: float, module: str = "benchmarks.ahead_of_time"
) -> dict[str, Any]:
    """The result of a case from a separate process, or its error."""
    arguments = [str(library), json.dumps(dataclasses.asdict(case))]
    # Flags of this process must not reach the programs.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_", "LIBTPU_"))}
    try:
        done = subprocess.run(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env=inherited,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {limit:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or [""])[-1][:300]
    return {"error": f"the process ended with {done.returncode}: {last}"}


def _name(case: Mapping[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)


def digest_of(
    library: pathlib.Path, versions: Mapping[str, Any], sources: Sequence[str] = ("approx_attention",)
) -> str:
    """A digest of the library's sources and of versions such as that of the compiler, which determine the programs."""
    digest = hashlib.sha256(json.dumps(versions).encode())
    places = [library / source for source in sources]
    for path in sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py"))):
        digest.update(str(path.relative_to(library)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _versions(python: pathlib.Path, compiler: str, packages: Sequence[str] = ()) -> dict[str, str]:
    """The versions of jax, of the compiler and of other packages in the interpreter's environment."""
    packages = ["jax", "jaxlib", compiler, *packages]
    ask = f"import importlib.metadata, json; print(json.dumps([importlib.metadata.version(x) for x in {packages}]))"
    try:
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        needed = " and ".join([compiler, *packages[3:]])
        raise RuntimeError(f"{python} has no {needed}: `make aot` makes environments that have it") from error
    return dict(zip(packages, json.loads(answer), strict=True))
