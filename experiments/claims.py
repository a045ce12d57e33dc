"""Claims of papers, the figures they are judged by, and what became of them."""

import dataclasses
import math
import pathlib
import reprlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments.config import STRICT, ConfigError, ConfigFile, Number, load_yaml, read_config_file, resolve
from experiments.runs import CONFIGS, results_of, run_directory

# The most telling scale first; a claim's verdict comes from the first of them whose study is complete.
SCALES = ("gpu", "cpu")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure in the results of one arm, by its dotted place in them."""

    arm: str
    value: str

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class Against:
    """The figure that a metric is measured against."""

    arm: str
    value: str
    by: Literal["ratio", "difference"]

    __pydantic_config__ = STRICT


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
class Caveat:
    """What must hold in the study before its figures say much, and what to say where it does not."""

    metric: Metric
    within: Range
    says: str
    against: Against | None = None

    __pydantic_config__ = STRICT


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says, where, which study tests it, and the ranges in which the figure decides for it.

    Attributes:
        reproduced: the range in which the claim holds as stated.
        ordering: the wider range in which only its direction does: of a difference on one side of 0, of a ratio of 1.
        caveat: what else must hold; where it does not, the report says so, and nothing counts as reproduced.
        tried: what was done to see the claim hold, where it does not.
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
    caveat: Caveat | None = None
    tried: str = ""

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.ordering is not None and self.against is not None:
            even = 1 if self.against.by == "ratio" else 0
            if self.ordering.at_least < even < self.ordering.at_most:
                raise ValueError(
                    f"the ordering of a {self.against.by} must lie on one side of {even}, got {self.ordering}"
                )


Verdict = Literal["reproduced", "ordering only", "inconclusive", "not reproduced", "not run"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim with what was measured, the mean and half of its 95 % interval, and the verdict."""

    claim: Claim
    measured: tuple[float, float] | None
    scale: str
    device: str
    num_seeds: int
    verdict: Verdict
    caveat: str = ""


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
        parts = [part for part in (claim, claim.caveat) if part]
        for side in (side for part in parts for side in (part.metric, part.against) if side):
            for scale in SCALES:
                config = CONFIGS / claim.study / f"{scale}.yaml"
                if side.arm not in [arm.name for arm in read_config_file(config).arms]:
                    raise ConfigError(f"{path.name}, claim {claim.id!r}: {config} has no arm {side.arm!r}")
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise ConfigError(f"{path.name} has the id {name!r} {ids.count(name)} times")
    return claims


def judge(claim: Claim, results: pathlib.Path) -> Finding:
    """The verdict on a claim, from the results of the first scale that is complete."""
    for scale in SCALES:
        path = CONFIGS / claim.study / f"{scale}.yaml"
        if not path.exists():
            continue
        file = read_config_file(path)
        runs = {(run["arm"], run["seed"]): run for run in results_of(file, results)}
        parts = [part for part in (claim, claim.caveat) if part]
        arms = {side.arm for part in parts for side in (part.metric, part.against) if side}
        if any((arm, seed) not in runs for arm in arms for seed in file.seeds):
            continue
        figures = [_measure(claim, runs, seed, file, results) for seed in file.seeds]
        mean, half_width = statistics.fmean(figures), _half_width(claim, figures, runs, file.seeds)
        verdict, band = _verdict(claim, mean)
        caveats = []
        if math.isnan(mean):
            caveats.append("a run diverged")
        elif band is not None and not all(mean + side * half_width in band for side in (-1, 1)):
            caveats.append("the interval of the figure reaches beyond what this verdict asks")
        if claim.caveat is not None:
            found = statistics.fmean(_measure(claim.caveat, runs, seed, file, results) for seed in file.seeds)
            if found not in claim.caveat.within:
                caveats.append(f"{claim.caveat.says} ({found:.3g}, asked {claim.caveat.within})")
                verdict = "not reproduced" if verdict == "not reproduced" else "inconclusive"
        devices = {device_name(runs[arm, seed]["environment"]): None for arm in sorted(arms) for seed in file.seeds}
        device = " and ".join(devices)
        return Finding(claim, (mean, half_width), scale, device, len(figures), verdict, "; ".join(caveats))
    return Finding(claim, None, "", "", 0, "not run")


def _verdict(claim: Claim, figure: float) -> tuple[Verdict, Range | None]:
    """The verdict on a figure, with the range that it lies in."""
    if figure in claim.reproduced:
        return "reproduced", claim.reproduced
    if claim.ordering is not None and figure in claim.ordering:
        return "ordering only", claim.ordering
    return "not reproduced", None


def _half_width(claim: Claim, figures: Sequence[float], runs: Mapping[tuple[str, int], Any], seeds: Any) -> float:
    """Half of the 95 % interval of the mean: over seeds, or that of a fitted figure where there is one seed."""
    if not all(map(math.isfinite, figures)):
        return 0.0
    if len(figures) > 1:
        from scipy import stats

        return float(stats.t.ppf(0.975, len(figures) - 1)) * statistics.stdev(figures) / math.sqrt(len(figures))
    place, _, last = claim.metric.value.rpartition(".")
    fitted = last == "value" and claim.against is None
    return _at(runs[claim.metric.arm, seeds[0]]["result"], f"{place}.half_width") if fitted else 0.0


def _measure(
    claim: Claim | Caveat, runs: Mapping[tuple[str, int], Any], seed: int, file: ConfigFile, results: pathlib.Path
) -> float:
    def figure(side: Metric | Against) -> float:
        try:
            return _at(runs[side.arm, seed]["result"], side.value)
        except ConfigError as error:
            path = run_directory(file, side.arm, seed, results) / "result.json"
            raise ConfigError(
                f"{path}: {error}; if that is no slip in the claim, remove the file, and the run is done again"
            ) from None

    own = figure(claim.metric)
    if claim.against is None:
        return own
    base = figure(claim.against)
    if claim.against.by == "difference":
        return own - base
    return own / base if base else math.nan


def _at(result: Any, place: str) -> float:
    """The figure at a dotted place; where there is none, as for a break-even never reached, infinity."""
    rest = place
    while rest:
        if result is None:  # a slope of too few points
            return math.nan
        # A name may hold dots itself, as 0.5 does.
        names = list(result) if isinstance(result, dict) else []
        name = max((name for name in names if f"{rest}.".startswith(f"{name}.")), key=len, default=None)
        if name is None:
            raise ConfigError(f"the results have nothing at {place!r}: {rest!r} is not among {', '.join(names)}")
        result, rest = result[name], rest[len(name) + 1 :]
    if not isinstance(result, int | float | None) or isinstance(result, bool):
        raise ConfigError(f"the results have no number at {place!r} but {reprlib.repr(result)}")
    return math.inf if result is None else float(result)


def device_name(environment: Mapping[str, Any]) -> str:
    """The processor or accelerator of a run."""
    return environment["processor"] if environment["backend"] == "cpu" else environment["device"]
