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
from experiments.config import ConfigError, ConfigFile, as_plain, differences, read_config_file, resolve
from experiments.control_variates import bias, gap
from experiments.harness import long_context, quality, swap_in
from experiments.training import TrainingConfig

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
    "bias": Experiment(bias.BiasConfig, bias.run),
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
        settings = {"seed": seed, **chosen.overrides, **overrides}
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
            return json.loads(done.read_text(encoding="utf-8"))
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

    def claim_directory(self) -> dict[str, Any]:
        """Makes the directory this run's, and returns its settings as they are saved there.

        Raises:
            ConfigError: the directory holds work with other settings.
        """
        plain = {"experiment": self.experiment, **as_plain(self.config)}
        held = self.directory / "config.yaml"
        if held.exists() and any((self.directory / name).exists() for name in ("result.json", "checkpoints")):
            # Read anew, so that a setting which has come since stands there with its default.
            before = read_config_file(held)
            kind = EXPERIMENTS[before.experiment].config if before.experiment in EXPERIMENTS else type(self.config)
            settled = as_plain(resolve(kind, before.settings, {}, str(held)))
            found = differences({"experiment": before.experiment, **settled}, plain)
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
    """The finished runs of a configuration, arm by arm and seed by seed."""
    found = []
    for arm in file.arms:
        for seed in file.seeds:
            path = results / study_name(file) / f"{arm.name}-seed{seed}" / "result.json"
            if path.exists():
                found.append(json.loads(path.read_text(encoding="utf-8")))
    return found
