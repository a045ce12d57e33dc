"""One run of one experiment: its resolved configuration, its directory, and its result."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from rich.console import Console

from approx_attention.checks import unknown
from approx_attention.compare import environment, write_atomically
from experiments.config import ConfigError, ConfigFile, as_plain, differences, read_yaml, resolve
from experiments.control_variates import bias, continuum, gap
from experiments.coresets import cache, error, latency
from experiments.harness import long_context, quality, swap_in
from experiments.low_rank import projection_fit, sketch, spectra
from experiments.sparse_patterns import dimensions, realized
from experiments.tensor import degrees, match, scaling, window
from experiments.tensor import error as polynomial_error
from experiments.training import TrainingConfig
from experiments.whole_picture import equal_time, where_we_lose, zoo

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "experiments" / "results"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What ``experiment`` may name in a configuration: its settings, and ``run(config, directory, console)``."""

    config: type
    run: Callable[[Any, pathlib.Path, Console], dict[str, Any]]


EXPERIMENTS: Mapping[str, Experiment] = {
    "quality": Experiment(TrainingConfig, quality.run),
    "swap_in": Experiment(swap_in.SwapInConfig, swap_in.run),
    "gap": Experiment(gap.GapConfig, gap.run),
    "continuum": Experiment(continuum.ContinuumConfig, continuum.run),
    "bias": Experiment(bias.BiasConfig, bias.run),
    "coreset_error": Experiment(error.CoresetErrorConfig, error.run),
    "cache": Experiment(cache.CacheConfig, cache.run),
    "latency": Experiment(latency.LatencyConfig, latency.run),
    "sketch": Experiment(sketch.SketchConfig, sketch.run),
    "projection_fit": Experiment(projection_fit.ProjectionFitConfig, projection_fit.run),
    "spectra": Experiment(spectra.SpectraConfig, spectra.run),
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
    "zoo": Experiment(zoo.ZooConfig, zoo.run),
    "equal_time": Experiment(equal_time.EqualTimeConfig, equal_time.run),
    "long_context": Experiment(long_context.LongContextConfig, long_context.run),
}


def study_name(file: ConfigFile) -> str:
    """``harness/language_model/cpu`` for configs/harness/language_model/cpu.yaml."""
    path = file.path.resolve().with_suffix("")
    return path.relative_to(CONFIGS).as_posix() if path.is_relative_to(CONFIGS) else path.name


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
        settings = {**chosen.overrides, **overrides, "seed": seed}
        config = resolve(EXPERIMENTS[file.experiment].config, file.settings, settings, str(file.path))
        return cls(arm, seed, file.experiment, config, results / study_name(file) / f"{arm}-seed{seed}")

    def result(self, console: Console) -> dict[str, Any]:
        """Runs it, or gives the result it already has.

        Raises:
            ConfigError: the settings do not fit each other or the data, or the directory holds a run of other settings.
        """
        plain = self.claim_directory()
        done = self.directory / "result.json"
        if done.exists():
            return _read_result(done)
        start = time.monotonic()
        result = EXPERIMENTS[self.experiment].run(self.config, self.directory, console)
        document = {
            "arm": self.arm,
            "seed": self.seed,
            "config": plain,
            "result": result,
            "seconds": round(time.monotonic() - start, 1),
            "environment": environment(),
        }
        text = json.dumps(document, indent=1) + "\n"
        write_atomically(done, lambda file: file.write(text.encode()))
        return document

    def is_result(self, document: Mapping[str, Any]) -> bool:
        """Whether a result was made with this run's settings."""
        return not self._differences(document["config"], self.directory / "result.json")

    def _differences(self, held: Mapping[str, Any], where: pathlib.Path) -> list[str]:
        """In which settings others differ from this run's; those that have come since stand there at their default."""
        settings = {name: value for name, value in held.items() if name != "experiment"}
        try:
            settings = as_plain(resolve(type(self.config), settings, {}, str(where)))
        except ConfigError as error:
            return [str(error)]
        plain = {"experiment": self.experiment, **as_plain(self.config)}
        return differences({"experiment": held.get("experiment"), **settings}, plain)

    def claim_directory(self) -> dict[str, Any]:
        """Makes the directory this run's, and returns its settings as they are saved there.

        Raises:
            ConfigError: the directory holds work with other settings.
        """
        plain = {"experiment": self.experiment, **as_plain(self.config)}
        held = self.directory / "config.yaml"
        work = ("result.json", "checkpoints", "lengths.json", "methods.json", "plan.json")
        if any((self.directory / name).exists() for name in work):
            found = self._differences(read_yaml(held), held)
            if found:
                raise ConfigError(
                    f"{self.directory} holds a run with other settings ({'; '.join(found)}); remove it or choose --out"
                )
            return plain
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.directory} cannot be made: {error.strerror}") from None
        text = yaml.safe_dump(plain, sort_keys=False)
        write_atomically(held, lambda file: file.write(text.encode()))
        return plain


def results_of(file: ConfigFile, results: pathlib.Path) -> list[dict[str, Any]]:
    """The finished runs of a configuration as it is now, arm by arm and seed by seed."""
    found = []
    for arm in file.arms:
        for seed in file.seeds:
            run = Run.of(file, arm.name, seed, {}, results)
            path = run.directory / "result.json"
            if path.exists() and run.is_result(document := _read_result(path)):
                found.append(document)
    return found


def _read_result(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{path} is damaged; remove it, and the run is done again") from None
