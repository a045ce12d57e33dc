"""Plans: the recommendation, the measurements behind it, and its description in words."""

import dataclasses
from typing import Any, NamedTuple

from approx_attention.evaluation.arms import BASELINES
from approx_attention.evaluation.error_laws import ErrorLaw, Split
from approx_attention.evaluation.units import in_units, times
from approx_attention.registry import METHODS


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting of one method, chosen on the calibration units and checked on the held-out units.

    Attributes:
        method: name of the method, or of the form of exact attention.
        size: the size of its summary, if it has one.
        predicted_error: relative error on the calibration units, by the fit.
        error_bound: predicted upper bound of the error on unseen units, on which the choice is based.
        held_out_error: relative error on all held-out units, mean over new seeds.
        worst_held_out_error: relative error on the worst held-out unit.
        relative_error: relative error on all units, as in ``approx-attention compare``.
        held_bytes: cache bytes per key head and sequence; the bytes of all keys and values if these are kept.
        compile_seconds: compile time.
        seconds: shortest time of a call on all tensors, without random projections that calls can share.
        speedup: time of the fastest exact form over ``seconds``.
        is_exact: whether this is a form of exact attention.
        is_predicted: whether the error bound meets the tolerance.
        in_budget: whether it meets the budgets.
        meets: whether the held-out error meets the tolerance.
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
    """The error of a method against its size.

    Attributes:
        measured: measured relative errors on the calibration units, by size.
        error: the law fitted to them.
        bound: the law fitted to the error bounds of unseen units.
    """

    measured: dict[int, float]
    error: ErrorLaw
    bound: ErrorLaw


@dataclasses.dataclass(frozen=True)
class Plan:
    """The recommendation of `plan`, with its candidates.

    Attributes:
        tolerance: the relative error allowed.
        max_bytes: bytes allowed per key head and sequence, if any.
        max_seconds: time allowed for a call, if any.
        rank_by: ``seconds`` or ``held_bytes``.
        confidence: confidence of the bounds.
        split: the split into calibration and held-out units.
        candidates: exact attention and one or two settings of every method; those predicted to meet the tolerance
            within the budget come first, the best at the top.
        curves: error against size, by method.
        pick: the recommendation, or None if nothing is predicted to meet the tolerance within the budget.
        verdict: the recommendation in words, with caveats.
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
        """The candidate within the budget with the smallest error bound; None if nothing is within the budget."""
        return min((c for c in self.candidates if c.in_budget), key=lambda c: c.error_bound, default=None)


def plan_document(made: Plan) -> dict[str, Any]:
    """Return the options, the split and the curves of a plan as a document for JSON, without its candidates."""
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
    """The rank of a candidate.

    Args:
        candidate: the candidate.
        rank_by: ``"held_bytes"`` to rank by cache bytes; any other value to rank by seconds.

    Returns:
        The two numbers, that of the ranking first; the other decides in a tie.
    """
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
            text += f" The nearest within it: {made.nearest.label}, {_errors(made.nearest)}."
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
    size = METHODS[pick.method].size
    setting = f" ({size}={pick.size})" if size and pick.size is not None else ""
    text = f"Use {pick.label}{setting}: {_errors(pick)}; {_costs(pick)}."
    if pick.method in BASELINES:
        text += " It is a trivial baseline: at this tolerance no method is worthwhile on these tensors."
    if not pick.meets:
        safe = next((c for c in made.candidates if c.is_predicted and c.in_budget and c.meets), None)
        text += f" But it misses {tolerance} on the held-out {made.split.by}"
        text += "." if safe is None else f"; the next that meets it there is {safe.label}: {_costs(safe)}."
    return text


def _errors(candidate: Candidate) -> str:
    return (
        f"error predicted {candidate.predicted_error:.2g}, at most {candidate.error_bound:.2g}; "
        f"{candidate.held_out_error:.2g} measured on held-out units"
    )


def _costs(candidate: Candidate) -> str:
    speed = times(candidate.speedup, "faster than", "slower than")
    if speed == "1x":
        speed = "" if candidate.is_exact else "as fast as"
    compared = f" ({speed} the fastest exact)" if speed else ""
    return f"{1e3 * candidate.seconds:.3g} ms{compared}, cache {in_units(candidate.held_bytes)}"
