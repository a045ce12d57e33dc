"""``python -m tests.readme``: rewrites the generated parts of README.md from the registry and the measurements."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from approx_attention.evaluation import BASELINES, break_even, capability_table, markdown_table, write_atomically
from approx_attention.evaluation.units import in_units
from approx_attention.registry import METHODS
from benchmarks.report import (
    MARGIN,
    best_exact_decode,
    break_even_length,
    from_length,
    machine,
    sizes,
)
from experiments.results import frame
from experiments.studies import read_study
from experiments.whole_picture import where_we_lose

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"


def regenerate(text: str) -> str:
    """README.md with its generated parts made anew."""
    for name, content in {"capability table": capability_table(), "limits": measured_limits()}.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md lacks the marks {begin} and {end}.")
        text = pattern.sub(lambda _, part=f"{begin}\n{content}\n{end}": part, text)
    return text


def measured_limits() -> str:
    """Where each method begins to pay, and what it loses on the sample, from the committed measurements."""
    results = ROOT / "benchmarks/results"
    scaling = [
        json.loads(path.read_text())
        for path in (results / "scaling.json", *sorted(results.glob("scaling_[gt]pu.json")))
    ]
    comparison = json.loads((ROOT / "docs/compare.json").read_text())
    return "\n\n".join([*map(_break_even_table, scaling), _losses(comparison), _lost_families()])


def _break_even_table(document: Mapping[str, Any]) -> str:
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
        f"**Short sequences.** The least measured length from which a method of size {sizes(document)} stays at least "
        f"{100 * MARGIN:.0f} % faster than the fastest exact attention ({machine(document)}). Measured {measured}; "
        "*beyond n* is not faster at n, the longest that it was given time for, and an empty cell has no such form. "
        f"Left out are {absent}: their cost grows with T x S.\n\n"
    ) + markdown_table(["", *forms], table)


def _lost_families() -> str:
    """The data on which methods do not beat what is trivial, from the committed study."""
    records = frame(read_study("whole_picture/where_we_lose", "cpu").results())
    families = dict.fromkeys(family.partition("-")[0] for family in records["family"])
    meant = "; ".join(f"*{family}*: {where_we_lose.FAMILIES[family]}" for family in families)
    header = ["", *(f"no better than {label} on" for label in where_we_lose.TO_BEAT.values())]
    return (
        "**Data.** The data on which a method's error is no smaller than that of the mean of the values, or of a local "
        "window, at equal memory, or where a method holds no summary at equal matrix products (* takes more, "
        f"somewhere, at its smallest size). {meant}. `experiments/whole_picture/RESULTS.md` has errors and sizes.\n\n"
    ) + markdown_table(header, where_we_lose.loss_rows(records))


def _losses(document: Mapping[str, Any]) -> str:
    """What the comparison on the sample says against the methods."""
    rows = [row for row in document["rows"] if not row["is_exact"]]
    names = dict.fromkeys(row["method"] for row in rows)
    largest = {name: max((r for r in rows if r["method"] == name), key=lambda r: r["size"] or 0) for name in names}
    errors = ", ".join(
        f"`{name}`{_of_size(row)} {row['relative_error']:.2g}"
        for name, row in sorted(largest.items(), key=lambda item: item[1]["relative_error"])
    )
    verdict = ""
    for baseline in BASELINES:
        least = largest[baseline]["relative_error"]
        losing = [
            f"`{name}`" for name, row in largest.items() if name not in BASELINES and row["relative_error"] >= least
        ]
        verdict += f"; no better than `{baseline}`: " + (", ".join(losing) or "none")
    kind = "causal" if document["settings"]["is_causal"] else "bidirectional"
    return (
        f"**Accuracy.** On the shipped sample ({kind}, {document['shapes']['key'][1]} tokens), relative error at the "
        f"largest size of the default run (in brackets, with the bytes of its cache): {errors}{verdict}."
    )


def _of_size(row: Mapping[str, Any]) -> str:
    held = None if row["held_bytes"] is None else in_units(row["held_bytes"])
    facts = [str(fact) for fact in (row["size"], held) if fact is not None]
    return f" ({', '.join(facts)})" if facts else ""


if __name__ == "__main__":
    new = regenerate(README.read_text(encoding="utf-8"))
    write_atomically(README, lambda file: file.write(new.encode()))
