"""The tables of the pages of methods and of the guide, from the registry and the measurements."""

import dataclasses
import inspect
import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from approx_attention.evaluation import BASELINES, markdown_table
from approx_attention.registry import METHODS, Capabilities, Method
from benchmarks.report import machine
from docs.comparisons import comparison, kib_held

ROOT = pathlib.Path(__file__).parent.parent
LENGTHS = (1024, 4096, 16384, 65536)
HEAD_DIM = 64


def capability_rows(method: Method) -> str:
    """The capability row of a method, upright, each entry with its meaning."""
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", inspect.getdoc(Capabilities) or "", re.MULTILINE))
    rows = []
    for field in dataclasses.fields(Capabilities):
        meaning = " ".join(meanings[field.name].replace("``", "`").split())
        rows.append([f"`{field.name}`", "yes" if getattr(method.capabilities, field.name) else "no", meaning])
    if method.size is not None:
        rows.append(["size", f"`{method.size}`", "the hyper-parameter that says how large its summary is"])
    return markdown_table(["", "", "meaning"], rows, others="left")


def cost_table(method: Method) -> str:
    """FLOPs of the matrix products at several lengths, beside those of exact attention."""
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


def needs_table() -> str:
    """Which methods have what a task may need."""
    needs: dict[str, Callable[[Capabilities], bool]] = {
        "a causal form": lambda can: can.causal,
        "decoding in a cache of a size that is fixed before": lambda can: can.decode,
        "queries of another sequence": lambda can: can.cross,
        "a mask or bias of every pair": lambda can: can.dense_mask,
        "logits with a soft cap": lambda can: can.soft_cap,
        "answers that merge with others": lambda can: can.normalizer,
        "answers that average values": lambda can: can.convex,
        "no randomness": lambda can: not can.needs_key,
        "time and memory below T x S": lambda can: can.subquadratic,
        "arrays to learn": lambda can: can.trainable,
        "exact attention at full size": lambda can: can.exact_limit,
    }
    links = {need: [f"[`{name}`](../methods/{name}.md)" for name, method in METHODS.items() if has(method.capabilities)]
             for need, has in needs.items()}  # fmt: skip
    return markdown_table(
        ["need", "methods that have it"], [[need, ", ".join(names)] for need, names in links.items()], others="left"
    )


# Those of experiments.claims, whose packages the site does not need.
VERDICTS = ("reproduced", "suggested", "not reproduced", "no ground", "not run")


def verdicts() -> list[dict[str, Any]]:
    """Every claim with its verdict, as the report of the experiments left them."""
    return json.loads((ROOT / "experiments" / "verdicts.json").read_text(encoding="utf-8"))


def verdict_table() -> str:
    """The number of claims of each family of studies by verdict, and the claims that are not reproduced."""
    found = verdicts()
    counts = {family: Counter(v["verdict"] for v in found if v["family"] == family) for family in families()}
    rows = [[f"`{family}`", *(str(count[kind]) for kind in VERDICTS)] for family, count in counts.items()]
    failed = [f"- {v['statement']} (`configs/{v['study']}.yaml`)" for v in found if v["verdict"] == "not reproduced"]
    return "\n".join([markdown_table(["studies", *VERDICTS], rows), "", "Not reproduced:", "", *failed, ""])


def families() -> list[str]:
    """The families of studies that have claims."""
    return sorted({v["family"] for v in verdicts()})
