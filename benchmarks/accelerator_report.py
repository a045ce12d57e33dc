"""The section of RESULTS.md on times and memory measured on accelerators."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from approx_attention.evaluation import markdown_table
from benchmarks.exact import num_flops
from benchmarks.tables import MARGIN, best_exact, break_even_length, from_length, machine, mib, ms, sizes

Row = Mapping[str, Any]

# Dense bfloat16 operations per second that the makers state, by JAX's name of the chip.
PEAK_FLOPS: Mapping[str, float] = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
COMMAND = "python -m benchmarks accelerator"
# The title of each kind of sequence, whether it is causal, and whether it includes the gradient.
PASSES: Sequence[tuple[str, bool, bool]] = (
    ("Causal, forward", True, False),
    ("Causal, forward and backward", True, True),
    ("Bidirectional, forward", False, False),
    ("Bidirectional, forward and backward", False, True),
)


def section(documents: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The parts of the section, from the documents of all chips."""
    if not documents:
        yield "## Times on accelerators"
        yield f"Nothing has been measured on an accelerator yet; `{COMMAND}` does it on a machine with a GPU or TPU."
    for document in documents:
        yield from _of_chip(document)


def _of_chip(document: Mapping[str, Any]) -> Iterable[str]:
    chip, peak = document["chip"], PEAK_FLOPS.get(document["chip"])
    yield f"## Times on an accelerator: {chip}"
    yield (
        f"Measured by `{COMMAND}`. Machine: {chip}, {machine(document)}. Tensors: 1 sequence, "
        f"{document['num_heads']} heads, head dimension {document['head_dim']}, {document['dtype']}. Each method has a "
        f"summary of size {sizes(document)}."
    )
    yield (
        f"Times are medians of up to {document['rounds']} runs after a warm-up, compilation apart; calls below a "
        "millisecond follow one another without a synchronisation. `exact` is the library's default, `exact NAME` its "
        "implementation of that name, `exact jax.nn NAME` that of `jax.nn.dot_product_attention`; `best exact` is the "
        "fastest of them. A longer sequence is left out where the shorter one failed or took too long."
    )
    if document["not_begun"]:
        yield (
            f"{document['not_begun']} cases were not begun within the budget of the last run; `{COMMAND}` continues it."
        )
    good = [row for row in document["rows"] if "error" not in row]
    passes = [(title, _of_pass(good, causal, backward)) for title, causal, backward in PASSES]
    passes += [("Decoding", [row for row in good if row["decode"]])]
    passes = [(title, rows) for title, rows in passes if rows]
    if passes:
        yield from _break_even_table(passes)
    for title, rows in passes:
        yield from _times(title, rows, document)
    yield from _shares(chip, peak, passes)
    yield from _memory(document, passes)
    yield from _errors(document["rows"])


def _of_pass(rows: Iterable[Row], is_causal: bool, backward: bool) -> list[Row]:
    return [row for row in rows if (row["is_causal"], row["backward"], row["decode"]) == (is_causal, backward, False)]


def _arms(rows: Iterable[Row], *, exact: bool) -> list[str]:
    return [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm.startswith("exact") == exact]


def _break_even(rows: Sequence[Row], arm: str) -> str:
    """The break-even length of a method in the rows of one pass; empty if no rows can be compared."""
    is_causal, backward = rows[0]["is_causal"], rows[0]["backward"]
    exact = best_exact(rows, is_causal, backward)
    compared = [row for row in rows if row["length"] in exact]
    lengths = [row["length"] for row in compared if row["arm"] == arm]
    return from_length(break_even_length(compared, arm, is_causal, backward), lengths) if lengths else ""


def _break_even_table(passes: Sequence[tuple[str, list[Row]]]) -> Iterable[str]:
    yield "### Break-even with exact attention"
    yield (
        f"The shortest measured length from which the method stays at least {100 * MARGIN:.0f} % faster than `best "
        "exact`; *beyond n*: at n, the longest length at which both were measured, it is not."
    )
    methods = dict.fromkeys(arm for _, rows in passes for arm in _arms(rows, exact=False))
    table = [[f"`{arm}`", *(_break_even(rows, arm) for _, rows in passes)] for arm in methods]
    yield markdown_table(["", *(title for title, _ in passes)], table)


def _times(title: str, rows: Sequence[Row], document: Mapping[str, Any]) -> Iterable[str]:
    decode = rows[0]["decode"]
    number, unit = (_us, "microseconds of a token after n others") if decode else (ms, "milliseconds at n")
    yield f"### {title}: {unit}"
    if decode:
        yield (
            f"Mean of {document['decoded']} tokens that come one by one, append and attend. `exact buffer` and `exact "
            f"jax.nn NAME` keep all keys and values in {document['dtype']}, `exact decoder` and the methods theirs in "
            "float32. The caches of the methods have a bounded size and hold the first tokens only: their time does "
            "not depend on n."
        )
    lengths = sorted({row["length"] for row in rows})
    exact = best_exact(rows, rows[0]["is_causal"], rows[0]["backward"])
    table = [["best exact", *(number(exact[n]) if n in exact else "" for n in lengths)]]
    for arm in [*_arms(rows, exact=True), *_arms(rows, exact=False)]:
        seconds = {row["length"]: row["seconds"] for row in rows if row["arm"] == arm}
        table.append([f"`{arm}`", *(number(seconds[n]) if n in seconds else "" for n in lengths)])
    yield markdown_table(["", *map(str, lengths)], table)


def _shares(chip: str, peak: float | None, passes: Sequence[tuple[str, list[Row]]]) -> Iterable[str]:
    """The exact implementations' shares of the peak, if the peak is known."""
    table, rows = [], [row for _, rows in passes for row in rows if not row["decode"]]
    lengths = sorted({row["length"] for row in rows if row["arm"].startswith("exact")})
    if peak is None or not lengths:
        return
    for title, is_causal, backward in PASSES:
        own = _of_pass(rows, is_causal, backward)
        for arm in _arms(own, exact=True):
            shares = {
                row["length"]: num_flops(row["length"], is_causal, backward) / row["seconds"] / peak
                for row in own
                if row["arm"] == arm
            }
            cells = (f"{100 * shares[n]:.3g}%" if n in shares else "" for n in lengths)
            table.append([f"`{arm}`, {title[0].lower()}{title[1:]}", *cells])
    yield "### Exact attention: share of the peak at n"
    yield (
        f"Products alone, half of the pairs when causal, against the {peak / 1e12:.0f} TFLOP/s in bfloat16 that are "
        f"stated for {chip}."
    )
    yield markdown_table(["", *map(str, lengths)], table)


def _memory(document: Mapping[str, Any], passes: Sequence[tuple[str, list[Row]]]) -> Iterable[str]:
    rows = [row for _, rows in passes for row in rows]
    if not rows:
        return
    columns = [(title, _shown_length(rows), rows) for title, rows in passes]
    table = []
    for arm in [*_arms(rows, exact=True), *_arms(rows, exact=False)]:
        cells = []
        for _, length, own in columns:
            found = next((row for row in own if (row["arm"], row["length"]) == (arm, length)), None)
            cells.append(mib(found["cache_bytes" if found["decode"] else "temp_bytes"]) if found else "")
        if any(cells):
            table.append([f"`{arm}`", *cells])
    yield "### Memory: MiB of temporaries, and of the cache when decoding"
    if peaks := [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]:
        room = document["device_bytes"]
        of_all = f" of {room / 2**30:.3g} GiB that it may use" if room else ""
        yield f"At its peak the process held {max(peaks) / 2**30:.3g} GiB on the device{of_all}, tensors included."
    yield markdown_table(["", *(f"{title}, n = {length}" for title, length, _ in columns)], table)


def _errors(rows: Iterable[Row]) -> Iterable[str]:
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            words = ["decoding" if row["decode"] else "causal" if row["is_causal"] else "bidirectional"]
            words += ["with gradient"] * row["backward"] + [f"at {row['length']}"]
            failed.setdefault((row["arm"], row["error"]), []).append(" ".join(words))
    if failed:
        yield "### Cases that failed"
        yield "\n".join(f"- `{arm}`, {', '.join(where)}: {error}" for (arm, error), where in failed.items())


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def _shown_length(rows: Sequence[Row]) -> int:
    """The longest sequence at which at least half of the methods and implementations were measured."""
    lengths = [row["length"] for row in rows]
    half = len({row["arm"] for row in rows}) / 2
    return max((n for n in lengths if lengths.count(n) >= half), default=max(lengths))
