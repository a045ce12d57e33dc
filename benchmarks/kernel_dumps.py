"""Compiler reports on fused kernels: schedules and memory on a TPU, registers on a GPU."""

import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

# A line of a schedule is a bundle, a word of instructions that start together: its address, marks, and after a colon
# the instructions. A mark begins a region (PF, PB: predicated; LB: a loop), as does the bundle after a branch.
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2}\b[, ]*)*):")
_PRODUCT = re.compile(r"\bvmatmul\.")
_TRANSPOSE = re.compile(r"\bvxpose\.")
_BRANCH = "sbr.rel"
# The name of a kernel in the name of its custom call, of its file, or of its function.
_NAME = re.compile(r"(forward|d_queries|d_keys)_")

Figures = dict[str, dict[str, Any]]


def schedule_of(text: str) -> dict[str, int]:
    """The bundles of a kernel without masks: of the body of its tile, and of the other code that a step may run.

    The body is the region with the most matrix products. Regions with transposes run once for a block of rows.

    Raises:
        ValueError: the text has no matrix product.
    """
    regions = [[0, 0, 0]]
    begins = False
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        if begins or bundle[1].strip():
            regions.append([0, 0, 0])
        region = regions[-1]
        region[0] += 1
        region[1] += len(_PRODUCT.findall(line))
        region[2] += len(_TRANSPOSE.findall(line))
        begins = _BRANCH in line
    body = max(regions, key=lambda region: region[1])
    if body[1] == 0:
        raise ValueError("this is not the schedule of an attention kernel: it has no matrix product")
    others = sum(size for size, products, transposes in regions if products == transposes == 0)
    return {"bundles": body[0], "step_bundles": others}


def vmem_of(report: str) -> Figures:
    """Bytes of VMEM of each operation, and bytes spilled from registers, from the compiler's report."""
    # The report is an HTML page with its data as a JSON object.
    data = re.search(r"const DATA *= *", report)
    if data is None:
        return {}
    found: Figures = {}
    for name, operation in json.JSONDecoder().raw_decode(report, data.end())[0]["hlo_breakdowns"].items():
        allocations = [x for block in operation.get("blocks", ()) for x in block["allocations"]]
        spilled = sum(x["size"] for x in allocations if x["tag"] == "SPILL")
        found[name] = {"vmem_bytes": operation.get("total_size"), "spill_bytes": spilled}
    return found


def of_tpu(folder: pathlib.Path, *, is_full: bool) -> Figures:
    """By kernel: bytes of VMEM and of spills, and the bundles of its schedule if it computes no mask."""
    kernels: Figures = {}
    for path in folder.glob("*vmem_report.html"):
        for name, figures in vmem_of(path.read_text()).items():
            if "attention" in name and (kernel := _NAME.search(name)):
                kernels.setdefault(kernel[1], {}).update(figures)
    if is_full:
        for path in folder.glob("*attention*final_bundles.txt"):
            if "schedule-analysis" not in path.name and (kernel := _NAME.search(path.name)):
                kernels.setdefault(kernel[1], {}).update(schedule_of(path.read_text()))
    return kernels


def registers(answer: str) -> dict[str, int]:
    """Registers and bytes of spills from the output of ``ptxas -v`` for one kernel."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", answer)
    used = re.search(r"Used (\d+) registers", answer)
    if spills is None or used is None:
        return {}
    return {"registers": int(used[1]), "spill_bytes": int(spills[1]) + int(spills[2])}


def shared_bytes(thunks: str) -> dict[str, int]:
    """Bytes of shared memory of each attention kernel in a program's list of launches."""
    found = re.findall(r"\b_(\w+)_kernel grid: .* shared_memory: (\d+) bytes", thunks)
    return {name: int(count) for name, count in found}


def of_gpu(folder: pathlib.Path) -> Figures:
    """By kernel: bytes of shared memory, and registers and spills if ``ptxas`` is installed."""
    kernels: Figures = {}
    for path in folder.glob("*thunk_sequence.txt"):
        for name, count in shared_bytes(path.read_text()).items():
            kernels.setdefault(name, {})["shared_bytes"] = count
    ptxas = shutil.which("ptxas")
    for path in folder.glob("*.ptx"):
        entry = re.search(r"\.entry _(\w+)_kernel\(", path.read_text())
        if ptxas and entry:
            command = [ptxas, "-v", "-arch=sm_90a", path, "-o", folder / "assembled"]
            answer = subprocess.run(command, capture_output=True, text=True)
            kernels.setdefault(entry[1], {}).update(registers(answer.stderr + answer.stdout))
    return kernels


def per_1024_logits(bundles: int, tile: Mapping[str, int]) -> float:
    """Bundles of a tile for each 1024 of its logits."""
    return bundles / (tile["rows"] * tile["columns"] / 1024)
