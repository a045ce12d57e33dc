"""Whether an accelerator that is not there can run the programs of the scale ``gpu``: compiled ahead of time."""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.ahead_of_time import CHIPS, Platform
from benchmarks.compiled import COMPILERS, compile_each
from experiments.programs import MEMORY, Case, has_programs, programs
from experiments.studies import Run, every_study, read_study

# What decides how a program is compiled, besides the settings of its study.
SOURCES = ("approx_attention", "experiments/models.py", "experiments/training.py")


def cases(platform: Platform, studies: Iterable[str]) -> Iterator[Case]:
    """The programs of studies."""
    for name in studies:
        study = read_study(name, "gpu")
        for configuration in study.configurations:
            run = Run.of(study, configuration, study.seeds[0], {})
            for program in programs(study.module, run.config):
                yield Case(platform, name, configuration, program, run.fingerprint)


def measure(
    platform: Platform,
    python: pathlib.Path,
    library: pathlib.Path,
    known: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
    *,
    studies: Sequence[str] = (),
    limit: float = 900.0,
    again: bool = False,
) -> None:
    """Compiles the programs of some studies, by default of all; the other arguments are those of `compile_each`."""
    about, every = {"platform": platform, "chip": CHIPS[platform]}, every_study("gpu")
    studies = studies or every
    # What is known of other studies stays in the document.
    others = [Case(**row["case"]) for row in known.get("rows", []) if row["case"]["study"] in {*every} - {*studies}]
    compile_each(
        itertools.chain(others, cases(platform, studies)),
        about,
        python,
        library,
        known,
        write,
        module="experiments.programs",
        sources=SOURCES,
        packages=("optax",),
        is_chosen=lambda case: case.study in studies,
        limit=limit,
        again=again,
    )


def faults(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What stands against each program that does not compile, or does not fit."""
    found = []
    for row in rows:
        most = MEMORY[row["case"]["platform"]]
        if "error" in row:
            found.append(f"{Case(**row['case'])}: {row['error']}")
        elif row["bytes"] > most:
            found.append(f"{Case(**row['case'])}: {row['bytes'] / 2**30:.1f} GiB, more than {most / 2**30:.1f} GiB")
    return found


def unchecked(studies: Sequence[str] = ()) -> list[str]:
    """The studies of which no program is known: they train nothing and name none."""
    return [name for name in studies or every_study("gpu") if not has_programs(read_study(name, "gpu").module)]


def section(document: Mapping[str, Any]) -> str:
    """What the pages of results say of a document of `measure`."""
    rows, platform = document["rows"], document["platform"]
    bad, names = faults(rows), dict.fromkeys(row["case"]["study"] for row in rows)
    compiler = COMPILERS[platform]
    largest = max((row["bytes"] for row in rows if "error" not in row), default=0)
    said = (
        f"Compiled for one {document['chip']} ({compiler} {document['environment'][compiler]}), of which nothing has "
        f"run: {len(rows) - len(bad)} of {len(rows)} programs of {len(names)} studies compile and fit into "
        f"{MEMORY[platform] / 2**30:.1f} GiB; the largest takes {largest / 2**30:.1f} GiB."
    )
    if stale := sum(row["code"] != document["code"] for row in rows):
        said += f" Programs that were compiled from earlier code than the rest: {stale}."
    return "\n".join([said, *([""] if bad else []), *(f"- {fault}" for fault in bad)])
