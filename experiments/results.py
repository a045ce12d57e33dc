"""Results of a study: one line of JSON for each run, with its records."""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pydantic

from approx_attention.evaluation import write_atomically
from experiments.config import STRICT, ConfigError, NonNegative, Seed, adapter_of, first_fault
from experiments.run_files import as_line, locked

# A record is flat: numbers, names, and lists of numbers where one record holds a curve. None is no number: what is NaN
# when it is measured is None once it is on file.
Value = str | bool | int | float | None | list[float] | list[float | None]
Record = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one run, a line of the file of its study.

    Attributes:
        scale: see `studies.SCALES`.
        configuration: its name.
        seed: of the run.
        settings: fingerprint of the settings, by which a run that is done is recognised.
        version: of the code, as git names it.
        machine: device and versions.
        seconds: that it took.
        records: what was measured, in flat records; those of one kind have the same keys.
    """

    scale: str
    configuration: str
    seed: Seed
    settings: str
    version: str
    machine: dict[str, Any]
    seconds: NonNegative
    records: list[Record]

    __pydantic_config__ = STRICT


# A `pandas.DataFrame` of records: its types know nothing of the columns, and so check nothing here.
Frame = Any


def frame(results: Sequence[Result]) -> Frame:
    """The records of all runs, with their configuration and seed, and NaN where there is no number."""
    return pd.DataFrame(
        [
            {"configuration": result.configuration, "seed": result.seed, **_with_nan(record)}
            for result in results
            for record in result.records
        ]
    )


def _with_nan(record: Record) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in record.items()}


@dataclasses.dataclass(frozen=True)
class ResultFile:
    """The file with the results of a study, one in a line; it is written whole or not at all."""

    path: pathlib.Path

    def read(self) -> list[Result]:
        """All results.

        Raises:
            ConfigError: the file cannot be read, or a line is no result.
        """
        try:
            stamp = self.path.stat()
            return _read(self.path, stamp.st_mtime_ns, stamp.st_size)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from None

    def find(self, scale: str, configuration: str, seed: int) -> Result | None:
        """The result of one run, if it is there."""
        wanted = (scale, configuration, seed)
        return next((x for x in self.read() if (x.scale, x.configuration, x.seed) == wanted), None)

    def add(self, result: Result) -> Result:
        """Adds a result, and gives it as it is read from then on; other processes may add theirs at the same time.

        Raises:
            ConfigError: the file cannot be used, another process holds it, or the result is none that could be read.
        """
        try:
            added = _parsed(as_line(dataclasses.asdict(result)))
        except (pydantic.ValidationError, TypeError) as error:
            said = first_fault(error, "the result") if isinstance(error, pydantic.ValidationError) else error
            raise ConfigError(f"{self.path} cannot hold this result ({said})") from None
        with locked(self.path.with_suffix(".lock"), self.path, patience=60):
            text = "".join(as_line(dataclasses.asdict(line)) for line in [*self.read(), added])
            write_atomically(self.path, lambda file: file.write(text.encode()))
        return added


@functools.lru_cache(maxsize=256)
def _read(path: pathlib.Path, changed: int, size: int) -> list[Result]:
    """A report asks for each run in turn: a file is read once for as long as it does not change."""
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            results.append(_parsed(line))
        except pydantic.ValidationError as error:
            raise _damaged(path, number, first_fault(error, "the result")) from None
        except (ValueError, RecursionError) as error:
            raise _damaged(path, number, str(error)) from None
    return results


def _parsed(line: str | bytes) -> Result:
    return adapter_of(Result).validate_python(json.loads(line))


def _damaged(path: pathlib.Path, number: int, said: str) -> ConfigError:
    return ConfigError(f"{path}, line {number} is damaged; remove it, and the run is done again ({said})")


def figure_of(records: Sequence[Mapping[str, Any]], figure: str, where: Mapping[str, Any]) -> float:
    """The number under a key in the one record that has the key and agrees with ``where``; NaN where it has none.

    Raises:
        ConfigError: no record or several have it, or it is no number.
    """
    held = [record for record in records if figure in record]
    chosen = [r for r in held if all(r.get(name) == value for name, value in where.items())]
    if len(chosen) != 1:
        known = ", ".join(dict.fromkeys(key for record in records for key in record))
        raise ConfigError(
            f"{len(chosen)} of {len(held)} records with {figure!r} have {dict(where)}, and it must be one; "
            f"the keys of the records are {known}"
        )
    value = math.nan if chosen[0][figure] is None else chosen[0][figure]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{figure!r} with {dict(where)} is no number but {value!r}")
    return float(value)


@functools.cache
def code_version() -> str:
    """The commit of the code as git names it, ``-dirty`` after it where files have changed since; else ``unknown``."""
    try:
        named = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return named.stdout.strip()
