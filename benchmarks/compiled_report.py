"""The section of RESULTS.md on programs compiled for accelerators: now, before, and their requirements."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from approx_attention.evaluation import markdown_table
from benchmarks.ahead_of_time import CHIPS, Case
from benchmarks.compiled import (
    COMPILERS,
    IN_PARALLEL,
    LARGEST,
    LENGTHS,
    MOST_COMPILER_SECONDS,
    MOST_EXACT_BYTES,
    MOST_GROWTH,
    MOST_MEMORY,
    MOST_MEMORY_BACKWARD,
    MOST_OPERATIONS,
    MOST_OPERATIONS_BACKWARD,
    MOST_PROGRAM_BYTES,
    SHORT,
    TOO_SLOW,
)

Row = Mapping[str, Any]
# By platform: the current and the previous measurements.
States = Mapping[str, Mapping[str, list[Row]]]

STATES = ("before", "now")
GIB, MIB = 2**30, 2**20


def section(documents: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """The parts of the section, from the documents that exist.

    Args:
        documents: by the stem of the file: ``compiled_gpu``, ``compiled_gpu_before``, and the same for ``tpu``.
    """
    states: States = {
        platform: {state: documents.get(_stem(platform, state), {}).get("rows", []) for state in STATES}
        for platform in CHIPS
    }
    yield "## Programs for accelerators, compiled without one"
    yield (
        "Compiled ahead of time on a machine that has no accelerator, by `make aot`: "
        f"{' and '.join(f'{chip} with {_compiler(platform, documents)}' for platform, chip in CHIPS.items())}. "
        "`attention` over 8 heads of 64 channels in bfloat16, one sequence unless said, sizes as in the section on "
        "growth, lowered in a process on a CPU. *Before* is the library before its causal forms were made for "
        "accelerators."
    )
    yield (
        "What such figures say: that a program compiles, its temporary memory, its size, and how many operations run "
        "one after the other when each loop runs all its trips. What they do not say is a time: an operation of a "
        "microsecond and one of a second count alike, and nothing here has run. Many operations in sequence bound the "
        "time from below, as each is about one kernel launch on a GPU. A count with >= has a loop whose trips the "
        "program does not state; its body counts once. CPU seconds of the compiler are those of a shared machine."
    )
    if stale := sum(row["code"] != document["code"] for document in documents.values() for row in document["rows"]):
        yield f"{stale} of these rows are of earlier code than the rest: rerun `make aot`."
    yield f"### Causal forms for an {CHIPS['gpu']}: operations in sequence at n = {LENGTHS[0]}"
    yield _operations(states)
    yield f"### Causal forms for an {CHIPS['gpu']}: temporary memory"
    yield (
        "MiB, and in brackets in multiples of q, k and v. Before, heads took turns in a program that was traced in a "
        "process on a CPU, and a process on a GPU traced another one; now both must trace the same."
    )
    yield _memory(states)
    yield "### Exact attention"
    yield from _exact(states)
    yield f"### Every method: does it compile, n = {SHORT}, least effort of the compiler"
    yield from _every_method(states)


def _stem(platform: str, state: str) -> str:
    return f"compiled_{platform}" + ("_before" if state == "before" else "")


def _compiler(platform: str, documents: Mapping[str, Mapping[str, Any]]) -> str:
    names = [_stem(platform, state) for state in reversed(STATES)]
    known = next((documents[name]["environment"] for name in names if name in documents), {})
    return f"{COMPILERS[platform]} {known.get(COMPILERS[platform], '')}".strip()


def _row(rows: Iterable[Row], **asked: Any) -> Row | None:
    """The row of a counted case with these values; other fields have their defaults."""
    asked = {"batch": Case.batch, "num_heads": Case.num_heads, "backend": Case.backend, "least_effort": False} | asked
    return next((row for row in rows if all(row["case"][name] == value for name, value in asked.items())), None)


def _operations(states: States) -> str:
    table = []
    for method in IN_PARALLEL:
        cells = [f"`{method}`"]
        for backward, most in ((False, MOST_OPERATIONS), (True, MOST_OPERATIONS_BACKWARD)):
            rows = (
                _row(states["gpu"][state], method=method, length=LENGTHS[0], is_causal=True, backward=backward)
                for state in STATES
            )
            cells += [_count(row) for row in rows] + [f"<= {most[method]}" if method in most else ""]
        table.append(cells)
    return markdown_table(["", *_both_passes("before", "now", "asked")], table)


def _memory(states: States) -> str:
    table = []
    for method in LARGEST:
        for length, backend in ((LENGTHS[0], "cpu"), (LENGTHS[0], "gpu"), (LENGTHS[1], "cpu")):
            cells = [f"`{method}`", str(length), backend]
            for backward, most in ((False, MOST_MEMORY), (True, MOST_MEMORY_BACKWARD)):
                for state in STATES:
                    asked = {"method": method, "length": length, "backward": backward, "backend": backend}
                    cells.append(_multiple(_row(states["gpu"][state], is_causal=True, **asked)))
                cells.append(f"<= {most}x")
            table.append(cells)
    return markdown_table(["", "n", "process on", *_both_passes("before", "now", "asked")], table)


def _both_passes(*names: str) -> list[str]:
    return [f"{passes}, {name}" for passes in ("forward", "with gradient") for name in names]


def _exact(states: States) -> Iterable[str]:
    growth = f"+{100 * MOST_GROWTH:.0f} % at most"
    limits = [(f"<= {MOST_COMPILER_SECONDS}", f"<= {MOST_PROGRAM_BYTES / MIB:.0f}"), (growth, growth)]
    table = []
    for backward, backend in itertools.product((False, True), ("cpu", "tpu")):
        for length, (most_seconds, most_size) in zip(LENGTHS, limits, strict=True):
            asked = {"method": "exact", "length": length, "is_causal": True, "backward": backward, "backend": backend}
            rows = [_row(states["tpu"][state], **asked) for state in STATES]
            cells = ["with gradient" if backward else "forward", str(length), backend]
            cells += [*(_cell(row, "compiler_seconds", 1, ".0f") for row in rows), most_seconds]
            table.append([*cells, *(_cell(row, "program_bytes", MIB, ".2f") for row in rows), most_size])
    yield f"Causal, for a {CHIPS['tpu']}: CPU seconds of the compiler, and MiB of the program."
    header = [f"{what}, {name}" for what in ("seconds", "MiB") for name in (*STATES, "asked")]
    yield markdown_table(["", "n", "process on", *header], table)
    yield f"`blocked`, for an {CHIPS['gpu']}, 8 sequences of 32 heads, n = {LENGTHS[0]}: GiB of temporaries."
    table = []
    for backend in ("cpu", "gpu"):
        asked = {"method": "exact", "length": LENGTHS[0], "batch": 8, "num_heads": 32, "backend": backend}
        rows = [_row(states["gpu"][state], **asked) for state in STATES]
        cells = [backend, *(_cell(row, "temp_bytes", GIB, ".1f") for row in rows)]
        table.append([*cells, f"<= {MOST_EXACT_BYTES / GIB:.0f}"])
    yield markdown_table(["process on", *STATES, "asked"], table)


def _every_method(states: States) -> Iterable[str]:
    found: dict[tuple[str, str, bool, str], str] = {}
    methods: dict[str, bool] = {}
    errors = []
    for platform, by_state in states.items():
        for state, rows in by_state.items():
            for row in rows:
                case = row["case"]
                if not case["least_effort"]:
                    continue
                methods[case["method"]] = case["is_causal"]
                found[platform, case["method"], case["backward"], state] = "error" if "error" in row else "ok"
                if "error" in row:
                    passes = "with gradient" if case["backward"] else "forward"
                    errors.append(f"- `{case['method']}`, {CHIPS[platform]}, {passes}, {state}: {row['error']}")
    left_out = [f"`{name}` for a {CHIPS[platform]}" for platform, names in TOO_SLOW.items() for name in names]
    yield (
        f"The causal form where there is one. Left out as too slow to compile: {', '.join(left_out)}, whose singular "
        "value decomposition is a long program there. Each cell: before, now."
    )
    table = []
    for method, is_causal in methods.items():
        cells = [f"`{method}`", "causal" if is_causal else ""]
        for platform in states:
            for backward in (False, True):
                answers = [found.get((platform, method, backward, state), "-") for state in STATES]
                cells.append("left out" if method in TOO_SLOW[platform] else ", ".join(answers))
        table.append(cells)
    header = [f"{chip}, {passes}" for chip in CHIPS.values() for passes in ("forward", "with gradient")]
    yield markdown_table(["", "", *header], table)
    if errors:
        yield "\n".join(errors)


def _count(row: Row | None) -> str:
    if row is None or "error" in row:
        return "" if row is None else "error"
    unknown = any(loop["trips"] is None for loop in row["loops"])
    return f"{'>= ' if unknown else ''}{row['operations']}"


def _multiple(row: Row | None) -> str:
    """MiB of temporaries, and their multiple of q, k and v."""
    text = _cell(row, "temp_bytes", MIB, ".0f")
    return text if row is None or "error" in row else f"{text} ({row['temp_bytes'] / row['input_bytes']:.1f}x)"


def _cell(row: Row | None, name: str, unit: float, form: str) -> str:
    if row is None or "error" in row:
        return "" if row is None else "error"
    return "" if row[name] is None else f"{row[name] / unit:{form}}"
