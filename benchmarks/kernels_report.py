"""The section of RESULTS.md on the fused kernels, compiled for accelerators: requirements and results."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from approx_attention.evaluation import markdown_table
from benchmarks.ahead_of_time import Platform
from benchmarks.compiled import COMPILERS
from benchmarks.kernel_dumps import per_1024_logits
from benchmarks.kernels import (
    BACKWARD_TILES,
    CHIPS,
    FORWARD_TILES,
    HEAD_DIMS,
    LENGTHS,
    MOST_BUNDLES,
    MOST_BUNDLES_BACKWARD,
    MOST_SHARED,
    MOST_VMEM,
    cases,
)

Row = Mapping[str, Any]

KIB, MIB = 2**10, 2**20
KERNELS = ("forward", "d_queries", "d_keys")
# Products of a tile in each kernel. At full rate the matrix units of a v5e, four of 128 x 128, take two cycles for a
# product of 1024 logits, as long for 64 channels as for 128.
PRODUCTS = {"forward": 2, "d_queries": 3, "d_keys": 4}
CYCLES_OF_PRODUCT = 2

CHOICE = (
    "Backward, only 1024 x 1024 in strips of 512 has fewer bundles than the default at d = 128, and half the steps, "
    "but at d = 256 in bfloat16 it takes 15.9 of 16 MiB of VMEM, and the default 11.6. Forward, tiles of 512 rows have "
    "fewer bundles than the default, but twice the reads of keys and values: 512 operations for a "
    "byte, less than keeps a v6e busy (560, by 918 TFLOP/s and 1.64 TB/s)."
)


def section(documents: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """The parts of the section, from the documents that exist.

    Args:
        documents: by platform, ``gpu`` and ``tpu``.
    """
    yield "## The fused kernels, compiled without an accelerator"
    names = {platform: f"{COMPILERS[platform]} {_version(documents, platform)}".strip() for platform in CHIPS}
    yield (
        "Compiled ahead of time by `make aot`: `kernels.state` with the fused kernel, 8 heads by `jax.vmap`, forward "
        "and with gradient (cotangents of outputs and normalisers), for a TPU v5e and v6e with "
        f"{names['tpu']}, and for an H200 (sm_90a) with {names['gpu']}. Nothing here ran on a device, and no figure "
        "is a time."
    )
    if stale := sum(row["code"] != document["code"] for document in documents.values() for row in document["rows"]):
        yield f"{stale} of these rows are of earlier code than the rest: rerun `make aot`."
    for platform, document in documents.items():
        yield from (_tpu if platform == "tpu" else _gpu)(document["rows"])


def _version(documents: Mapping[str, Mapping[str, Any]], platform: Platform) -> str:
    return documents.get(platform, {}).get("environment", {}).get(COMPILERS[platform], "")


def _tpu(rows: Sequence[Row]) -> Iterable[str]:
    yield "### TPU: the schedule of a tile"
    bound = ", ".join(f"{CYCLES_OF_PRODUCT * count} (`{name}`)" for name, count in PRODUCTS.items())
    yield (
        f"Bundles for each 1024 logits of a tile without a mask, in the compiler's schedule, n = {LENGTHS[0]}. A "
        "bundle is issued in one cycle at best, and waits where a unit is busy. At full rate, the products in bfloat16 "
        f"take the matrix units of a v5e {bound} cycles, for 64 channels as for 128: a tile takes at least the greater "
        "of both figures. *Others* are the bundles outside the tile that a step of the grid may run, in each kernel; a "
        "smaller tile has more steps. *Spills* are MiB of VMEM for what left the registers. Asked on a v5e at d = 128 "
        f"in bfloat16: at most {MOST_BUNDLES} forward, and at most {MOST_BUNDLES_BACKWARD} in both kernels of the "
        "gradient together."
    )
    yield _schedules(rows)
    yield from _answer(rows)
    yield "### TPU: the default tiles at every length"
    yield (
        "Each cell: CPU seconds of the compiler (on a shared machine), MiB of temporaries in HBM, and the most MiB of "
        f"VMEM that one of the kernels takes (asked: at most {MOST_VMEM // MIB}). With gradient, the forward kernel "
        f"is part of the program. At n = {LENGTHS[0]} what is between the kernels fits VMEM, and HBM holds none of it."
    )
    yield _lengths(rows, "tpu", lambda row: f"{_most(row, 'vmem_bytes') / MIB:.1f}")
    yield "### TPU: the search for tiles"
    yield (
        "Bundles for 1024 logits on a v5e, without a mask, bfloat16, and MiB of VMEM at d = 128. A tile is rows x "
        "columns, in strips of columns; the first row is the default."
    )
    yield _search(rows, FORWARD_TILES, backward=False)
    yield _search(rows, BACKWARD_TILES, backward=True)
    yield CHOICE
    yield from _errors(rows)


def _answer(rows: Sequence[Row]) -> Iterable[str]:
    """The requirements and results of the schedule."""
    row = _row(rows, chip="v5e", head_dim=128, is_causal=False, backward=True)
    if row is None or "error" in row:
        return
    forward, *others = (_bundles(row, name) for name in KERNELS)
    needed = CYCLES_OF_PRODUCT * (PRODUCTS["d_queries"] + PRODUCTS["d_keys"])
    yield (
        f"Result: {forward:.2f} forward ({_verdict(forward <= MOST_BUNDLES)}) and {sum(others):.2f} for the gradient "
        f"({_verdict(sum(others) <= MOST_BUNDLES_BACKWARD)}). The products of the gradient alone take the matrix units "
        f"{needed} cycles: {MOST_BUNDLES_BACKWARD} bundles bound the instructions, not the time."
    )


def _verdict(holds: bool) -> str:
    return "as asked" if holds else "more than asked"


def _schedules(rows: Sequence[Row]) -> str:
    table = []
    for chip, dtype, head_dim in itertools.product(CHIPS["tpu"], ("bfloat16", "float32"), HEAD_DIMS):
        row = _row(rows, chip=chip, dtype=dtype, head_dim=head_dim, is_causal=False, backward=True)
        cells = [chip, dtype, str(head_dim)]
        if row is None or "error" in row:
            table.append(cells + [_state(row)] + 5 * [""])
            continue
        counts = [_bundles(row, name) for name in KERNELS]
        cells += [*(f"{x:.2f}" for x in counts), f"{sum(counts[1:]):.2f}"]
        figures = [row["kernels"][name] for name in KERNELS]
        cells.append(", ".join(str(x["step_bundles"]) for x in figures))
        table.append([*cells, ", ".join(f"{x['spill_bytes'] / MIB:.1f}" for x in figures)])
    return markdown_table(["chip", "dtype", "d", *KERNELS, "gradient together", "others", "spills"], table)


def _lengths(rows: Sequence[Row], platform: Platform, last: Callable[[Row], str]) -> str:
    """Cells of the programs with default tiles: seconds, temporaries, and one more figure."""
    asked = [case for case in cases(platform) if case.tiles is None and not case.backward]
    table = []
    for case in asked:
        chosen = {"chip": case.chip, "head_dim": case.head_dim, "dtype": case.dtype, "is_causal": case.is_causal}
        cells = [case.chip, case.dtype, str(case.head_dim), "causal" if case.is_causal else "full", str(case.length)]
        for backward in (False, True):
            row = _row(rows, length=case.length, backward=backward, **chosen)
            if row is None or "error" in row:
                cells.append(_state(row))
            else:
                cells.append(f"{row['compiler_seconds']:.1f}, {row['temp_bytes'] / MIB:.0f}, {last(row)}")
        table.append(cells)
    return markdown_table(["chip", "dtype", "d", "keys", "n", "forward", "with gradient"], table)


def _search(rows: Sequence[Row], tiles: Sequence[tuple[int, int, int]], *, backward: bool) -> str:
    kernels = KERNELS[1:] if backward else KERNELS[:1]
    table = []
    for tile in tiles:
        chosen = [FORWARD_TILES[0], tile] if backward else [tile, BACKWARD_TILES[0]]
        cells = [f"{tile[0]} x {tile[1]}, {tile[2]}"]
        row = None
        for head_dim in HEAD_DIMS:
            row = _row(rows, head_dim=head_dim, backward=backward, is_causal=False, tiles=chosen)
            if row is None or "error" in row:
                cells += [_state(row)] + [""] * backward * 2
                continue
            counts = [_bundles(row, name) for name in kernels]
            cells += [f"{x:.2f}" for x in (*counts, *[sum(counts)] * backward)]
        cells.append("" if row is None or "error" in row else f"{_most(row, 'vmem_bytes', kernels) / MIB:.1f}")
        table.append(cells)
    names = [*kernels, "together"] if backward else ["forward"]
    passes = "gradient" if backward else "forward"
    return markdown_table([f"{passes}, tile", *(f"{x}, d = {d}" for d in HEAD_DIMS for x in names), "VMEM"], table)


def _gpu(rows: Sequence[Row]) -> Iterable[str]:
    yield "### H200: registers and memory of the kernels"
    spills = [x["spill_bytes"] for row in rows for x in row.get("kernels", {}).values() if "spill_bytes" in x]
    most = f" In all programs, of all lengths, the most that a kernel spills is {max(spills)} bytes." if spills else ""
    yield (
        "Default tiles. Registers of a thread and bytes that it spills, by `ptxas`, and KiB of shared memory of a "
        f"block, at n = {LENGTHS[0]}. Asked: no spills and at most {MOST_SHARED // KIB} KiB. Without `ptxas` on the "
        "machine registers and spills are not known." + most
    )
    table = []
    for dtype, head_dim, is_causal in itertools.product(("bfloat16", "float32"), HEAD_DIMS, (False, True)):
        row = _row(rows, dtype=dtype, head_dim=head_dim, is_causal=is_causal, backward=True)
        cells = [dtype, str(head_dim), "causal" if is_causal else "full"]
        if row is None or "error" in row:
            table.append([*cells, _state(row), "", ""])
            continue
        table.append(cells + [_of_kernel(row, name) for name in KERNELS])
    yield markdown_table(["dtype", "d", "keys", *(f"{name}: registers, spills, KiB" for name in KERNELS)], table)
    yield "CPU seconds of the compiler, MiB of temporaries, and the most KiB of shared memory:"
    yield _lengths(rows, "gpu", lambda row: f"{_most(row, 'shared_bytes') / KIB:.0f}")
    yield from _errors(rows)


def _of_kernel(row: Row, name: str) -> str:
    figures = row["kernels"].get(name, {})
    shared = figures.get("shared_bytes")
    known = [figures.get("registers"), figures.get("spill_bytes"), None if shared is None else f"{shared / KIB:.0f}"]
    return ", ".join("-" if x is None else str(x) for x in known)


def _errors(rows: Sequence[Row]) -> Iterable[str]:
    if errors := [f"- {_words(row['case'])}: {row['error']}" for row in rows if "error" in row]:
        yield "\n".join(errors)


def _words(case: Mapping[str, Any]) -> str:
    words = [case["chip"], f"n = {case['length']}", f"d = {case['head_dim']}", case["dtype"]]
    words += ["causal"] * case["is_causal"] + ["with gradient"] * case["backward"]
    return ", ".join(words + [f"tiles {case['tiles']}"] * (case["tiles"] is not None))


def _row(rows: Iterable[Row], **asked: Any) -> Row | None:
    """The row of a case with these values; other fields have the most common values."""
    asked = {"length": LENGTHS[0], "dtype": "bfloat16", "tiles": None} | asked
    asked["tiles"] = None if asked["tiles"] is None else [list(tile) for tile in asked["tiles"]]
    return next((row for row in rows if all(row["case"][name] == value for name, value in asked.items())), None)


def _state(row: Row | None) -> str:
    return "" if row is None else "error"


def _bundles(row: Row, kernel: str) -> float:
    tile = row["tiles"]["forward" if kernel == "forward" else "backward"]
    return per_1024_logits(row["kernels"][kernel]["bundles"], tile)


def _most(row: Row, figure: str, kernels: Iterable[str] = KERNELS) -> float:
    return max((row["kernels"].get(name, {}).get(figure) or 0 for name in kernels), default=0)
