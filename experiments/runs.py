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
from experiments.config import ConfigError, ConfigFile, as_plain, differences, resolve
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
    "long_context": Experiment(long_context.LongContextConfig, long_context.run),
}


def study_name(file: ConfigFile) -> str:
    """``harness/language_model/cpu`` for configs/harness/language_model/cpu.yaml."""
    path = file.path.resolve().with_suffix("")
    return path.relative_to(CONFIGS).as_posix() if path.is_relative_to(CONFIGS) else path.name


def run_arm(
    file: ConfigFile, arm: str, seed: int, overrides: Mapping[str, Any], results: pathlib.Path, console: Console
) -> dict[str, Any]:
    """Runs one arm with one seed, or gives the result it already has.

    Its directory is ``<results>/<study>/<arm>-seed<n>``, with ``config.yaml``, the log and checkpoints of training, and
    ``result.json`` once it is done.

    Raises:
        ConfigError: the configuration cannot be used, or the directory holds a run of another one.
    """
    if file.experiment not in EXPERIMENTS:
        raise ConfigError(f"{file.path}: {unknown('experiment', file.experiment, EXPERIMENTS)}")
    chosen = next((entry for entry in file.arms if entry.name == arm), None)
    if chosen is None:
        names = [entry.name for entry in file.arms]
        raise ConfigError(f"{file.path}: {unknown('arm', arm, names)}")
    experiment = EXPERIMENTS[file.experiment]
    config = resolve(experiment.config, file.settings, {"seed": seed, **chosen.overrides, **overrides}, str(file.path))
    plain = {"experiment": file.experiment, **as_plain(config)}
    directory = results / study_name(file) / f"{arm}-seed{seed}"
    _claim_directory(directory, plain)
    done = directory / "result.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    start = time.monotonic()
    result = experiment.run(config, directory, console)
    document = {
        "arm": arm,
        "seed": seed,
        "config": plain,
        "result": result,
        "seconds": round(time.monotonic() - start, 1),
        "environment": environment(),
    }
    text = json.dumps(document, indent=1) + "\n"
    write_atomically(done, lambda file: file.write(text.encode()))
    return document


def _claim_directory(directory: pathlib.Path, plain: Mapping[str, Any]) -> None:
    """Makes the directory this configuration's, or refuses one with work of another's."""
    held = directory / "config.yaml"
    if held.exists() and ((directory / "result.json").exists() or (directory / "checkpoints").exists()):
        found = differences(yaml.safe_load(held.read_text(encoding="utf-8")), plain)
        if found:
            raise ConfigError(
                f"{directory} holds a run of another configuration ({'; '.join(found)}); remove it or choose --out"
            )
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}") from None
    text = yaml.safe_dump(dict(plain), sort_keys=False)
    write_atomically(held, lambda file: file.write(text.encode()))


def results_of(file: ConfigFile, results: pathlib.Path) -> list[dict[str, Any]]:
    """The finished runs of a configuration, arm by arm and seed by seed."""
    found = []
    for arm in file.arms:
        for seed in file.seeds:
            path = results / study_name(file) / f"{arm.name}-seed{seed}" / "result.json"
            if path.exists():
                found.append(json.loads(path.read_text(encoding="utf-8")))
    return found
