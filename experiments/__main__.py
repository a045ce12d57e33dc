"""``python -m experiments run|sweep|list|report|capture|capture-model|sample``: every claim a verdict."""

import importlib
import itertools
import pathlib
import sys
from typing import Any

import click
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from approx_attention.checks import unknown
from approx_attention.compare import write_atomically
from experiments import data, report
from experiments.capture import capture
from experiments.config import ConfigError, parse_overrides, read_config_file
from experiments.runs import CONFIGS, RESULTS, ROOT, Run, results_of
from experiments.sample import write_sample
from experiments.training import TrainingConfig, fit, predict

CONFIG = click.argument("config", type=click.Path(path_type=pathlib.Path))
SET = click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a key: train.steps=100.")
OUT = click.option(
    "--out",
    type=click.Path(path_type=pathlib.Path),
    help="Where results go.  [default: experiments/results, or out/experiments with --set]",
)
SAMPLE_CONFIG = CONFIGS / "harness/sample/full.yaml"
TO = click.option(
    "--to", type=click.Path(dir_okay=False, path_type=pathlib.Path), required=True, help="The .npz to write."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def experiments() -> None:
    """Trains small models and times layers to check what the papers claim."""


def _run_of(
    config: pathlib.Path, arm: str | None, seed: int | None, assignments: tuple[str, ...], out: pathlib.Path | None
) -> Run:
    file = read_config_file(config)
    arm, seed = arm or file.arms[0].name, file.seeds[0] if seed is None else seed
    return Run.of(file, arm, seed, parse_overrides(assignments), _results(out, assignments))


def _results(out: pathlib.Path | None, assignments: tuple[str, ...]) -> pathlib.Path:
    return out or (ROOT / "out" / "experiments" if assignments else RESULTS)


@experiments.command()
@CONFIG
@click.option("--arm", help="Which variant.  [default: the first in the file]")
@click.option("--seed", type=click.IntRange(min=0), help="Which seed.  [default: the first in the file]")
@SET
@OUT
def run(
    config: pathlib.Path, arm: str | None, seed: int | None, assignments: tuple[str, ...], out: pathlib.Path | None
) -> None:
    """Run one arm of CONFIG with one seed; goes on where a killed run stopped."""
    console = Console()
    console.print_json(data=_run_of(config, arm, seed, assignments, out).result(console)["result"])


@experiments.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=pathlib.Path))
@SET
@OUT
def sweep(configs: tuple[pathlib.Path, ...], assignments: tuple[str, ...], out: pathlib.Path | None) -> None:
    """Run every arm of every CONFIG with every seed, leaving out what is done."""
    console, results, overrides = Console(), _results(out, assignments), parse_overrides(assignments)
    runs = [
        Run.of(file, arm.name, seed, overrides, results)
        for file in map(read_config_file, configs)
        for seed, arm in itertools.product(file.seeds, file.arms)
    ]
    for run in runs:
        console.print(f"{run.directory.relative_to(results)}: {run.result(console)['seconds']:.0f} s")
        # Each compiled program maps memory, of which Linux grants a process 65530 pieces.
        jax.clear_caches()


@experiments.command("list")
def list_command() -> None:
    """Print the configurations, and how many of their runs are done."""
    table = Table("configs/", "experiment", "arms", "seeds", "done")
    for path in sorted(CONFIGS.rglob("*.yaml")):
        file = read_config_file(path)
        done = f"{len(results_of(file, RESULTS))}/{len(file.arms) * len(file.seeds)}"
        table.add_row(
            path.relative_to(CONFIGS).as_posix(), file.experiment, str(len(file.arms)), str(len(file.seeds)), done
        )
    Console().print(table)


@experiments.command("report")
def report_command() -> None:
    """Compute every verdict from the results and write experiments/RESULTS.md with its plots."""
    for path in report.write(ROOT / "experiments"):
        Console().print(f"wrote {path.relative_to(ROOT)}")


@experiments.command("capture")
@CONFIG
@click.option("--arm", help="Which variant.  [default: the first in the file]")
@click.option("--seed", type=click.IntRange(min=0), help="Which seed.  [default: the first in the file]")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="valid", show_default=True)
@click.option("--layers", help="Paths of layers, separated by commas.  [default: all]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="How many examples.")
@SET
@OUT
@TO
def capture_command(
    config: pathlib.Path,
    arm: str | None,
    seed: int | None,
    split: str,
    layers: str | None,
    batch: int,
    assignments: tuple[str, ...],
    out: pathlib.Path | None,
    to: pathlib.Path,
) -> None:
    """Write q, k and v of a trained model's attention layers to an .npz that `approx-attention compare` reads.

    Trains the model first if its run has no checkpoint here.
    """
    settings, directory = _training_run(_run_of(config, arm, seed, assignments, out))
    model, dataset, _ = fit(settings, directory, Console())
    examples = data.held_out(dataset, split, batch, 1)[0]
    _write_layers(capture(model, lambda model: predict(model, examples)), layers, to)


@experiments.command("capture-model")
@click.argument("function", metavar="MODULE:FUNCTION")
@click.option("--layers", help="Paths of layers, separated by commas.  [default: all]")
@TO
def capture_model_command(function: str, layers: str | None, to: pathlib.Path) -> None:
    """Write q, k and v of a Flax nnx model of your own to an .npz that `approx-attention compare` reads.

    FUNCTION of MODULE returns (model, run), and run(model) calls the model once.
    """
    module, colon, name = function.partition(":")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        detail = str(error) if colon else "it is MODULE:FUNCTION, as in my_model:make"
        raise ConfigError(f"{function!r} cannot be imported: {detail}") from None
    _write_layers(capture(*make()), layers, to)


def _write_layers(captured: dict[str, dict[str, np.ndarray]], layers: str | None, to: pathlib.Path) -> None:
    chosen = layers.split(",") if layers else list(captured)
    for name in chosen:
        if name not in captured:
            raise ConfigError(unknown("layer", name, captured))
    arrays: dict[str, Any] = {f"{name}.{x}": captured[name][x] for name in chosen for x in "qkv"}
    write_atomically(to, lambda file: np.savez_compressed(file, **arrays))
    Console().print(f"wrote {', '.join(chosen)} to {to}; name a layer with --q LAYER.q --k LAYER.k --v LAYER.v")


@experiments.command("sample")
@click.argument("config", type=click.Path(path_type=pathlib.Path), default=SAMPLE_CONFIG)
@SET
@OUT
@click.option(
    "--to",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    help="The .npz to write; its provenance goes beside it as .txt.  [default: approx_attention/sample.npz]",
)
def sample_command(
    config: pathlib.Path, assignments: tuple[str, ...], out: pathlib.Path | None, to: pathlib.Path | None
) -> None:
    """Write the sample that ships with the package, from the language model of CONFIG; trains it first if need be."""
    if to is None and (assignments or config != SAMPLE_CONFIG):
        raise ConfigError("with other settings than its own the sample is written where --to says")
    to = to or ROOT / "approx_attention/sample.npz"
    settings, directory = _training_run(_run_of(config, None, None, assignments, out))
    console = Console()
    console.print_json(data=write_sample(settings, directory, to, console))


def _training_run(run: Run) -> tuple[TrainingConfig, pathlib.Path]:
    """The settings and the directory of a run whose model is wanted."""
    if not isinstance(run.config, TrainingConfig):
        raise ConfigError(f"{run.directory.name}: only the experiment 'quality' trains a model of one method")
    run.claim_directory()
    if (run.directory / "result.json").exists() and not (run.directory / "checkpoints").exists():
        raise ConfigError(f"{run.directory} has a result but no checkpoint here; train again elsewhere with --out")
    return run.config, run.directory


def main() -> int:
    """Runs the command line; exit code 2, with one line that says why, for input it cannot use."""
    try:
        return experiments.main(prog_name="python -m experiments", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
    except (click.ClickException, ConfigError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"experiments: {' '.join(message.split())}", err=True)
    except click.Abort:
        click.echo("experiments: interrupted; the same command goes on from the last checkpoint", err=True)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
