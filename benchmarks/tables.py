"""Shared code of benchmark reports: the machine, break-even lengths, and numbers as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from approx_attention.evaluation import break_even

# Times are not more precise than this: a smaller gain does not count as faster.
MARGIN = 0.05


def machine(document: Mapping[str, Any]) -> str:
    """The machine and the versions of a measurement, in a few words."""
    env = document["environment"]
    peers = f", PyTorch {env['torch']}" if env.get("torch") else ""
    return (
        f"{env['processor']}, {env['processor_cores']} cores, backend {env['backend']}, "
        f"Python {env['python']}, jax {env['jax']}{peers}"
    )


def sizes(document: Mapping[str, Any]) -> str:
    """The sizes of the summaries, those that differ from the common one in brackets."""
    own = document.get("sizes", {"local": 128})
    others = ", ".join(f"`{name}`: {size}" for name, size in own.items() if size not in (None, document["size"]))
    return f"{document['size']} ({others})"


def best_exact(rows: Iterable[Mapping[str, Any]], is_causal: bool, backward: bool) -> dict[int, float]:
    """Seconds of the fastest exact form at each length, shortest first."""
    seconds: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        if row["arm"].startswith("exact") and (row["is_causal"], row["backward"]) == (is_causal, backward):
            seconds[row["length"]] = min(row["seconds"], seconds.get(row["length"], float("inf")))
    return seconds


def best_exact_decode(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Seconds per token of the fastest exact cache at each length, shortest first."""
    as_passes = [{**row, "is_causal": True, "backward": False} for row in rows]
    return best_exact(as_passes, True, False)


def break_even_length(rows: Sequence[Mapping[str, Any]], arm: str, is_causal: bool, backward: bool) -> int | None:
    """The shortest measured length from which a configuration is faster than the best exact form at every length."""
    measured = [r for r in rows if (r["arm"], r["is_causal"], r["backward"]) == (arm, is_causal, backward)]
    exact = best_exact(rows, is_causal, backward)
    return break_even({r["length"]: r["seconds"] for r in measured}, exact, margin=MARGIN)


def from_length(length: int | None, measured: Iterable[int]) -> str:
    """A break-even as text."""
    return f"beyond {max(measured)}" if length is None else str(length)


def ms(seconds: float) -> str:
    """Milliseconds as text."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def mib(num_bytes: int | None) -> str:
    """MiB as text."""
    return "" if num_bytes is None else f"{num_bytes / 2**20:.3g}"
