"""Which method, of what size, for a tolerance and a budget: measured on some of the user's heads, checked on others."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from rich.text import Text

from approx_attention.core import InputError
from approx_attention.evaluation.comparison import (
    BASELINES,
    MOST_SEEDS,
    PADDED_FOOTNOTE,
    TRIVIAL,
    TRIVIAL_FOOTNOTE,
    Options,
    check_method,
    check_options,
    check_range,
    default_methods,
    exact_arms,
    in_units,
    method_arm,
    no_better_than_mean,
    plain_table,
    times,
    token_bytes,
    without_padding,
)
from approx_attention.evaluation.diagnostics import Arm, compile_arm, time_interleaved
from approx_attention.evaluation.error_laws import LEAST_HEADS, ErrorLaw, Split, UnitErrors, split_units
from approx_attention.evaluation.figures import log_scales, method_styles
from approx_attention.evaluation.files import Tensors
from approx_attention.evaluation.real_tokens import key_mask, query_mask
from approx_attention.registry import get_method

_Setting = TypeVar("_Setting")

# How often a method is measured again at the size that the fit proposes.
REFINEMENTS = 4
# A bound that is the tolerance but for rounding meets it.
ROUNDING = 1 + 1e-9


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
        seconds: least time of a call on all tensors.
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


def plan(
    tensors: Tensors,
    *,
    tolerance: float,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    methods: Iterable[str] | None = None,
    options: Options | None = None,
    held_out: float = 0.5,
    confidence: float = 0.95,
    num_seeds: int = 3,
    seed: int = 0,
    rounds: int = 5,
    lengths: Any = None,
    mask: Any = None,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_part: Callable[[Plan], None] = lambda made: None,
) -> Plan:
    """The cheapest setting of any method whose error stays below a tolerance on heads that were not looked at.

    Every method is measured at a few sizes on part of the key heads, with the queries that ask them (the calibration
    heads). A bound of the error of other heads, from the spread over these and over draws, is fitted against size; the
    smallest size predicted to meet the tolerance is measured in its turn, and the fit made again. What is left of each
    method is measured on the held-out heads with new draws and timed with every exact form, and the cheapest is
    recommended: the fastest, or where only bytes are limited the one that holds the fewest. Exact attention and the
    trivial baselines always take part. The held-out heads choose nothing, so what is said of them is what to expect of
    others like them. With fewer than eight key heads those of each sequence are divided, and with fewer than eight over
    all sequences runs of their queries: `Plan.split` says which.

    Args:
        tensors: query ``[B, T, N, D]``, key ``[B, S, K, D]`` and value ``[B, S, K, Dv]`` in float32.
        tolerance: the relative error of the outputs that is allowed (Frobenius norm, all heads together).
        max_bytes: bytes that may be held per key head and sequence.
        max_seconds: seconds that a call on these tensors may take.
        is_causal: whether query t sees keys j <= t only.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        methods: names in `METHODS`; all that cost less than exact attention by default.
        options: hyper-parameters other than the size, by the name of the method.
        held_out: the share of the heads that is held out.
        confidence: of the bound that a choice rests on.
        num_seeds: draws of random methods, to choose and then to check; at least 2, because one has no spread.
        seed: of the split, and the first draw of the check.
        rounds: how often each candidate is timed, in turn with the others.
        lengths: real tokens of each sequence, integers ``[B]``. No method sees the padding, errors are those of real
            queries alone. Where T differs from S all queries are real.
        mask: true where a key is real, ``[B, S]``, in place of ``lengths`` or with them.
        on_progress: called with what is done next, the number of steps done and their total.
        on_part: called after each method with the plan so far, for those who may be interrupted: it has the bounds,
            and nothing that is checked or timed.

    Returns:
        The `Plan`.

    Raises:
        InputError: a tolerance, budget, share or count out of range, a method that is unknown or has no causal form,
            options that it does not take, lengths or a mask that do not fit.

    Example:
        >>> import jax
        >>> from approx_attention.evaluation import Tensors
        >>> from approx_attention.evaluation import plan
        >>> q, k, v = (0.1 * jax.random.normal(jax.random.key(i), (1, 64, 8, 8)) for i in range(3))
        >>> made = plan(Tensors(q, k, v + 1), tolerance=0.05, max_bytes=1000, methods=["mean_pool"], rounds=1)
        >>> made.pick.label, made.pick.meets
        ('mean_value', True)
    """
    _check_positive("tolerance", tolerance)
    _check_positive("max_bytes", max_bytes)
    _check_positive("max_seconds", max_seconds)
    if not 0.5 <= confidence < 1:
        raise InputError(f"confidence must be at least 0.5 and below 1, got {confidence}")
    check_range("num_seeds", num_seeds, 2, MOST_SEEDS)
    check_range("rounds", rounds, 1, MOST_SEEDS)
    check_range("seed", seed, 0, 2**31 - 1)
    names = list(dict.fromkeys((*BASELINES, *(default_methods(is_causal) if methods is None else methods))))
    kv_mask = key_mask(tensors.key.shape, lengths=lengths, mask=mask)
    taken = {name: check_method(name, is_causal) for name in names if name != "exact"}
    names = list(taken)
    options = check_options(names, options)
    tensors = without_padding(tensors, kv_mask)
    real_queries = query_mask(kv_mask, tensors.query.shape[1])
    split = split_units(tensors.query.shape, tensors.key.shape[2], held_out, seed, real_queries)
    rank_by = "held_bytes" if max_bytes is not None and max_seconds is None else "seconds"
    # What exact attention holds, and every method that keeps all tokens.
    all_bytes = token_bytes(tensors)
    arm_of = functools.cache(
        lambda name, size: method_arm(  # compiled once
            tensors, name, size, is_causal=is_causal, scale=scale, options=options.get(name), kv_mask=kv_mask
        )
    )
    # Options that do not fit are said before anything is measured.
    num_keys = tensors.key.shape[1]
    for name in options:
        arm_of(name, None if get_method(name).size is None else next(iter(_first_sizes(name, num_keys)), 1))
    exact_forms = exact_arms(tensors, is_causal=is_causal, scale=scale, kv_mask=kv_mask)
    bench = _Bench(tensors, exact_forms[0], split)
    if not 0 < bench.exact.sum() < math.inf:
        raise InputError("the outputs of exact attention are all zero or not finite, and no error is relative to that")

    curves: dict[str, Curve] = {}
    proposals: list[tuple[Arm, float, float]] = [(arm, 0.0, 0.0) for arm in exact_forms]

    def candidate(
        proposal: tuple[Arm, float, float],
        errors: UnitErrors | None = None,
        least: float = math.nan,
        fastest_exact: float = math.nan,
    ) -> Candidate:
        arm, predicted, bound = proposal
        held_bytes = arm.held_bytes or all_bytes
        error = math.nan if errors is None else errors.relative(split.held_out)
        return Candidate(
            method=arm.method,
            size=arm.size,
            predicted_error=predicted,
            error_bound=bound,
            held_out_error=error,
            worst_held_out_error=math.nan if errors is None else errors.worst(split.held_out),
            relative_error=math.nan if errors is None else errors.relative(np.arange(len(split.groups))),
            held_bytes=held_bytes,
            compile_seconds=bench.compile_seconds(arm),
            seconds=least,
            speedup=fastest_exact / least,
            is_exact=arm.is_exact,
            # A form of exact attention in few bits has an error too.
            is_predicted=bool((error if arm.is_exact and errors else bound) <= tolerance * ROUNDING),
            in_budget=(max_bytes is None or held_bytes <= max_bytes) and (max_seconds is None or least <= max_seconds),
            meets=bool(error <= tolerance),
        )

    def so_far() -> Plan:
        told = "Interrupted: these are bounds, of which nothing was checked or timed."
        bounded = [candidate(proposal) for proposal in proposals]
        return Plan(tolerance, max_bytes, max_seconds, "held_bytes", confidence, split, bounded, curves, None, told)

    choosing, checking = range(seed + num_seeds, seed + 2 * num_seeds), range(seed, seed + num_seeds)
    for done, name in enumerate(names):
        on_progress(name, done, len(names) + 1)
        if done:
            on_part(so_far())

        def measure(size: int | None, name: str = name) -> tuple[float, float]:
            errors = bench.errors(arm_of(name, size), choosing)
            return errors.relative(split.calibration), errors.bound(split, confidence)

        if get_method(name).size is None:
            proposals.append((arm_of(name, None), *measure(None)))
            continue

        def held(size: int, name: str = name) -> int:
            return arm_of(name, size).held_bytes or all_bytes

        curve = _calibrate(name, num_keys, tolerance, max_bytes, measure, held)
        if curve is None:
            continue
        curves[name] = curve
        sizes: Iterable[int] = curve.measured
        if max_seconds is None:  # else the clock chooses among all that were measured
            sizes = _chosen(
                sizes,
                meets=lambda size, curve=curve: curve.bound.error(size) <= tolerance * ROUNDING,
                fits=lambda size, held=held: max_bytes is None or held(size) <= max_bytes,
            )
        proposals += [(arm_of(name, size), curve.error.error(size), curve.bound.error(size)) for size in sizes]

    on_part(so_far())
    on_progress("timing", len(names), len(names) + 1)
    checked = [bench.errors(arm, checking) for arm, *_ in proposals]
    timings = time_interleaved(
        {str(i): bench.call(arm, seed) for i, (arm, *_) in enumerate(proposals)}, rounds=rounds, patience=60
    )
    seconds = [timing.least for timing in timings.values()]
    fastest_exact = min(time for time, (arm, *_) in zip(seconds, proposals, strict=True) if arm.is_exact)
    candidates = [
        candidate(proposal, errors, least, fastest_exact)
        for proposal, errors, least in zip(proposals, checked, seconds, strict=True)
    ]
    candidates = [
        chosen
        for method in dict.fromkeys(c.method for c in candidates)
        for chosen in _chosen(
            [c for c in candidates if c.method == method], meets=lambda c: c.is_predicted, fits=lambda c: c.in_budget
        )
    ]
    candidates.sort(key=lambda c: (not (c.is_predicted and c.in_budget), _cost(c, rank_by)))
    pick = candidates[0] if candidates[0].is_predicted and candidates[0].in_budget else None
    on_progress("done", len(names) + 1, len(names) + 1)
    made = Plan(tolerance, max_bytes, max_seconds, rank_by, confidence, split, candidates, curves, pick, "")
    return dataclasses.replace(made, verdict=_verdict(made))


class _Bench:
    """Compiled arms on the tensors, and their errors against exact attention by unit."""

    def __init__(self, tensors: Tensors, exact: Arm, split: Split):
        self.tensors, self.split = tensors, split
        self.programs: dict[Arm, tuple[Callable[..., Any], float]] = {}
        self.exact_out = self.call(exact, 0)()[0]
        self.exact = self._by_unit(self.exact_out)

    def _program(self, arm: Arm) -> tuple[Callable[..., Any], float]:
        if arm not in self.programs:
            self.programs[arm] = compile_arm(arm, *self.tensors)
        return self.programs[arm]

    def call(self, arm: Arm, seed: int) -> Callable[[], Any]:
        return functools.partial(self._program(arm)[0], *self.tensors, jax.random.key(seed))

    def compile_seconds(self, arm: Arm) -> float:
        return self._program(arm)[1]

    def errors(self, arm: Arm, seeds: Sequence[int]) -> UnitErrors:
        outs = [self.call(arm, seed)()[0] for seed in (seeds if arm.is_random else seeds[:1])]
        return UnitErrors(np.stack([self._by_unit(out - self.exact_out) for out in outs]), self.exact)

    def _by_unit(self, x: jax.Array) -> np.ndarray:
        """Sums of squares ``[U]`` of ``[B, T, N, Dv]`` by unit."""
        return self.split.sums(np.asarray(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1), np.float64))


def _calibrate(
    name: str,
    num_keys: int,
    tolerance: float,
    max_bytes: int | None,
    measure: Callable[[int], tuple[float, float]],
    held: Callable[[int], int],
) -> Curve | None:
    """Measures a method at a few sizes, where the fit expects the tolerance to be met, and at the most bytes allowed.

    The last only where nothing in the budget meets the tolerance: what comes nearest uses all that it may.
    """
    greatest, first_sizes = _greatest_size(name, num_keys), _first_sizes(name, num_keys)
    if not first_sizes:
        return None
    errors, bounds = {}, {}
    for size in first_sizes:
        errors[size], bounds[size] = measure(size)
    for _ in range(REFINEMENTS):
        size = ErrorLaw.fit(bounds).size(tolerance)
        if size > 2 * greatest:
            break
        # Downwards not far beyond what was measured, in one step.
        size = _round_size(max(size, min(bounds) / 4), greatest)
        if size in bounds:
            break
        errors[size], bounds[size] = measure(size)
    law = ErrorLaw.fit(bounds)
    if max_bytes is not None and not any(
        law.error(size) <= tolerance * ROUNDING and held(size) <= max_bytes for size in bounds
    ):
        sizes = range(2, greatest + 1, 2)
        fitting = bisect.bisect_right(sizes, max_bytes, key=held)
        if fitting and (size := sizes[fitting - 1]) not in bounds:
            errors[size], bounds[size] = measure(size)
    return Curve(dict(sorted(errors.items())), ErrorLaw.fit(errors), ErrorLaw.fit(bounds))


def _greatest_size(name: str, num_keys: int) -> int:
    """Half of the tokens is the most that is worth it, of sizes that count these; others go by their usual."""
    usual = get_method(name).usual_size
    greatest = num_keys // 2 if usual >= 64 else min(8 * usual, num_keys // 2)
    return greatest - greatest % 2


def _first_sizes(name: str, num_keys: int) -> list[int]:
    """The sizes at which a method is measured first; none where there are too few tokens."""
    usual, greatest = get_method(name).usual_size, _greatest_size(name, num_keys)
    if greatest < 2:
        return []
    start = (num_keys / 64, num_keys / 16, num_keys / 4) if usual >= 64 else (usual / 4, usual, 4 * usual)
    return list(dict.fromkeys(_round_size(size, greatest) for size in start))


def _round_size(size: float, greatest: int) -> int:
    """A size of at least this one with three leading bits, and even, for the cosines and sines that come in pairs."""
    size = max(2, math.ceil(size - 1e-9))
    step = max(2, 2 ** (size.bit_length() - 3))
    return min(-(-size // step) * step, greatest)


def _chosen(
    settings: Iterable[_Setting], *, meets: Callable[[_Setting], bool], fits: Callable[[_Setting], bool]
) -> list[_Setting]:
    """The smallest setting that meets the tolerance, and where it is not in the budget the largest that is, if any."""
    settings = list(settings)
    chosen = [setting for setting in settings if meets(setting)][:1]
    if not any(fits(setting) for setting in chosen):
        chosen += ([setting for setting in settings if fits(setting)] or settings[:1])[-1:]
    return list(dict.fromkeys(chosen))


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 < value < 1e30):
        raise InputError(f"{name} must be a positive number, got {value}")


def _cost(candidate: Candidate, rank_by: str) -> tuple[float, float]:
    held, seconds = float(candidate.held_bytes), candidate.seconds
    return (held, seconds) if rank_by == "held_bytes" else (seconds, held)


def _verdict(made: Plan) -> str:
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
            cheapest = min(meeting, key=lambda c: _cost(c, made.rank_by))
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


def plan_table(made: Plan, title: str) -> Table:
    """The candidates as a table for the terminal, the best first and the pick in bold."""
    split = made.split
    padded = "" if split.query_mask is None else f" · {PADDED_FOOTNOTE}"
    table = plain_table(
        title,
        f"chosen on {len(split.calibration)} {split.by}, checked on {len(split.held_out)} others"
        + ("" if split.by == "heads" else f", because key heads are fewer than {LEAST_HEADS}")
        + f" · at most: the bound, with a confidence of {made.confidence:g}, that the choice rests on · held out: "
        "relative error of what was held out · worst: that of the worst of these · held: bytes per key head and "
        f"sequence · than exact: the fastest form of it · {TRIVIAL_FOOTNOTE}{padded}",
        *("method", "size", "predicted", "at most", "held out", "worst", "all", "cache", "time", "than exact", ""),
    )
    trivial = no_better_than_mean(made.candidates)
    for i, candidate in enumerate(made.candidates):
        if candidate.is_predicted:
            remark = "" if candidate.meets else "missed when checked"
        else:
            remark = "bound exceeds the tolerance" if candidate.meets else "misses the tolerance"
        if not candidate.in_budget:
            remark += f"{', ' if remark else ''}over budget"
        table.add_row(
            Text(f"{candidate.method}{TRIVIAL if i in trivial else ''}"),
            "" if candidate.size is None else str(candidate.size),
            *("" if candidate.is_exact else f"{x:.3g}" for x in (candidate.predicted_error, candidate.error_bound)),
            *(f"{x:.3g}" for x in (candidate.held_out_error, candidate.worst_held_out_error, candidate.relative_error)),
            in_units(candidate.held_bytes),
            f"{candidate.seconds * 1e3:.3g} ms",
            times(candidate.speedup, "faster", "slower"),
            remark,
            style="bold" if candidate is made.pick else "" if candidate.is_predicted and candidate.in_budget else "dim",
        )
    return table


def plan_document(made: Plan) -> dict[str, Any]:
    """What the plan rests on, ready for JSON; `compare.report` adds the candidates."""
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


def draw_plan(made: Plan, title: str) -> Any:
    """The figure: error against size with the fit and the bound, and the bound of each candidate against its cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, sharey=True)
    names = dict.fromkeys([*made.curves, *(c.method for c in made.candidates if not c.is_exact)])
    looks = method_styles(names)
    for name, curve in made.curves.items():
        sizes = np.geomspace(min(curve.measured), max(curve.measured), 64)
        color = looks[name]["color"]
        marks = {key: value for key, value in looks[name].items() if key != "color"}
        left.plot(list(curve.measured), list(curve.measured.values()), linestyle="", color=color, markersize=5, **marks)
        left.plot(sizes, [curve.error.error(size) for size in sizes], color=color, linewidth=1)
        left.plot(sizes, [curve.bound.error(size) for size in sizes], color=color, linewidth=0.8, linestyle=":")
    costs = [1e3 * c.seconds if made.rank_by == "seconds" else c.held_bytes / 1024 for c in made.candidates]
    for cost, candidate in zip(costs, made.candidates, strict=True):
        if not candidate.is_exact:
            right.plot(cost, candidate.error_bound, linestyle="", label=candidate.label, **looks[candidate.method])
    exact = min(cost for cost, candidate in zip(costs, made.candidates, strict=True) if candidate.is_exact)
    right.axvline(exact, color="0.4", linestyle="--", label="fastest exact")
    if made.pick is not None and not made.pick.is_exact:
        star = {"linestyle": "", "marker": "*", "markersize": 18, "markerfacecolor": "none", "color": "black"}
        right.plot(costs[made.candidates.index(made.pick)], made.pick.error_bound, label="pick", **star)
        if made.pick.size is not None:
            left.plot(made.pick.size, made.pick.error_bound, **star)
    for axes in (left, right):
        axes.axhline(made.tolerance, color="#D55E00", linewidth=1)
    left.set(xlabel="size (line: fit, dotted: bound for unseen heads)", ylabel="relative error of the output")
    what = "time of a call (ms)" if made.rank_by == "seconds" else "cache per key head and sequence (KiB)"
    right.set(xlabel=f"{what}; the bound of each candidate")
    for axes in (left, right):
        log_scales(axes)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure
