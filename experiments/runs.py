"""One run of one experiment: its resolved configuration, its directory, and its result."""

import contextlib
import dataclasses
import pathlib
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import yaml
from rich.console import Console

from approx_attention.core import unknown
from approx_attention.evaluation import environment, write_atomically
from experiments.config import (
    BESIDE_SETTINGS,
    ConfigError,
    ConfigFile,
    NonNegative,
    Seed,
    as_plain,
    departures,
    read_yaml,
    resolve,
)
from experiments.control_variates import bias, continuum, gap
from experiments.coresets import bits, cache, certified, error, latency
from experiments.harness import long_context, quality, swap_in
from experiments.low_rank import projection_fit, sketch, spectra
from experiments.run_files import locked, read_json, write_json
from experiments.sparse_patterns import dimensions, realized
from experiments.tensor import degrees, match, scaling, window
from experiments.tensor import error as polynomial_error
from experiments.training import TrainingConfig, check
from experiments.whole_picture import equal_time, where_we_lose, zoo

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "experiments" / "results"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What ``experiment`` may name in a configuration: its settings, and ``run(config, directory, console)``.

    Attributes:
        config: the class of its settings.
        run: gives the result.
        trains: what is trained with such settings, to be checked before anything is run.
    """

    config: type
    run: Callable[[Any, pathlib.Path, Console], dict[str, Any]]
    trains: Callable[[Any], Iterable[TrainingConfig]] = lambda config: ()


def _with_each_method(config: Any) -> list[TrainingConfig]:
    return [dataclasses.replace(config.training, attention=own) for own in config.methods.values()]


EXPERIMENTS: Mapping[str, Experiment] = {
    "quality": Experiment(TrainingConfig, quality.run, lambda config: [config]),
    "swap_in": Experiment(swap_in.SwapInConfig, swap_in.run, _with_each_method),
    "gap": Experiment(gap.GapConfig, gap.run),
    "continuum": Experiment(continuum.ContinuumConfig, continuum.run),
    "bias": Experiment(bias.BiasConfig, bias.run),
    "coreset_error": Experiment(error.CoresetErrorConfig, error.run),
    "coreset_bytes": Experiment(bits.BytesConfig, bits.run),
    "cache": Experiment(cache.CacheConfig, cache.run, lambda config: [config.training]),
    "certified": Experiment(certified.CertifiedConfig, certified.run),
    "latency": Experiment(latency.LatencyConfig, latency.run),
    "sketch": Experiment(sketch.SketchConfig, sketch.run),
    "projection_fit": Experiment(projection_fit.ProjectionFitConfig, projection_fit.run),
    "spectra": Experiment(spectra.SpectraConfig, spectra.run, lambda config: [config.training]),
    "log_law": Experiment(dimensions.LogLawConfig, dimensions.run_log_law),
    "headline": Experiment(dimensions.HeadlineConfig, dimensions.run_headline),
    "budget": Experiment(dimensions.BudgetConfig, dimensions.run_budget),
    "many_patterns": Experiment(realized.ManyPatternsConfig, realized.run_many_patterns),
    "precision": Experiment(realized.PrecisionConfig, realized.run_precision),
    "picture": Experiment(realized.PictureConfig, realized.run_picture),
    "tensor_scaling": Experiment(scaling.TensorScalingConfig, scaling.run_scaling),
    "tensor_decode": Experiment(scaling.TensorDecodeConfig, scaling.run_decode),
    "polynomial_error": Experiment(polynomial_error.PolynomialErrorConfig, polynomial_error.run),
    "least_degrees": Experiment(degrees.LeastDegreesConfig, degrees.run_degrees),
    "phase": Experiment(degrees.PhaseConfig, degrees.run_phase),
    "tensor_match": Experiment(match.MatchConfig, match.run),
    "tensor_window": Experiment(window.WindowConfig, window.run),
    "where_we_lose": Experiment(where_we_lose.WhereWeLoseConfig, where_we_lose.run),
    "zoo": Experiment(zoo.ZooConfig, zoo.run, _with_each_method),
    "equal_time": Experiment(equal_time.EqualTimeConfig, equal_time.run, lambda config: [config.training]),
    "long_context": Experiment(long_context.LongContextConfig, long_context.run),
}


def study_name(file: ConfigFile) -> str:
    """``harness/language_model/cpu`` for configs/harness/language_model/cpu.yaml."""
    path = file.path.resolve().with_suffix("")
    return path.relative_to(CONFIGS).as_posix() if path.is_relative_to(CONFIGS) else path.name


def run_directory(file: ConfigFile, arm: str, seed: int, results: pathlib.Path) -> pathlib.Path:
    """Where a run of an arm with a seed has its files."""
    return results / study_name(file) / f"{arm}-seed{seed}"


@dataclasses.dataclass(frozen=True)
class Result:
    """The parts of result.json."""

    arm: str
    seed: Seed
    config: dict[str, Any]
    result: dict[str, Any]
    seconds: NonNegative
    environment: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm of a study with one seed: its experiment, its resolved settings, and its directory.

    The directory is ``<results>/<study>/<arm>-seed<n>``, with ``config.yaml``, the log and checkpoints of training, and
    ``result.json`` once it is done.
    """

    arm: str
    seed: int
    experiment: str
    config: Any
    directory: pathlib.Path
    source: pathlib.Path

    @classmethod
    def of(cls, file: ConfigFile, arm: str, seed: int, overrides: Mapping[str, Any], results: pathlib.Path) -> "Run":
        """The run that a configuration file describes.

        Raises:
            ConfigError: the experiment or the arm is unknown, or a setting is unknown or unfit.
        """
        if file.experiment not in EXPERIMENTS:
            raise ConfigError(f"{file.path}: {unknown('experiment', file.experiment, EXPERIMENTS)}")
        chosen = next((entry for entry in file.arms if entry.name == arm), None)
        if chosen is None:
            raise ConfigError(f"{file.path}: {unknown('arm', arm, [entry.name for entry in file.arms])}")
        if "seed" in file.settings or "seed" in chosen.overrides or "seed" in overrides:
            raise ConfigError(f"{file.path}: the seed of a run is one of 'seeds', or that of --seed, and no setting")
        for key in (*chosen.overrides, *overrides):
            if key.partition(".")[0] in BESIDE_SETTINGS:
                raise ConfigError(f"{file.path}: {key!r} is a key of the whole file, and no setting of an arm")
        settings = {**chosen.overrides, **overrides, "seed": seed}
        kind = EXPERIMENTS[file.experiment].config
        config = resolve(kind, file.settings, settings, str(file.path), BESIDE_SETTINGS)
        return cls(arm, seed, file.experiment, config, run_directory(file, arm, seed, results), file.path)

    def result(self, console: Console) -> dict[str, Any]:
        """Runs it, or gives the result it already has.

        Raises:
            ConfigError: the settings do not fit each other or the data, the directory holds a run of other settings or
                damaged files, or another process is at work there.
        """
        document = self.finished()
        if document is not None:
            return document
        with self.held() as plain:
            if document := self.finished():  # another process was faster
                return document
            start = time.monotonic()
            document = {
                "arm": self.arm,
                "seed": self.seed,
                "config": plain,
                "result": EXPERIMENTS[self.experiment].run(self.config, self.directory, console),
                "seconds": round(time.monotonic() - start, 1),
                "environment": environment(),
            }
            write_json(self.directory / "result.json", document)
        return document

    @property
    def named(self) -> str:
        """What messages begin with."""
        return f"{self.source}, arm {self.arm!r}"

    def finished(self) -> dict[str, Any] | None:
        """The result that it already has.

        Raises:
            ConfigError: the directory holds a run of other settings, or a damaged result.
        """
        done = self.directory / "result.json"
        if not done.exists():
            return None
        self.check_directory()
        document = self.read_result()
        if found := self._differences(document["config"], done):
            raise ConfigError(f"{done} is of other settings ({'; '.join(found)}); remove it, and the run is done again")
        return document

    @contextlib.contextmanager
    def held(self) -> Iterator[dict[str, Any]]:
        """Makes the directory this run's, keeps other processes out, and gives its settings as they are saved there.

        What goes wrong within is one `ConfigError`, and its traceback is kept in the directory.

        Raises:
            ConfigError: another process is at work there, or the directory holds work with other settings.
        """
        with locked(self.directory / "run.lock", self.directory):
            plain, trace = self.claim_directory(), self.directory / "traceback.txt"
            try:
                yield plain
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

    def read_result(self) -> dict[str, Any]:
        """What ``result.json`` says.

        Raises:
            ConfigError: it is damaged, or that of another run.
        """
        path = self.directory / "result.json"
        document = read_json(path, Result, "the run is done again")
        if (document["arm"], document["seed"]) != (self.arm, self.seed):
            raise ConfigError(
                f"{path} is of the arm {document['arm']!r} with seed {document['seed']}; remove it, and the run is "
                "done again"
            )
        return document

    def is_result(self, document: Mapping[str, Any]) -> bool:
        """Whether a result was made with this run's settings."""
        return not self._differences(document["config"], self.directory / "result.json")

    def _differences(self, held: Mapping[str, Any], where: pathlib.Path) -> list[str]:
        """In which settings others differ from this run's."""
        settings = {name: value for name, value in held.items() if name != "experiment"}
        if held.get("experiment") != self.experiment:
            return [f"experiment: {held.get('experiment')!r} there, {self.experiment!r} now"]
        return departures(self.config, settings, str(where))

    def check_directory(self) -> bool:
        """Whether the directory holds work of this run.

        Raises:
            ConfigError: it holds work with other settings.
        """
        held = self.directory / "config.yaml"
        work = ("result.json", "lengths.json", "methods.json", "plan.json")
        saved = (path for path in (self.directory / "checkpoints").rglob("*") if path.is_file())
        if not any((self.directory / name).exists() for name in work) and not any(saved):
            return False
        elsewhere = f"remove {self.directory}, or choose --out"
        try:
            found = self._differences(read_yaml(held), held)
        except ConfigError as error:
            raise ConfigError(f"{error}, so the run there cannot go on; {elsewhere}") from None
        if found:
            raise ConfigError(
                f"{self.directory} holds a run with other settings ({'; '.join(found)}); remove it or choose --out"
            )
        return True

    def claim_directory(self) -> dict[str, Any]:
        """Makes the directory this run's, and returns its settings as they are saved there.

        Raises:
            ConfigError: the directory holds work with other settings.
        """
        plain = {"experiment": self.experiment, **as_plain(self.config)}
        if not self.check_directory():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                text = yaml.safe_dump(plain, sort_keys=False)
                write_atomically(self.directory / "config.yaml", lambda file: file.write(text.encode()))
            except OSError as error:
                raise ConfigError(f"{self.directory} cannot be written: {error.strerror}") from None
        return plain


def results_of(file: ConfigFile, results: pathlib.Path) -> list[dict[str, Any]]:
    """The finished runs of a configuration as it is now, arm by arm and seed by seed.

    Raises:
        ConfigError: a result is damaged.
    """
    found = []
    for arm in file.arms:
        for seed in file.seeds:
            run = Run.of(file, arm.name, seed, {}, results)
            if (run.directory / "result.json").exists() and run.is_result(document := run.read_result()):
                found.append(document)
    return found


def check_all(runs: Iterable[Run]) -> None:
    """Raises ``ConfigError`` for what stands against any of the runs and can be known before the first is run."""
    directories: dict[pathlib.Path, Run] = {}
    for run in runs:
        other = directories.setdefault(run.directory, run)
        if (other.experiment, other.config) != (run.experiment, run.config):
            raise ConfigError(f"{run.directory} would hold two runs with different settings; give one another --out")
        if run.finished() is None:
            run.check_directory()
            for training in EXPERIMENTS[run.experiment].trains(run.config):
                try:
                    check(training)
                except ConfigError as error:
                    raise ConfigError(f"{run.named}: {error}") from error
