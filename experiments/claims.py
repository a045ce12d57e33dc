"""Claims of papers, the figures that decide them, and the verdicts."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments.config import STRICT, ConfigError, Number, load_yaml, resolve
from experiments.results import Result, figure_of
from experiments.studies import COMMITTED, Places, Study, has_scale, read_study

# The most telling scale first; a verdict comes from the first whose runs are complete.
SCALES = ("gpu", "cpu")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number in the records of one configuration.

    Attributes:
        configuration: its name.
        figure: the key of the number.
        where: further keys of its record, and their values.
    """

    figure: str
    configuration: str = "run"
    where: dict[str, Any] = dataclasses.field(default_factory=dict)

    __pydantic_config__ = STRICT

    @property
    def uses(self) -> tuple[str, ...]:
        """The configurations whose runs it reads."""
        return (self.configuration,)

    def __str__(self) -> str:
        of = ", ".join(str(value) for value in self.where.values())
        return f"{self.configuration}: {of}" if of and self.configuration != "run" else of or self.configuration


@dataclasses.dataclass(frozen=True)
class Against(Metric):
    """The number that a metric is compared with, seed by seed; by ``deviations``, with all seeds together.

    Attributes:
        by: how; a ``gap`` is the difference in units of that of the configuration ``to``.
        to: see there.
    """

    by: Literal["ratio", "difference", "deviations", "gap"] = "difference"
    to: str = ""

    def __post_init__(self) -> None:
        if (self.by == "gap") != bool(self.to):
            raise ValueError(
                f"a gap, and nothing else, is to another configuration, got by={self.by!r}, to={self.to!r}"
            )

    @property
    def uses(self) -> tuple[str, ...]:
        return (self.configuration, self.to) if self.to else (self.configuration,)


@dataclasses.dataclass(frozen=True)
class Range:
    """Where a figure must lie."""

    at_least: Number = -math.inf
    at_most: Number = math.inf

    __pydantic_config__ = STRICT

    def __contains__(self, figure: float) -> bool:
        return self.at_least <= figure <= self.at_most

    def __str__(self) -> str:
        if math.isinf(self.at_most):
            return f"at least {self.at_least:g}"
        return f"at most {self.at_most:g}" if math.isinf(self.at_least) else f"{self.at_least:g} to {self.at_most:g}"


@dataclasses.dataclass(frozen=True)
class Ground:
    """What must hold before a claim can be decided at all, such as exact attention ahead of a local window."""

    metric: Metric
    within: Range
    says: str
    against: Against | None = None

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, where it stands, and what decides it.

    Attributes:
        reproduced: the range in which the claim holds as stated.
        ordering: the wider range in which its direction does: of a difference one side of 0, of a ratio of 1.
        ground: what must hold besides.
        tried: what was done to see the claim hold, where it does not.
        moved: why a range was changed after its runs, if one was.
        certain: the figure depends on no seed and no clock, so that one run decides.
    """

    id: str
    paper: str
    where: str
    statement: str
    claimed: str
    study: str
    metric: Metric
    reproduced: Range
    against: Against | None = None
    ordering: Range | None = None
    ground: list[Ground] = dataclasses.field(default_factory=list)
    tried: str = ""
    moved: str = ""
    certain: bool = False

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.ordering is not None and self.against is not None:
            even = 1 if self.against.by in ("ratio", "gap") else 0
            if self.ordering.at_least < even < self.ordering.at_most:
                raise ValueError(
                    f"the ordering of a {self.against.by} must lie on one side of {even}, got {self.ordering}"
                )

    @property
    def of_a_paper(self) -> bool:
        """Whether a paper claims it; else it is a target, a check or a derivation of this library."""
        return not self.paper.startswith("none")

    @property
    def parts(self) -> list["Claim | Ground"]:
        """The claim and its grounds: each has a metric, and may have one that it is compared with."""
        return [self, *self.ground]


# The whole 95 % interval lies in the range; a part of it; none of it; nothing can be decided; no complete set of runs.
Verdict = Literal["reproduced", "suggested", "not reproduced", "no ground", "not run"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim with the mean over seeds, half of its 95 % interval, and the verdicts.

    Attributes:
        verdict: on the range of the claim.
        ordering: on its direction, where the claim has one.
        grounds: what is missing, where there is no ground.
    """

    claim: Claim
    verdict: Verdict
    ordering: Verdict | None = None
    measured: tuple[float, float] | None = None
    study: Study | None = None
    machines: tuple[str, ...] = ()
    num_seeds: int = 0
    grounds: str = ""


def read_claims(path: pathlib.Path) -> list[Claim]:
    """The claims on file.

    Raises:
        ConfigError: a record lacks a key, has an unknown one, or shares its id with another.
    """
    records = load_yaml(path)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ConfigError(f"{path} must be a list of claims, each a mapping")
    claims = [resolve(Claim, record, {}, f"{path.name}, claim {record.get('id')!r}") for record in records]
    for claim in claims:
        study = read_study(claim.study, "cpu")
        known = study.configurations
        for part in claim.parts:
            if part.against is not None and part.against.by == "deviations" and len(study.seeds) < 2:
                raise ConfigError(
                    f"{path.name}, claim {claim.id!r}: deviations over seeds need two seeds or more, and {claim.study} "
                    f"has {len(study.seeds)}"
                )
            for side in (part.metric, part.against):
                for name in () if side is None else side.uses:
                    if name not in known:
                        raise ConfigError(
                            f"{path.name}, claim {claim.id!r}: {claim.study} has no configuration {name!r}"
                        )
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise ConfigError(f"{path.name} has the id {name!r} {ids.count(name)} times")
    return claims


def judge(claim: Claim, places: Places = COMMITTED) -> Finding:
    """The verdict on a claim, from the results of the first scale that is complete."""
    for scale in SCALES:
        if not has_scale(claim.study, scale):
            continue
        study = read_study(claim.study, scale)
        runs = {(result.configuration, result.seed): result for result in study.results(places)}
        sides = [side for part in claim.parts for side in (part.metric, part.against) if side is not None]
        used = {name for side in sides for name in side.uses}
        if any((name, seed) not in runs for name in used for seed in study.seeds):
            continue
        figures = Figures(runs, study, places)
        values = figures.compared(claim)
        mean, half = _mean(values), _half_width(claim, values, figures)
        missing = [text for ground in claim.ground if (text := _missing(ground, figures))]
        if math.isnan(mean):
            missing.append("a run diverged")
        ordering = None if claim.ordering is None else _verdict(claim.ordering, values, mean, half)
        verdict = _verdict(claim.reproduced, values, mean, half)
        if len(values) == 1 and not half and not claim.certain:
            # One run suggests, and refutes nothing.
            if verdict == "not reproduced":
                missing.append("one run outside the range, without an interval")
            verdict, ordering = (_at_most_suggested(found) for found in (verdict, ordering))
        if missing:
            verdict, ordering = "no ground", None if ordering is None else "no ground"
        machines = dict.fromkeys(device_name(runs[n, seed].machine) for n in sorted(used) for seed in study.seeds)
        return Finding(claim, verdict, ordering, (mean, half), study, tuple(machines), len(values), "; ".join(missing))
    return Finding(claim, "not run")


@dataclasses.dataclass(frozen=True)
class Figures:
    """The runs of a study, by configuration and seed."""

    runs: Mapping[tuple[str, int], Result]
    study: Study
    places: Places

    def of(self, side: Metric) -> list[float]:
        """A number over seeds."""
        values = []
        for seed in self.study.seeds:
            try:
                values.append(figure_of(self.runs[side.configuration, seed].records, side.figure, side.where))
            except ConfigError as error:
                path = self.places.results / f"{self.study.name}.jsonl"
                raise ConfigError(f"{path}: {side.configuration}, seed {seed}: {error}") from None
        return values

    def compared(self, part: Claim | Ground) -> list[float]:
        """The number of a part, or its ratio to or difference from another, over seeds."""
        own = self.of(part.metric)
        if part.against is None:
            return own
        base = self.of(part.against)
        if part.against.by == "gap":
            other = self.of(dataclasses.replace(part.metric, configuration=part.against.to))
            return [(x - y) / (z - y) if z != y else math.nan for x, y, z in zip(own, base, other, strict=True)]
        by: Callable[[float, float], float] = {
            "ratio": lambda x, y: x / y if y else math.nan,
            "difference": lambda x, y: x - y,
            "deviations": lambda x, y: _deviations(own, base),
        }[part.against.by]
        return [by(x, y) for x, y in zip(own, base, strict=True)]


def _mean(values: Sequence[float]) -> float:
    """The mean; NaN where there is none, as of plus and minus infinity."""
    return math.nan if {math.inf, -math.inf} <= {*values} else statistics.fmean(values)


def _deviations(own: Sequence[float], base: Sequence[float]) -> float:
    """The difference of two means in units of the larger deviation over seeds; NaN if a run diverged."""
    if not all(map(math.isfinite, [*own, *base])):
        return math.nan
    difference = statistics.fmean(own) - statistics.fmean(base)
    if difference == 0:
        return 0.0
    deviation = max(statistics.stdev(x) for x in (own, base)) if len(own) > 1 else math.nan
    return difference / deviation if deviation else math.copysign(math.inf, difference)


def _missing(ground: Ground, figures: Figures) -> str:
    found = _mean(figures.compared(ground))
    return "" if found in ground.within else f"{ground.says} ({found:.3g}, needed {ground.within})"


def _verdict(band: Range, values: Sequence[float], mean: float, half: float) -> Verdict:
    low, high = mean - half, mean + half
    if math.isinf(mean):
        # No interval: one infinite number hides all others, so each counts for itself.
        low, high = min(values), max(values)
    if low in band and high in band:
        return "reproduced"
    return "suggested" if low <= band.at_most and high >= band.at_least else "not reproduced"


def _at_most_suggested(verdict: Any) -> Any:
    return "suggested" if verdict == "reproduced" else verdict


def _half_width(claim: Claim, values: Sequence[float], figures: Figures) -> float:
    """Half of the 95 % interval of the mean: over seeds, or with one seed that of a fit, or over its trials."""
    if not all(map(math.isfinite, values)):
        return 0.0
    if len(values) > 1:
        return _half_of_students_t(values)
    fit = dataclasses.replace(claim.metric, figure=f"{claim.metric.figure}_half_width")
    records = figures.runs[fit.configuration, figures.study.seeds[0]].records
    if claim.against is not None:
        return 0.0
    if any(fit.figure in record for record in records):
        return figures.of(fit)[0]
    # The interval of independent trials, if their median is the figure.
    known = claim.metric.where.items() | {(claim.metric.figure, values[0])}
    own = next(record for record in records if known <= record.items())
    trials = own.get("trials")
    if not isinstance(trials, list) or len(trials) < 2:
        return 0.0
    numbers = [math.nan if x is None else x for x in trials]
    if not all(map(math.isfinite, numbers)) or statistics.median(numbers) != values[0]:
        return 0.0
    return _half_of_students_t(numbers)


def _half_of_students_t(values: Sequence[float]) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def device_name(machine: Mapping[str, Any]) -> str:
    """The processor or accelerator of a run."""
    return machine["processor"] if machine["backend"] == "cpu" else machine["device"]
