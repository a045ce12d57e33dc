"""A study: one module, one file of configurations for all scales, and one file of results."""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import itertools
import json
import pathlib
import reprlib
import textwrap
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from rich.console import Console

from approx_attention.core import unknown
from approx_attention.evaluation import environment, write_atomically
from experiments.config import (
    ConfigError,
    Named,
    Seed,
    Several,
    as_plain,
    checked,
    departing,
    departures,
    load_yaml,
    overridden,
    resolve,
)
from experiments.results import Result, ResultFile, code_version
from experiments.run_files import locked
from experiments.training import check

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "experiments" / "results"
# Seconds on a CPU, minutes to hours on a CPU, and an accelerator.
SCALES = ("smoke", "cpu", "gpu")
# What a file and each of its scales hold.
Settings = dict[str, Any]
# The keys of a file that are no settings; those of a scale are the middle two.
KEYS = ("about", "module", "configurations", "seeds", "added_seeds", *SCALES)
# What a module of a study has; its Config may have a method `trains` for the trainings that are checked before any run.
PARTS = ("Config", "run", "table", "figure")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a run writes: its result, and the checkpoints and logs that it needs until then."""

    results: pathlib.Path
    work: pathlib.Path


COMMITTED = Places(RESULTS, ROOT / "out" / "experiments")


@dataclasses.dataclass(frozen=True)
class Study:
    """A study at one scale, as its file under configs/ says.

    Attributes:
        path: the file.
        name: family and study, such as ``coresets/guard``.
        scale: one of `SCALES`.
        about: the setting in a sentence or two.
        module: has ``Config``, ``run(config, directory, console)`` that gives flat records, and ``table`` and
            ``figure``, which show the records of all runs as a data frame.
        settings: of all configurations, by key.
        configurations: in which settings each differs, by dotted key.
        seeds: of each configuration.
        added_seeds: why some of them were added after results had been seen, if they were.
    """

    path: pathlib.Path
    name: str
    scale: str
    about: str
    module: Any
    settings: Mapping[str, Any]
    configurations: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    added_seeds: str = ""

    @property
    def family(self) -> str:
        """Its folder under configs/."""
        return self.name.partition("/")[0]

    def runs(self, places: Places = COMMITTED, overrides: Mapping[str, Any] | None = None) -> list["Run"]:
        """All runs of the study, seed by seed."""
        every = itertools.product(self.seeds, self.configurations)
        return [Run.of(self, name, seed, overrides or {}, places) for seed, name in every]

    def results(self, places: Places = COMMITTED) -> list[Result]:
        """The finished runs with the settings of today, configuration by configuration."""
        runs = sorted(self.runs(places), key=lambda run: list(self.configurations).index(run.configuration))
        return [result for run in runs if (result := run.found()) and result.settings == run.fingerprint]


def read_study(place: str | pathlib.Path, scale: str) -> Study:
    """Reads a study by its name under configs/, or from a file ending in ``.yaml``.

    Raises:
        ConfigError: the file is not there or is no YAML mapping, has no such scale, or names no module of a study; the
            name of a configuration cannot be that of a folder; a seed is no whole number, or given twice.
    """
    path = pathlib.Path(place) if str(place).endswith(".yaml") else CONFIGS / f"{place}.yaml"
    content = checked(Settings, load_yaml(path), str(path))
    if scale not in content:
        scales = ", ".join(name for name in SCALES if name in content) or "none"
        raise ConfigError(f"{path} has no scale {scale!r}; it has {scales}")
    own = dict(checked(Settings | None, content[scale], f"{path}: {scale!r}") or {})
    by_scale = {key: own.pop(key, content.get(key)) for key in ("configurations", "seeds")}
    settings = {key: value for key, value in content.items() if key not in KEYS}
    for key in own:
        if key.partition(".")[0] in KEYS:
            raise ConfigError(f"{path}: {key!r} is a key of the whole file, and no setting of a scale")
    inside = path.resolve().is_relative_to(CONFIGS)
    name = path.resolve().relative_to(CONFIGS).with_suffix("").as_posix() if inside else path.stem
    return Study(
        path,
        name,
        scale,
        " ".join(str(content.get("about", "")).split()),
        _module(path, content.get("module", f"experiments.{name.replace('/', '.')}")),
        overridden(settings, own, str(path)),
        _configurations(path, by_scale["configurations"]),
        _seeds(path, by_scale["seeds"]),
        " ".join(str(content.get("added_seeds", "")).split()),
    )


def has_scale(place: str, scale: str) -> bool:
    """Whether a study has a scale."""
    path = CONFIGS / f"{place}.yaml"
    return scale in checked(Settings, load_yaml(path), str(path))


def every_study(scale: str) -> list[str]:
    """The names of all studies under configs/ that have a scale."""
    names = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in sorted(CONFIGS.rglob("*.yaml")))
    return [name for name in names if has_scale(name, scale)]


def _module(path: pathlib.Path, name: Any) -> Any:
    try:
        found = isinstance(name, str) and name.startswith("experiments.") and importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if not found:
        raise ConfigError(f"{path}: 'module' must be a module of experiments, got {reprlib.repr(name)}")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a module can raise anything
        raise ConfigError(f"{path}: the module {name} cannot be imported: {type(error).__name__}: {error}") from error
    if missing := [part for part in PARTS if not hasattr(module, part)]:
        raise ConfigError(f"{path}: the module {name} is no study, it lacks {', '.join(missing)}")
    return module


def _configurations(path: pathlib.Path, given: Any) -> dict[str, dict[str, Any]]:
    given = {"run": {}} if given is None else given
    found = checked(Named[dict[str, Any] | None], given, f"{path}: 'configurations'")
    return {name: own or {} for name, own in found.items()}


def _seeds(path: pathlib.Path, given: Any) -> tuple[int, ...]:
    seeds = checked(Several[Seed], [0] if given is None else given, f"{path}: 'seeds'")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: 'seeds' must be different, got {seeds}")
    return tuple(seeds)


@dataclasses.dataclass(frozen=True)
class Run:
    """One configuration of a study with one seed: its resolved settings, its directory, and its result."""

    study: Study
    configuration: str
    seed: int
    config: Any
    places: Places

    @classmethod
    def of(
        cls, study: Study, configuration: str, seed: int, overrides: Mapping[str, Any], places: Places = COMMITTED
    ) -> "Run":
        """The run of a configuration with a seed.

        Raises:
            ConfigError: the configuration is unknown, or a setting is unknown or unfit.
        """
        if configuration not in study.configurations:
            raise ConfigError(f"{study.path}: {unknown('configuration', configuration, study.configurations)}")
        own = study.configurations[configuration]
        if "seed" in study.settings or "seed" in own or "seed" in overrides:
            raise ConfigError(f"{study.path}: the seed of a run is one of 'seeds', or that of --seed, and no setting")
        for key in (*own, *overrides):
            if key.partition(".")[0] in KEYS:
                raise ConfigError(f"{study.path}: {key!r} is a key of the whole file, and no setting")
        settings = {**own, **overrides, "seed": seed}
        config = resolve(study.module.Config, study.settings, settings, str(study.path), KEYS)
        return cls(study, configuration, seed, config, places)

    @property
    def directory(self) -> pathlib.Path:
        """Holds the settings, and the log and checkpoints of training."""
        return self.places.work / self.study.name / self.study.scale / f"{self.configuration}-seed{self.seed}"

    @property
    def file(self) -> ResultFile:
        """Holds the results of all runs of the study."""
        return ResultFile(self.places.results / f"{self.study.name}.jsonl")

    @property
    def named(self) -> str:
        """What messages begin with."""
        return f"{self.study.path}, configuration {self.configuration!r}"

    @property
    def fingerprint(self) -> str:
        """Of the settings that differ from their defaults, but for the seed."""
        settings = {name: value for name, value in departing(self.config).items() if name != "seed"}
        text = json.dumps([self.study.module.__name__, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def found(self) -> Result | None:
        """The result on file, of these or of other settings."""
        return self.file.find(self.study.scale, self.configuration, self.seed)

    def finished(self) -> Result | None:
        """The result that it already has.

        Raises:
            ConfigError: the file holds this run with other settings, or is damaged.
        """
        result = self.found()
        if result is not None and result.settings != self.fingerprint:
            raise ConfigError(
                f"{self.file.path}, line {self.file.read().index(result) + 1} is {self.configuration!r} with seed "
                f"{self.seed} at other settings; remove that line, and the run is done again, or choose another --out"
            )
        return result

    def result(self, console: Console) -> Result:
        """Runs it, or gives the result it already has.

        Raises:
            ConfigError: the settings do not fit each other or the data, the directory holds a run of other settings or
                damaged files, or another process is at work there.
        """
        if result := self.finished():
            return result
        with self.held():
            if result := self.finished():  # another process was faster
                return result
            start = time.monotonic()
            records = self.study.module.run(self.config, self.directory, console)
            result = Result(
                scale=self.study.scale,
                configuration=self.configuration,
                seed=self.seed,
                settings=self.fingerprint,
                version=code_version(),
                machine=environment(),
                seconds=round(time.monotonic() - start, 1),
                records=records,
            )
            return self.file.add(result)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the directory this run's, and keeps other processes out.

        What goes wrong within is one `ConfigError`, and its traceback is kept in the directory.

        Raises:
            ConfigError: another process is at work there, or the directory holds work with other settings.
        """
        with locked(self.directory / "run.lock", self.directory):
            self.claim_directory()
            trace = self.directory / "traceback.txt"
            try:
                yield
            except ConfigError as error:
                raise ConfigError(f"{self.named}: {error}") from error
            except Exception as error:
                # Settings can ask for what a method, the memory or the disk cannot do. If the fault is ours, the
                # traceback is there to mend it by.
                with contextlib.suppress(OSError):
                    trace.write_text(traceback.format_exc(), encoding="utf-8")
                said = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
                raise ConfigError(f"{self.named}: {said} (see {trace})") from error
            trace.unlink(missing_ok=True)

    def claim_directory(self) -> None:
        """Makes the directory this run's.

        Raises:
            ConfigError: it holds work with other settings, or cannot be written.
        """
        if self.check_directory():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(as_plain(self.config), sort_keys=False)
            write_atomically(self.directory / "settings.yaml", lambda file: file.write(text.encode()))
        except OSError as error:
            raise ConfigError(f"{self.directory} cannot be written: {error.strerror}") from None

    def check_directory(self) -> bool:
        """Whether the directory holds work of this run.

        Raises:
            ConfigError: it holds work with other settings.
        """
        kept = [path for path in self.directory.rglob("*") if path.is_file()]
        if all(path.name in ("settings.yaml", "run.lock", "traceback.txt") for path in kept):
            return False
        held, elsewhere = self.directory / "settings.yaml", f"remove {self.directory}, or choose --out"
        try:
            settings = load_yaml(held)
            if not isinstance(settings, dict):
                raise ConfigError(f"{held} is no mapping")
            found = departures(self.config, settings, str(held))
        except ConfigError as error:
            raise ConfigError(f"{error}, so the run there cannot go on; {elsewhere}") from None
        if found:
            raise ConfigError(f"{self.directory} holds a run with other settings ({'; '.join(found)}); {elsewhere}")
        return True


def check_all(runs: Iterable[Run]) -> None:
    """Raises ``ConfigError`` for what stands against any of the runs and can be known before the first is run."""
    directories: dict[pathlib.Path, Run] = {}
    for run in runs:
        other = directories.setdefault(run.directory, run)
        if (other.study.module, other.config) != (run.study.module, run.config):
            raise ConfigError(f"{run.directory} would hold two runs with different settings; give one another --out")
        if run.finished() is None:
            run.check_directory()
            for training in run.config.trains() if hasattr(run.config, "trains") else ():
                try:
                    check(training)
                except ConfigError as error:
                    raise ConfigError(f"{run.named}: {error}") from error
