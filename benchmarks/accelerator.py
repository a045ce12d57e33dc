"""Times and memory on a machine with a GPU or TPU: ``python -m benchmarks accelerator``.

Exact attention in every implementation, `jax.nn.dot_product_attention` and all registered methods, in bfloat16. The
cases are ordered by importance, and each row is written as soon as it is measured. If a run is stopped, or its budget
is used up, the next run continues it.
"""

import dataclasses
import functools
import inspect
import json
import math
import pathlib
import re
import statistics
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

from approx_attention import METHODS, attention, exact
from approx_attention.evaluation import Timing, environment
from benchmarks import report
from benchmarks.compiled import ROOT, TOO_SLOW, digest_of
from benchmarks.exact import HEAD_DIM, NUM_HEADS, inputs, with_gradient
from benchmarks.files import REPORT, RESULTS, write_document, write_text
from benchmarks.scaling import (
    DECODED,
    SIZE,
    cache_at,
    decoder_of,
    decoder_steps,
    decodes,
    empty_cache,
    exact_buffers,
    exact_decoder,
    exact_steps,
    form_of,
    over_heads,
    size_of,
)

# Three lengths come first, because they show the growth; then those between them, then the long ones.
FIRST, BETWEEN, LONG = (2048, 8192, 32768), (4096, 16384), (65536, 131072)
LENGTHS = sorted(FIRST + BETWEEN + LONG)
MAIN_METHODS = ("local", "favor", "mean_pool", "eva", "linformer", "polynomial")
TINY_LENGTHS, TINY_METHODS, TINY_ROUNDS = (64, 128), ("mean_value", "mean_pool"), 2
DTYPE = jnp.bfloat16

# Implementations that store all logits are left out if the logits take more bytes than this.
LARGEST_LOGITS = 2**32
HOLD_LOGITS = ("exact dense", "exact jax.nn xla")
# A longer sequence is skipped if the last one took longer: seconds of a call, and of a case with its compilation.
LONGEST_CALL, LONGEST_CASE = 1.0, 60.0
# Number of timed calls of each case, and the seconds after which timing stops.
ROUNDS, PATIENCE = 10, 1.0
# Calls shorter than this run in groups without a synchronisation: seconds of a group, and its largest number of calls.
SHORT_CALL, TOGETHER, MOST_TOGETHER = 1e-3, 5e-3, 50
# The number of tokens in a cache of bounded size before it is timed.
PREFILLED = 512


class Kind(NamedTuple):
    """The kind of a case: causal or not, with the gradient or not, or decoding."""

    is_causal: bool = True
    backward: bool = False
    decode: bool = False


CAUSAL, CAUSAL_GRADIENT, DECODE = Kind(), Kind(backward=True), Kind(decode=True)
FULL, FULL_GRADIENT = Kind(is_causal=False), Kind(is_causal=False, backward=True)
# From the most to the least important: kinds of cases, with methods and lengths.
STAGES: Sequence[tuple[Kind, str, Sequence[int]]] = (
    (CAUSAL, "main", FIRST),
    (CAUSAL, "main", BETWEEN),
    (CAUSAL_GRADIENT, "main", FIRST),
    (FULL, "main", FIRST),
    (DECODE, "main", FIRST),
    (CAUSAL, "main", LONG),
    (CAUSAL_GRADIENT, "main", BETWEEN),
    (CAUSAL_GRADIENT, "main", LONG),
    (CAUSAL, "others", FIRST),
    (DECODE, "main", BETWEEN + LONG),
    (DECODE, "others", FIRST),
    (FULL, "main", BETWEEN + LONG),
    (FULL, "others", FIRST),
    (CAUSAL_GRADIENT, "others", FIRST),
    (FULL_GRADIENT, "main", FIRST),
    (CAUSAL, "others", BETWEEN + LONG),
    (CAUSAL_GRADIENT, "others", BETWEEN + LONG),
    (FULL, "others", BETWEEN + LONG),
    (DECODE, "others", BETWEEN + LONG),
    (FULL_GRADIENT, "main", BETWEEN + LONG),
    (FULL_GRADIENT, "others", FIRST + BETWEEN + LONG),
)
TINY_STAGES = (
    (CAUSAL, "main", TINY_LENGTHS),
    *((kind, "main", TINY_LENGTHS[:1]) for kind in (CAUSAL_GRADIENT, DECODE, FULL)),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A timed program.

    Attributes:
        arm: a method, or an implementation of exact attention, whose name begins with ``exact``.
        length: tokens of the sequence.
        is_causal: whether queries see earlier keys alone.
        backward: the gradient, with the forward pass.
        decode: decodes single tokens after ``length`` others, instead of a sequence.
    """

    arm: str
    length: int
    is_causal: bool = True
    backward: bool = False
    decode: bool = False

    def __str__(self) -> str:
        words = [self.arm, f"n={self.length}", "causal" if self.is_causal else "bidirectional"]
        return " ".join(words + ["with gradient"] * self.backward + ["decoding"] * self.decode)

    @property
    def kind(self) -> Kind:
        """The kind of the case."""
        return Kind(self.is_causal, self.backward, self.decode)


class Program(NamedTuple):
    """A compiled call, the temporary bytes of its program, and the bytes of its cache where it decodes."""

    call: Callable[[], Any]
    temp_bytes: int | None
    cache_bytes: int | None = None


def exact_forms(is_causal: bool) -> dict[str, Callable[..., Array]]:
    """Exact attention by the name of its implementation: the library's default, its options, and those of JAX."""
    forms: dict[str, Callable[..., Array]] = {
        "exact": functools.partial(attention, method="exact", is_causal=is_causal)
    }
    choices, _ = typing.get_args(inspect.signature(exact).parameters["implementation"].annotation)
    for name in typing.get_args(choices):
        forms[f"exact {name}"] = functools.partial(forms["exact"], implementation=name)
    for name in ("xla", "cudnn"):
        forms[f"exact jax.nn {name}"] = functools.partial(
            jax.nn.dot_product_attention, is_causal=is_causal, implementation=name
        )
    return forms


def cases(*, tiny: bool = False) -> list[Case]:
    """All cases, the most important first; or a few short ones if ``tiny``."""
    main = TINY_METHODS if tiny else MAIN_METHODS
    groups = {"main": main, "others": [name for name in METHODS if name not in ("exact", *main)]}
    return [
        Case(arm, length, *kind)
        for kind, group, lengths in (TINY_STAGES if tiny else STAGES)
        for length in lengths
        for arm in _arms(kind, length, groups[group], with_exact=group == "main")
    ]


def _arms(kind: Kind, length: int, methods: Sequence[str], *, with_exact: bool) -> Iterator[str]:
    if with_exact:
        yield from (
            _exact_caches(0)
            if kind.decode
            else (
                name
                for name in exact_forms(kind.is_causal)
                if name not in HOLD_LOGITS or 4 * NUM_HEADS * length**2 <= LARGEST_LOGITS
            )
        )
    for name in methods:
        method = METHODS[name]
        if name in TOO_SLOW.get(jax.default_backend(), ()):
            continue
        if decodes(name, method) if kind.decode else method.capabilities.causal or not kind.is_causal:
            yield name


def program_of(case: Case) -> Program:
    """Compile a case."""
    if case.decode:
        return _decoding(case)
    form = exact_forms(case.is_causal)[case.arm] if case.arm.startswith("exact") else form_of(case.arm, case.is_causal)
    arguments = _inputs(case.length) if case.backward else _inputs(case.length)[:3]
    compiled = jax.jit(with_gradient(form) if case.backward else form).lower(*arguments).compile()
    return Program(functools.partial(compiled, *arguments), _temp_bytes(compiled))


@functools.lru_cache(maxsize=1)
def _inputs(length: int) -> tuple[Array, ...]:
    return inputs(length, DTYPE)


def _temp_bytes(compiled: Any) -> int | None:
    memory = compiled.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def _decoding(case: Case) -> Program:
    """Decoding of a block of tokens one by one."""
    tokens = tuple(x[0, :DECODED] for x in _inputs(DECODED)[:3])
    if case.arm.startswith("exact"):
        steps, cache = _exact_caches(case.length)[case.arm]()
        compiled = jax.jit(steps).lower(cache, jnp.int32(case.length), *tokens).compile()
    else:
        compiled, cache = _bounded(case.arm, min(case.length, PREFILLED))
    call = functools.partial(compiled, cache, jnp.int32(case.length), *tokens)
    return Program(call, _temp_bytes(compiled), sum(x.nbytes for x in jax.tree.leaves(cache)))


def _exact_caches(length: int) -> dict[str, Callable[[], tuple[Callable[..., Array], Any]]]:
    """Decoding with all tokens: for each name a function that makes the steps and the cache."""

    def buffer(read: Callable[..., Array] | None = None) -> tuple[Callable[..., Array], Any]:
        return functools.partial(exact_steps, read=read), exact_buffers(length, DTYPE)

    def decoder() -> tuple[Callable[..., Array], Any]:
        whole = exact_decoder(length)
        return functools.partial(_steps_at, whole), empty_cache(whole)

    return {
        "exact buffer": buffer,
        "exact jax.nn xla": functools.partial(buffer, functools.partial(_read_by_jax, "xla")),
        "exact jax.nn cudnn": functools.partial(buffer, functools.partial(_read_by_jax, "cudnn")),
        "exact decoder": decoder,
    }


def _read_by_jax(implementation: Any, q: Array, k: Array, v: Array, at: Array) -> Array:
    """The output of one query of each head, ``[N, D]``, from buffers that are filled up to a position."""
    out = jax.nn.dot_product_attention(
        q[None, None], k[None], v[None], key_value_seq_lengths=(at + 1)[None], implementation=implementation
    )
    return out[0, 0]


def _steps_at(decoder: Any, cache: Any, length: Array, *tokens: Array) -> Array:
    return decoder_steps(decoder, cache_at(cache, length), *tokens)


@functools.cache
def _bounded(method: str, prefilled: int) -> tuple[Any, Any]:
    """Decoding with a cache of bounded size: one program for all lengths, and the cache after the first tokens."""
    decoder = decoder_of(method, METHODS[method])
    query, key, value = (x[0, :prefilled] for x in _inputs(max(prefilled, DECODED))[:3])
    _, cache = jax.jit(over_heads(decoder.prefill))(empty_cache(decoder), query, key, value)
    tokens = (x[0, :DECODED] for x in _inputs(DECODED)[:3])
    steps = jax.jit(functools.partial(_steps_at, decoder))
    return steps.lower(cache, jnp.int32(prefilled), *tokens).compile(), cache


def timed(call: Callable[[], Any], rounds: int) -> Timing:
    """Time a compiled call; short calls run in groups without a synchronisation."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
    together = 1 if once >= SHORT_CALL else min(MOST_TOGETHER, math.ceil(TOGETHER / max(once, 1e-9)))
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < rounds and (not seconds or time.perf_counter() - begun < PATIENCE):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(together)])
        seconds.append((time.perf_counter() - start) / together)
    return Timing(min(seconds), statistics.median(seconds))


def measured(case: Case, rounds: int = ROUNDS) -> dict[str, Any]:
    """The figures of a case, or its error."""
    begun, peak = time.perf_counter(), _memory("peak_bytes_in_use")
    try:
        program = program_of(case)
        compiled = time.perf_counter()
        timing = timed(program.call, rounds)
    except Exception as error:  # a failed case is a result
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"error": text, "case_seconds": time.perf_counter() - begun}
    tokens = DECODED if case.decode else 1
    raised = _memory("peak_bytes_in_use")
    return {
        "seconds": timing.median / tokens,
        "least_seconds": timing.least / tokens,
        "compile_seconds": compiled - begun,
        "case_seconds": time.perf_counter() - begun,
        "temp_bytes": program.temp_bytes,
        "cache_bytes": program.cache_bytes,
        # The device reports the peak of the process, which belongs to this case only if the case raised it.
        "peak_bytes": raised if raised != peak else None,
    }


def _memory(name: str) -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get(name)


def device_works() -> bool:
    """Whether the device still computes: after a kernel crashes, the process may not be able to use it."""
    try:
        return float(jnp.ones(8).sum()) == 8
    except Exception:  # any error means no
        return False


def is_hopeless(case: Case, rows: Mapping[Case, Mapping[str, Any]]) -> bool:
    """Whether the same case failed, or took too long, at the longest shorter length."""
    shorter = [x for x in rows if (x.arm, x.kind) == (case.arm, case.kind) and x.length < case.length]
    if not shorter:
        return False
    row = rows[max(shorter, key=lambda x: x.length)]
    if "error" in row or row["case_seconds"] > LONGEST_CASE:
        return True
    return row["seconds"] * (DECODED if case.decode else 1) > LONGEST_CALL


def measure(
    asked: Sequence[Case],
    known: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
    *,
    budget: float,
    rounds: int = ROUNDS,
    again: bool = False,
) -> dict[str, Any]:
    """Measure cases in order and write the document after each.

    Args:
        asked: the cases.
        known: an earlier document of this machine, or empty. Its rows of the same code, versions and chip are kept and
            not measured again; the others are left out, because times of different programs are not compared.
        write: writes the document so far.
        budget: seconds after which no new case starts.
        rounds: the number of timed calls of a case.
        again: measures all cases again.

    Returns:
        The document.

    Raises:
        RuntimeError: the device no longer works after a case; the row of the case is written.
    """
    begun, console, here = time.perf_counter(), Console(), environment()
    versions = {name: here[name] for name in ("jax", "jaxlib", "device")}
    versions["platform"] = jax.devices()[0].client.platform_version
    code = digest_of(ROOT, versions)
    rows: dict[Case, dict[str, Any]] = {}
    if known.get("code") == code and not again:
        earlier = {_case_of(row): row for row in known["rows"]}
        rows = {case: earlier[case] for case in asked if case in earlier}
    not_begun = 0

    def document() -> dict[str, Any]:
        return {
            "chip": here["device"],
            "num_heads": NUM_HEADS,
            "head_dim": HEAD_DIM,
            "dtype": jnp.dtype(DTYPE).name,
            "size": SIZE,
            "sizes": {name: size_of(name, method) for name, method in METHODS.items()},
            "rounds": rounds,
            "decoded": DECODED,
            "code": code,
            "environment": here | versions,
            "device_bytes": _memory("bytes_limit"),
            "not_begun": not_begun,
            "rows": [rows[case] for case in asked if case in rows],
        }

    for case in asked:
        if case in rows or is_hopeless(case, rows):
            continue
        if time.perf_counter() - begun >= budget:
            not_begun += 1
            continue
        rows[case] = dataclasses.asdict(case) | measured(case, rounds)
        write(document())
        row = rows[case]
        if "error" in row and not device_works():
            raise RuntimeError(f"the device does not work any more after {case}: {row['error']}; rerun to continue")
        shown = row.get("error") or f"{row['seconds'] * 1e3:.4g} ms, compiled in {row['compile_seconds']:.1f} s"
        spent = time.perf_counter() - begun
        console.print(f"{spent:4.0f} s  {case}: {shown}", highlight=False, soft_wrap=True, markup=False)
    write(document())
    return document()


def _case_of(row: Mapping[str, Any]) -> Case:
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


def path_of(chip: str) -> pathlib.Path:
    """The file of a chip's results."""
    return RESULTS / f"accelerator-{re.sub(r'[^a-z0-9]+', '-', chip.lower()).strip('-')}.json"


@click.command()
@click.option("--budget", type=click.FloatRange(min=0), default=540, show_default=True, help="Seconds for all cases.")
@click.option("--again", is_flag=True, help="Measure again what was measured with the same code.")
@click.option("--tiny", is_flag=True, help="A few short sequences on any machine, to check this command.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    help="The output file.  [default: benchmarks/results/accelerator-CHIP.json]",
)
def main(budget: float, again: bool, tiny: bool, output: pathlib.Path | None) -> None:
    """Exact attention and every method on a GPU or TPU, as the sequence grows; rerun it to continue."""
    if tiny and output is None:
        raise click.UsageError("--tiny needs --output: its figures are no results")
    if not tiny and jax.default_backend() == "cpu":
        raise click.ClickException("no GPU or TPU was found, so nothing was measured; --tiny runs anywhere")
    path = output or path_of(jax.devices()[0].device_kind)
    known = json.loads(path.read_text()) if path.exists() else {}
    try:
        document = measure(
            cases(tiny=tiny),
            known,
            functools.partial(write_document, path),
            budget=budget,
            rounds=TINY_ROUNDS if tiny else ROUNDS,
            again=again,
        )
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {path}: {len(document['rows'])} cases, {document['not_begun']} not begun within {budget:.0f} s")
    if output is None:
        write_text(REPORT, report.render(RESULTS))
        click.echo(f"wrote {REPORT}")


if __name__ == "__main__":
    main()
