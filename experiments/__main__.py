"""``python -m experiments run|sweep|list|report|capture``: every claim a verdict."""

import itertools
import pathlib
import sys

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from approx_attention.checks import unknown
from approx_attention.compare import write_atomically
from experiments import data, report
from experiments.capture import capture
from experiments.config import ConfigError, parse_overrides, read_config_file, resolve
from experiments.runs import CONFIGS, RESULTS, ROOT, results_of, run_arm, study_name
from experiments.training import TrainingConfig, fit, predict

CONFIG = click.argument("config", type=click.Path(path_type=pathlib.Path))
SET = click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a key: train.steps=100.")
OUT = click.option(
    "--out",
    type=click.Path(path_type=pathlib.Path),
    help="Where results go.  [default: experiments/results, or out/experiments with --set]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def experiments() -> None:
    """Trains small models and times layers to check what the papers claim."""


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
    file, console = read_config_file(config), Console()
    document = run_arm(
        file,
        arm or file.arms[0].name,
        file.seeds[0] if seed is None else seed,
        parse_overrides(assignments),
        _results(out, assignments),
        console,
    )
    console.print_json(data=document["result"])


@experiments.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=pathlib.Path))
@SET
@OUT
def sweep(configs: tuple[pathlib.Path, ...], assignments: tuple[str, ...], out: pathlib.Path | None) -> None:
    """Run every arm of every CONFIG with every seed, leaving out what is done."""
    console, results = Console(), _results(out, assignments)
    files = [read_config_file(config) for config in configs]
    for file in files:
        for seed, arm in itertools.product(file.seeds, file.arms):
            document = run_arm(file, arm.name, seed, parse_overrides(assignments), results, console)
            console.print(f"{study_name(file)}: {arm.name}, seed {seed}: {document['seconds']:.0f} s")


@experiments.command("list")
def list_command() -> None:
    """Print the configurations, and how many of their runs are done."""
    table = Table("configuration", "experiment", "arms", "seeds", "done")
    for path in sorted(CONFIGS.rglob("*.yaml")):
        file = read_config_file(path)
        done = f"{len(results_of(file, RESULTS))}/{len(file.arms) * len(file.seeds)}"
        table.add_row(
            path.relative_to(ROOT).as_posix(), file.experiment, str(len(file.arms)), str(len(file.seeds)), done
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
@click.option("--to", type=click.Path(dir_okay=False, path_type=pathlib.Path), required=True, help="The .npz to write.")
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
    file, console, results = read_config_file(config), Console(), _results(out, assignments)
    arm, seed = arm or file.arms[0].name, file.seeds[0] if seed is None else seed
    run_arm(file, arm, seed, parse_overrides(assignments), results, console)
    overrides = {"seed": seed, **next(a.overrides for a in file.arms if a.name == arm), **parse_overrides(assignments)}
    settings = resolve(TrainingConfig, file.settings, overrides, str(config))
    model, dataset, _ = fit(settings, results / study_name(file) / f"{arm}-seed{seed}", console)
    examples = data.held_out(dataset, split, batch, 1)[0]
    captured = capture(model, lambda model: predict(model, examples))
    chosen = layers.split(",") if layers else list(captured)
    for name in chosen:
        if name not in captured:
            raise ConfigError(unknown("layer", name, captured))
    arrays = {f"{name}.{x}": captured[name][x] for name in chosen for x in "qkv"}
    write_atomically(to, lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore[reportArgumentType]
    console.print(f"wrote {', '.join(chosen)} to {to}; name a layer with --q LAYER.q --k LAYER.k --v LAYER.v")


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
