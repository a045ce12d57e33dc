"""The tables of the pages of methods and of the guide, from the registry and the measurements."""

import dataclasses
import inspect
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from approx_attention.evaluation import BASELINES, break_even, markdown_table
from approx_attention.registry import METHODS, Capabilities, Method
from benchmarks.report import (
    MARGIN,
    best_exact_decode,
    break_even_length,
    from_length,
    machine,
    sizes,
)
from docs.comparisons import comparison, kib_held
from docs.names import first_line

ROOT = pathlib.Path(__file__).parent.parent
LENGTHS = (1024, 4096, 16384, 65536)
HEAD_DIM = 64


def capability_rows(method: Method) -> str:
    """The capability row of a method as a column, each entry with its meaning."""
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", inspect.getdoc(Capabilities) or "", re.MULTILINE))
    rows = []
    for field in dataclasses.fields(Capabilities):
        meaning = " ".join(meanings[field.name].replace("``", "`").split())
        rows.append([f"`{field.name}`", "yes" if getattr(method.capabilities, field.name) else "no", meaning])
    if method.size is not None:
        rows.append(["size", f"`{method.size}`", "the hyper-parameter that sets the size of its summary"])
    return markdown_table(["", "", "meaning"], rows, others="left")


def cost_table(method: Method) -> str:
    """FLOPs of the matrix products at several lengths, next to those of exact attention."""
    size = f", `{method.size}` = {method.usual_size}" if method.size else ""
    rows = []
    for n in LENGTHS:
        flops, exact = (m.cost(n, n, HEAD_DIM, HEAD_DIM, method.usual_size) for m in (method, METHODS["exact"]))
        rows.append([str(n), f"{flops:.3g}", f"{exact:.3g}", f"{100 * flops / exact:.3g} %"])
    text = (
        f"Matrix products of the bidirectional form for one head of {HEAD_DIM} channels{size}. This counts operations "
        "and no time: [](../results/benchmarks.md) has what was timed."
    )
    return f"{text}\n\n" + markdown_table(["T = S", "FLOPs", "exact attention", "share"], rows)


def sample_table() -> str:
    """Every row of the comparison on the sample, the least error first."""
    document = comparison()
    rows = [
        [
            f"`{row['method']}`" if row["is_exact"] or row["method"] not in BASELINES else f"*{row['method']}*",
            "" if row["size"] is None else str(row["size"]),
            f"{kib_held(row, document):.4g}",
            f"{row['relative_error']:.2g}",
            "" if row["far_error"] is None else f"{row['far_error']:.2g}",
            f"{row['speedup']:.2f}x",
        ]
        for row in sorted(document["rows"], key=lambda row: row["relative_error"])
        if not row["is_exact"]
    ]
    header = ["method", "size", "cache (KiB)", "relative error", "far error", "speed over best exact"]
    exact = next(row for row in document["rows"] if row["is_exact"])
    return (
        markdown_table(header, rows)
        + f"\n\n{document['shapes']['key'][1]} tokens, {machine(document)}. Far is beyond a window of "
        f"{document['settings']['window_size']}. Baselines are in italics. Exact attention "
        f"holds {exact['held_bytes'] / 1024:.4g} KiB.\n"
    )


def methods_table(names: Iterable[str]) -> str:
    """A table of methods, each with a sentence and the capabilities that most tasks need."""
    exact, rows = METHODS["exact"], []
    for name in names:
        method = METHODS[name]
        can = method.capabilities
        share = method.cost(65536, 65536, HEAD_DIM, HEAD_DIM, method.usual_size) / exact.cost(
            65536, 65536, HEAD_DIM, HEAD_DIM, 0
        )
        flags = ["yes" if has else "" for has in (can.causal, can.decode, can.normalizer, can.needs_key)]
        rows.append([f"[`{name}`]({name}.md)", plain(first_line(method.function)), *flags, f"{100 * share:.3g}"])
    header = ["method", "", "causal", "cache", "merges", "random", "FLOPs, %"]
    return markdown_table(header, rows, others=["left", *["center"] * 4, "right"])


def plain(line: str) -> str:
    """Convert a line of reStructuredText to Markdown for a table cell."""
    line = re.sub(r":py:\w+:`([^`]*)`", r"`\1`", re.sub(r":math:`([^`]*)`", r"$\1$", line))
    return line.replace("``", "`").replace("|", r"\|")


def losses() -> dict[str, tuple[str, str]]:
    """The reported data on which a method is no better than the mean of the values, and than a local window."""
    text = (ROOT / "experiments/whole_picture/RESULTS.md").read_text(encoding="utf-8")
    table = text.partition("no better than mean(V) on")[2].split("\n\n", 1)[0]
    return {
        name: (mean, local)
        for name, mean, local in re.findall(r"^\| `(\w+)`[ *]*\| *([^|]*?) *\| *([^|]*?) *\|$", table, re.MULTILINE)
    }


def limits_table() -> str:
    """The break-even lengths of every machine that was measured."""
    results = ROOT / "benchmarks/results"
    measured = [results / "scaling.json", *sorted(results.glob("scaling_[gt]pu.json"))]
    return "\n\n".join(break_even_table(json.loads(path.read_text(encoding="utf-8"))) for path in measured)


def break_even_table(document: Mapping[str, Any]) -> str:
    """The least measured length from which each method is faster than exact attention."""
    forms = {
        "bidirectional": (False, False),
        "causal": (True, False),
        "bidirectional, with gradient": (False, True),
        "causal, with gradient": (True, True),
    }
    rows = document["rows"]
    lengths: dict[tuple[str, bool, bool], list[int]] = {}
    for row in rows:
        lengths.setdefault((row["arm"], row["is_causal"], row["backward"]), []).append(row["length"])
    arms = dict.fromkeys(row["arm"] for row in rows if not row["arm"].startswith("exact"))
    table = [
        [
            f"`{arm}`",
            *(
                from_length(break_even_length(rows, arm, *form), lengths[arm, *form]) if (arm, *form) in lengths else ""
                for form in forms.values()
            ),
        ]
        for arm in arms
    ]
    tried = {
        what: sorted({n for (_, _, backward), own in lengths.items() if backward == gradient for n in own})
        for what, gradient in (("forward", False), ("with gradient", True))
    }
    if "decode" in document:
        forms["decoding"] = (True, False)
        decode = document["decode"]["rows"]
        exact = best_exact_decode(decode)
        tried["decoding"] = list(exact)
        for arm, row in zip(arms, table, strict=True):
            seconds = {entry["length"]: entry["seconds"] for entry in decode if entry["arm"] == arm}
            row.append(from_length(break_even(seconds, exact, margin=MARGIN), seconds) if seconds else "")
    measured = "; ".join(f"{what} at {', '.join(map(str, own))}" for what, own in tried.items() if own)
    absent = ", ".join(f"`{name}`" for name in METHODS if name not in arms and name != "exact")
    return (
        (
            f"The least measured length from which a method of size {sizes(document)} stays at least "
            f"{100 * MARGIN:.0f} % faster than the fastest exact attention ({machine(document)}). Measured {measured}. "
            "*beyond n*: not faster at n, the longest length measured. Empty: no such form. "
            f"Left out are {absent}.\n\n"
        )
        + markdown_table(["", *forms], table)
        + "\n"
    )


# The verdicts of experiments.claims, repeated because the site does not need the packages of the experiments.
VERDICTS = ("reproduced", "suggested", "not reproduced", "no ground", "not run")


def verdicts() -> list[dict[str, Any]]:
    """Every claim with its verdict, from the report of the experiments."""
    return json.loads((ROOT / "experiments" / "verdicts.json").read_text(encoding="utf-8"))


def verdict_table(counts: bool = True) -> str:
    """The number of claims of each family of studies by verdict, and the claims that are not reproduced."""
    found = verdicts()
    by_family = {family: Counter(v["verdict"] for v in found if v["family"] == family) for family in families()}
    rows = [
        [f"[{family.replace('_', ' ')}](../results/{family}.md)", *(str(count[kind]) for kind in VERDICTS)]
        for family, count in by_family.items()
    ]
    failed = [f"- {v['statement']} (`configs/{v['study']}.yaml`)" for v in found if v["verdict"] == "not reproduced"]
    table = [markdown_table(["studies", *VERDICTS], rows), ""] if counts else []
    return "\n".join([*table, "Claims that are not reproduced:", "", *failed, ""])


def families() -> list[str]:
    """The families of studies that have claims."""
    return sorted({v["family"] for v in verdicts()})
