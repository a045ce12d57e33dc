"""A plan: what is recommended, what it rests on, and the recommendation in words."""

import dataclasses
from typing import Any, NamedTuple

from approx_attention.evaluation.arms import BASELINES
from approx_attention.evaluation.error_laws import ErrorLaw, Split
from approx_attention.evaluation.units import in_units, times


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting of one method, chosen from the calibration units, with what it turned out to be.

    Attributes:
        method: name of the method, or of the form of exact attention.
        size: the size of its summary, if it has one.
        predicted_error: relative error of the calibration units, by the fit.
        error_bound: what the error of unseen units is predicted to stay below; the choice rests on it alone.
        held_out_error: relative error of the held-out units together, mean over draws that chose nothing.
        worst_held_out_error: that of the worst of these units.
        relative_error: that of all units, as ``approx-attention compare`` reports it.
        held_bytes: bytes held per key head and sequence; those of all keys and values where these are kept.
        compile_seconds: time to compile.
        seconds: least time of a call on all tensors, without random projections that calls can share.
        speedup: time of the fastest exact form over ``seconds``.
        is_exact: whether this is a form of exact attention.
        is_predicted: whether its bound meets the tolerance.
        in_budget: whether it meets the budgets.
        meets: whether the error of the held-out units meets the tolerance.
    """

    method: str
    size: int | None
    predicted_error: float
    error_bound: float
    held_out_error: float
    worst_held_out_error: float
    relative_error: float
    held_bytes: int
    compile_seconds: float
    seconds: float
    speedup: float
    is_exact: bool
    is_predicted: bool
    in_budget: bool
    meets: bool

    @property
    def label(self) -> str:
        """The method with its size."""
        return self.method if self.size is None else f"{self.method} {self.size}"


class Curve(NamedTuple):
    """Error of a method against its size on the calibration units, and the bound of that of unseen ones, as fitted."""

    measured: dict[int, float]
    error: ErrorLaw
    bound: ErrorLaw


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` recommends, and why.

    Attributes:
        tolerance: the relative error allowed.
        max_bytes: bytes allowed per key head and sequence, if any.
        max_seconds: time allowed for a call, if any.
        rank_by: ``seconds`` or ``held_bytes``.
        confidence: of the bounds.
        split: what was measured and what was held out.
        candidates: exact attention and one setting or two of every method: those predicted to meet the tolerance in
            the budget first, the best on top.
        curves: error against size, by method.
        pick: the recommendation, or None where nothing is predicted to meet the tolerance in the budget.
        verdict: the recommendation in words, with what speaks against it.
    """

    tolerance: float
    max_bytes: int | None
    max_seconds: float | None
    rank_by: str
    confidence: float
    split: Split
    candidates: list[Candidate]
    curves: dict[str, Curve]
    pick: Candidate | None
    verdict: str

    @property
    def nearest(self) -> Candidate | None:
        """The candidate within the budget whose error is bounded lowest; none where the budget allows nothing."""
        return min((c for c in self.candidates if c.in_budget), key=lambda c: c.error_bound, default=None)


def plan_document(made: Plan) -> dict[str, Any]:
    """What the plan rests on, ready for JSON; ``results.report`` adds the candidates."""
    split = made.split
    return {
        "tolerance": made.tolerance,
        "max_bytes": made.max_bytes,
        "max_seconds": made.max_seconds,
        "rank_by": made.rank_by,
        "confidence": made.confidence,
        "split": {"by": split.by, "calibration": split.calibration.tolist(), "held_out": split.held_out.tolist()},
        "pick": None if made.pick is None else made.pick.label,
        "verdict": made.verdict,
        "curves": {
            name: {
                "sizes": list(curve.measured),
                "errors": list(curve.measured.values()),
                "bounds": list(curve.bound.errors),
                "slope": curve.error.slope,
            }
            for name, curve in made.curves.items()
        },
    }


def cost(candidate: Candidate, rank_by: str) -> tuple[float, float]:
    """What candidates are ranked by: seconds or cache bytes, and the other where these are equal."""
    held, seconds = float(candidate.held_bytes), candidate.seconds
    return (held, seconds) if rank_by == "held_bytes" else (seconds, held)


def verdict(made: Plan) -> str:
    """The recommendation in words."""
    pick, tolerance = made.pick, f"{made.tolerance:g}"
    if pick is None:
        budget = " and ".join(
            part
            for part, given in (
                (f"{in_units(made.max_bytes or 0)} a head", made.max_bytes),
                (f"{1e3 * (made.max_seconds or 0):.3g} ms", made.max_seconds),
            )
            if given is not None
        )
        text = f"Nothing is predicted to meet {tolerance}" + (f" within {budget}." if budget else ".")
        if made.nearest is not None:
            text += f" Nearest within it: {made.nearest.label}, {_errors(made.nearest)}."
        meeting = [c for c in made.candidates if c.is_predicted]
        if meeting:
            cheapest = min(meeting, key=lambda c: cost(c, made.rank_by))
            text += f" The cheapest that meets the tolerance is {cheapest.label}: {_costs(cheapest)}."
        return text
    if pick.is_exact:
        better = "faster" if made.rank_by == "seconds" else "smaller"
        return (
            f"Use exact attention ({pick.label}): nothing that is predicted to meet {tolerance} is {better} here. "
            f"{_costs(pick)}."
        )
    text = f"Use {pick.label}: {_errors(pick)}; {_costs(pick)}."
    if pick.method in BASELINES:
        text += " It is a trivial baseline: on these tensors no method earns its keep at this tolerance."
    if not pick.meets:
        safe = next((c for c in made.candidates if c.is_predicted and c.in_budget and c.meets), None)
        text += f" But it misses {tolerance} on the held-out {made.split.by}"
        text += "." if safe is None else f"; the next that meets it there is {safe.label}: {_costs(safe)}."
    return text


def _errors(candidate: Candidate) -> str:
    return (
        f"error predicted {candidate.predicted_error:.2g}, at most {candidate.error_bound:.2g}; "
        f"{candidate.held_out_error:.2g} measured on what was held out"
    )


def _costs(candidate: Candidate) -> str:
    speed = times(candidate.speedup, "faster than", "slower than")
    if speed == "1x":
        speed = "" if candidate.is_exact else "as fast as"
    compared = f" ({speed} the fastest exact)" if speed else ""
    return f"{1e3 * candidate.seconds:.3g} ms{compared}, cache {in_units(candidate.held_bytes)}"
