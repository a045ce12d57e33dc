"""The pages of results: what was claimed, what was measured, and whether it holds; no figure is typed by hand."""

import contextlib
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from approx_attention.evaluation import figure_style, markdown_table, write_atomically
from experiments.check import section
from experiments.claims import SCALES, Claim, Finding, Verdict, device_name, judge, read_claims
from experiments.config import ConfigError, checked, load_yaml
from experiments.results import Result, frame
from experiments.show import code, count, markdown
from experiments.studies import Places, Study, every_study, read_study

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


# A study with the runs that are shown of it.
Shown = tuple[Study, Sequence[Result]]


def pages(root: pathlib.Path) -> dict[str, str]:
    """The texts of RESULTS.md, of the page of each family and of verdicts.json, by file name.

    Everything follows from claims.yaml, stories.yaml and results/ under ``root``.
    """
    places = Places(root / "results", root)
    findings = [judge(claim, places) for claim in read_claims(root / "claims.yaml")]
    stories = _stories(root / "stories.yaml", findings)
    shown = list(studies(places))
    families = list(dict.fromkeys([*(study.family for study, _ in shown), *(_family(f) for f in findings)]))
    compiled = [section(json.loads(path.read_text())) for path in compiled_files(root)]
    texts = {"RESULTS.md": _front(findings, stories, shown, families, never_run(places), compiled)}
    for family in families:
        own = [finding for finding in findings if _family(finding) == family]
        parts = [
            f"# {family.replace('_', ' ').capitalize()}",
            stories.get(family, ""),
            *_verdicts(own),
        ]
        for one in shown:
            if one[0].family == family:
                with _naming_the_file(one, places):
                    parts += _study(*one)
        texts[f"{family}/RESULTS.md"] = "\n\n".join(filter(None, parts)) + "\n"
    texts["verdicts.json"] = json.dumps([_plain(finding) for finding in findings], indent=1) + "\n"
    return texts


def write(root: pathlib.Path) -> list[pathlib.Path]:
    """Writes the pages and the plots under ``root``; returns the files."""
    places = Places(root / "results", root)
    written = []
    (root / "plots").mkdir(exist_ok=True)
    for shown in studies(places):
        study, results = shown
        with _naming_the_file(shown, places), figure_style():
            figure, place = study.module.figure(frame(results)), root / "plots" / _plot(study)
            write_atomically(place, lambda out, figure=figure: figure.savefig(out, format="png"))
        written.append(place)
    for name, text in pages(root).items():
        (root / name).parent.mkdir(exist_ok=True)
        write_atomically(root / name, lambda out, text=text: out.write(text.encode()))
        written.append(root / name)
    return written


def studies(places: Places) -> Iterable[Shown]:
    """The studies that have results, each at the first of the scales that has."""
    having = {scale: every_study(scale) for scale in SCALES}
    for name in sorted({name for names in having.values() for name in names}):
        for scale in (scale for scale in SCALES if name in having[scale]):
            study = read_study(name, scale)
            if results := study.results(places):
                yield study, results
                break


def never_run(places: Places) -> dict[str, list[str]]:
    """The studies that have no result, by scale."""
    return {
        scale: [name for name in every_study(scale) if not read_study(name, scale).results(places)] for scale in SCALES
    }


def compiled_files(root: pathlib.Path) -> list[pathlib.Path]:
    """What `python -m experiments check` found for each platform that it was asked for."""
    return sorted((root / "results").glob("compiled_*.json"))


def _stories(path: pathlib.Path, findings: Sequence[Finding]) -> dict[str, str]:
    """The sentences of each page, with the measured figure of a claim in place of ``{id}``."""
    known = {finding.claim.id: finding for finding in findings}

    def measured(found: re.Match[str]) -> str:
        finding = known.get(found[1])
        if finding is None:
            raise ConfigError(f"{path} has {found[0]}, and no claim has this id; the ids are {', '.join(known)}")
        return _figure(finding) or f"({finding.verdict})"

    told = checked(dict[str, str], load_yaml(path), f"{path}")
    return {name: re.sub(r"\{([^{}]*)\}", measured, text) for name, text in told.items()}


def _family(finding: Finding) -> str:
    return finding.claim.study.partition("/")[0]


def _front(
    findings: Sequence[Finding],
    stories: Mapping[str, str],
    shown: Sequence[Shown],
    families: Sequence[str],
    unrun: Mapping[str, Sequence[str]],
    compiled: Sequence[str],
) -> str:
    every = [result for _, results in shown for result in results]
    of_papers = [finding for finding in findings if finding.claim.of_a_paper]
    decided = sum(finding.verdict in ("reproduced", "not reproduced") for finding in of_papers)
    added = [study.name for study, _ in shown if study.added_seeds]
    hours = sum(result.seconds for result in every) / 3600
    counts = {family: Counter(f.verdict for f in findings if _family(f) == family) for family in families}
    parts = [
        "# Claims and verdicts",
        stories["front"],
        "Generated by `python -m experiments report` from `experiments/claims.yaml`, `experiments/stories.yaml` and "
        "`experiments/results/`; do not edit. A claim is *reproduced* if the whole 95 % interval of its figure lies in "
        "the range that was written before the runs (unless its notes say otherwise), *suggested* if a part of it does "
        "or if one run without an interval does, *not reproduced* if none does. It has *no ground* if what must hold "
        "before it can be decided does not, or if one run without an interval lies outside the range, and it is *not "
        "run* without a complete set of runs. Figures are means over seeds ± half of their 95 % interval, or with one "
        "seed of that of a fit, or of the trials of which the figure is the median. "
        f"The {len(every)} runs took {hours:.1f} hours.",
        f"Of the {len(findings)} claims, {len(of_papers)} are those of papers, and {decided} of these are decided "
        f"(reproduced or not): {100 * decided / max(1, len(of_papers)):.0f} %. The others are targets, checks and "
        "derivations of this library.",
        f"In {count(len(added), 'study', 'studies')} seeds were added after results had been seen, so that the "
        f"intervals there contain the mean in fewer than 95 % of cases: {', '.join(added) or 'none'}.",
        markdown_table(
            ["family", *VERDICTS],
            [
                [f"[{family}]({family}/RESULTS.md)", *(str(by[kind]) for kind in VERDICTS)]
                for family, by in counts.items()
            ],
        ),
    ]
    for family in families:
        if own := [finding for finding in findings if _family(finding) == family]:
            parts += [f"## {family.replace('_', ' ').capitalize()}", _claims_table(own)]
    parts.append("## Never run")
    for scale, names in unrun.items():
        waiting = ", ".join(code(f"configs/{name}.yaml") for name in names)
        parts.append(f"The scale {code(scale)} of these studies has no result: {waiting or 'none'}.")
    parts += compiled
    parts += [f"## {name.capitalize()}\n\n{stories[name]}" for name in ("not done", "dropped") if name in stories]
    return "\n\n".join(parts) + "\n"


def _verdicts(findings: Sequence[Finding]) -> list[str]:
    """The claims of a family with their verdicts, and then who claims what, where, and what was tried."""
    if not findings:
        return []
    notes = [[str(n), _source(finding.claim), _notes(finding)] for n, finding in enumerate(findings, 1)]
    return [
        "## Verdicts",
        _claims_table(findings),
        "In this table, ± is half of the 95 % interval: over seeds, or of the fit if there is one seed. In the tables "
        "of the studies below, it is one standard deviation over seeds, and with one seed half of the 95 % interval of "
        "a fit.",
        "## Sources and notes",
        markdown(["", "source and its claim", "notes"], notes),
    ]


def _claims_table(findings: Sequence[Finding]) -> str:
    rows = [
        [str(n), _said(finding), finding.claim.statement, _figure(finding), _wanted(finding.claim)]
        for n, finding in enumerate(findings, 1)
    ]
    return markdown(["", "verdict", "claim", "measured", "range"], rows)


def _source(claim: Claim) -> str:
    return f"{claim.paper}: {claim.where}; {claim.claimed}"


def _notes(finding: Finding) -> str:
    claim, added = finding.claim, finding.study.added_seeds if finding.study else ""
    notes = [finding.grounds and f"ground: {finding.grounds}", claim.moved and f"on the range: {claim.moved}"]
    notes += [added and f"seeds added: {added}"]
    notes += [f"tried: {claim.tried}" if claim.tried and finding.verdict != "reproduced" else ""]
    return "; ".join(filter(None, notes))


def _figure(finding: Finding) -> str:
    if finding.measured is None:
        return ""
    mean, half = finding.measured
    if math.isinf(mean):
        return "not reached"
    if not half or not math.isfinite(half):
        return f"{mean:.0f}" if abs(mean) >= 1000 else f"{mean:.3g}"
    # Both to at least two digits of the interval.
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}" if decimals < 6 else f"{mean:.3g} ± {half:.2g}"


def _wanted(claim: Claim) -> str:
    against = claim.against
    if against and against.by == "gap":
        return f"{claim.reproduced} (of the gap between {against} and {against.to})"
    return f"{claim.reproduced}" + (f" ({against.by} to {against})" if against else "")


def _said(finding: Finding) -> str:
    said = f"**{finding.verdict}**"
    if finding.ordering is not None and finding.ordering != finding.verdict:
        said += f"; direction {finding.ordering}"
    return said


def _plain(finding: Finding) -> dict[str, Any]:
    """A finding as the site reads it."""
    claim = finding.claim
    mean, half = (x if math.isfinite(x) else None for x in finding.measured or (math.nan, math.nan))
    return {
        "id": claim.id,
        "family": _family(finding),
        "study": claim.study,
        "statement": claim.statement,
        "paper": claim.paper,
        "range": str(claim.reproduced),
        "mean": mean,
        "half_width": half,
        "verdict": finding.verdict,
        "ordering": finding.ordering,
        "scale": finding.study.scale if finding.study else None,
        "seeds": finding.num_seeds,
        "machines": list(finding.machines),
    }


def _plot(study: Study) -> str:
    """The file name of its figure."""
    return f"{study.name.replace('/', '-')}.png"


def _study(study: Study, results: Sequence[Result]) -> Iterable[str]:
    """One study: its setting, its tables, and its figure."""
    machine, total = results[0].machine, len(study.configurations) * len(study.seeds)
    devices = " and ".join(dict.fromkeys(device_name(result.machine) for result in results))
    minutes = round(sum(result.seconds for result in results) / 60)
    without = [name for name in study.configurations if not any(result.configuration == name for result in results)]
    lacking = f"; none of {', '.join(map(code, without))}" if without else ""
    incomplete = "" if len(results) == total else f" Incomplete: {len(results)} of {total} runs{lacking}."
    yield f"## {study.name}"
    yield (
        f"{study.about} {devices}, {machine['processor_cores']} cores, Python {machine['python']}, jax "
        f"{machine['jax']}; {count(len(study.seeds), 'seed')}, {count(minutes, 'minute')} in all.{incomplete}"
    )
    yield from study.module.table(frame(results))
    yield f"![{study.name}](../plots/{_plot(study)})"


# What is raised over records that lack a key, or hold something of another kind.
_LACKS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@contextlib.contextmanager
def _naming_the_file(shown: Shown, places: Places) -> Iterator[None]:
    """Where records cannot be shown: the file, and the first run without which the others can."""
    study, results = shown
    try:
        _check_alike(results)
        yield
    except ConfigError:
        raise
    except _LACKS as error:
        at_fault = next((r for r in results if _is_shown(study, [x for x in results if x is not r])), None)
        where = "" if at_fault is None else f", {at_fault.configuration!r} with seed {at_fault.seed}"
        path = places.results / f"{study.name}.jsonl"
        raise ConfigError(
            f"{path}{where}: its records cannot be shown; remove the line, and the run is done again "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_alike(results: Sequence[Result]) -> None:
    """Raises ``LookupError`` if runs of one configuration differ in their records: means would leave some out."""
    for name in dict.fromkeys(result.configuration for result in results):
        kinds = Counter(frozenset(map(tuple, result.records)) for result in results if result.configuration == name)
        if len(kinds) > 1:
            keys = set.symmetric_difference(*(set().union(*kind) for kind in list(kinds)[:2]))
            raise LookupError(f"runs of {name!r} have different records: {', '.join(sorted(keys)) or 'their order'}")


def _is_shown(study: Study, results: Sequence[Result]) -> bool:
    try:
        _check_alike(results)
        list(_study(study, results))
        study.module.figure(frame(results))
    except _LACKS:
        return False
    return True
