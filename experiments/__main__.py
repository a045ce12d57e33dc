"""``python -m experiments run|sweep|list|report|check|capture|capture-model|sample``: every claim a verdict."""

import contextlib
import functools
import importlib
import io
import logging
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from approx_attention.core import unknown
from approx_attention.evaluation import save_layers
from approx_attention.nnx import capture_attention
from benchmarks.ahead_of_time import Platform
from benchmarks.compilers import compile_into, compiler_options
from experiments import check, data, report
from experiments.config import ConfigError, parse_overrides
from experiments.sample import write_sample
from experiments.studies import COMMITTED, RESULTS, ROOT, SCALES, Places, Run, check_all, every_study, read_study
from experiments.training import TrainingConfig, fit, predict


class Place(click.Path):
    """A path that names something, and where a file is to be written, one of that ending in a folder that is there."""

    def __init__(self, ending: str = ""):
        super().__init__(dir_okay=not ending, path_type=pathlib.Path)
        self.ending = ending

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value) or value == pathlib.Path() or "\0" in str(value):
            self.fail(f"{str(value)!r} is no path", param, ctx)
        path = pathlib.Path(str(super().convert(value, param, ctx)))
        if self.ending and path.suffix != self.ending:
            self.fail(f"{str(path)!r} must end in {self.ending}", param, ctx)
        if self.ending and not path.parent.is_dir():
            self.fail(f"the folder {str(path.parent)!r} is not there", param, ctx)
        return path


STUDY = click.argument("study")
SCALE = click.option("--scale", type=click.Choice(SCALES), default="cpu", show_default=True, help="How large.")
SET = click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a key: train.steps=100.")
OUT = click.option(
    "--out",
    type=Place(),
    help="Where results and checkpoints go.  [default: experiments/results and out/experiments; all to the latter with "
    "--set or a seed that the file does not have, and to out/smoke at the scale smoke]",
)
CONFIGURATION = click.option("--configuration", help="Which configuration.  [default: the first in the file]")
SEED = click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Which seed.  [default: the first in the file]")
LAYERS = click.option("--layers", help="Paths of layers, separated by commas.  [default: all]")
SAMPLE = "harness/sample"
TO = click.option("--to", type=Place(".npz"), required=True, help="The .npz to write.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def experiments() -> None:
    """Trains small models and times layers to check what the papers claim.

    STUDY is a name under configs/, such as coresets/guard, or a YAML file.
    """


def _of_one_run(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the run that STUDY, --scale, --configuration, --seed, --set and --out name."""

    @STUDY
    @SCALE
    @CONFIGURATION
    @SEED
    @SET
    @OUT
    @functools.wraps(command)
    def with_options(study: str, configuration: str | None, seed: int | None, **options: Any) -> None:
        scale, assignments, out = (options.pop(name) for name in ("scale", "assignments", "out"))
        command(_run_of(study, scale, assignments, out, configuration, seed), **options)

    return with_options


def _run_of(
    study: str,
    scale: str,
    assignments: tuple[str, ...],
    out: pathlib.Path | None,
    configuration: str | None = None,
    seed: int | None = None,
) -> Run:
    found = read_study(study, scale)
    configuration = next(iter(found.configurations)) if configuration is None else configuration
    seed = found.seeds[0] if seed is None else seed
    places = _places(out, scale, is_changed=bool(assignments) or seed not in found.seeds)
    return Run.of(found, configuration, seed, parse_overrides(assignments), places)


def _places(out: pathlib.Path | None, scale: str, *, is_changed: bool = False) -> Places:
    """Only runs that a file has, and at a scale that decides claims, are among those that are committed."""
    if out is None and not is_changed and scale != "smoke":
        return COMMITTED
    out = out or (COMMITTED.work if is_changed else ROOT / "out" / "smoke")
    return Places(out, out)


@experiments.command()
@_of_one_run
def run(chosen: Run) -> None:
    """Run one configuration of STUDY with one seed; goes on where a killed run stopped."""
    console = _console()
    console.print_json(data=chosen.result(console).records)


@experiments.command()
@click.argument("studies", nargs=-1, required=True)
@SCALE
@SET
@OUT
def sweep(studies: tuple[str, ...], scale: str, assignments: tuple[str, ...], out: pathlib.Path | None) -> None:
    """Run every configuration of every STUDY with every seed, leaving out what is done; `all` stands for all studies.

    All are checked before the first is run.
    """
    console, overrides = _console(), parse_overrides(assignments)
    places = _places(out, scale, is_changed=bool(assignments))
    names = every_study(scale) if studies == ("all",) else studies
    runs = [run for name in names for run in read_study(name, scale).runs(places, overrides)]
    check_all(runs)
    for run in runs:
        seconds = run.result(console).seconds
        console.print(f"{run.study.name} {run.configuration}, seed {run.seed}: {seconds:.0f} s", soft_wrap=True)
        # Each compiled program maps memory, of which Linux grants a process 65530 pieces.
        jax.clear_caches()


@experiments.command("list")
def list_command() -> None:
    """Print the studies, and the number of their runs that are done."""
    table = Table("study", "scale", "configurations", "seeds", "done")
    for scale in SCALES:
        for name in every_study(scale):
            study = read_study(name, scale)
            sizes = len(study.configurations), len(study.seeds)
            table.add_row(
                name, scale, *map(str, sizes), f"{len(study.results(_places(None, scale)))}/{sizes[0] * sizes[1]}"
            )
    _console().print(table)


@experiments.command("report")
def report_command() -> None:
    """Compute every verdict from the results and write the pages of results with their plots."""
    for path in report.write(ROOT / "experiments"):
        _console().print(f"wrote {path.relative_to(ROOT)}", soft_wrap=True)


@experiments.command("check")
@click.argument("studies", nargs=-1)
@compiler_options
def check_command(
    studies: tuple[str, ...], platform: Platform, limit: float, again: bool, python: pathlib.Path | None
) -> None:
    """Compile the programs of every STUDY at the scale gpu, by default of all, for one chip that need not be there.

    Exit code 2 if one does not compile, or takes more memory than the chip has. Programs of the same code and settings
    are not compiled again.
    """
    for name in studies:
        read_study(name, "gpu")
    path = RESULTS / f"compiled_{platform}.json"
    document = compile_into(path, check.measure, platform, python, studies=studies, limit=limit, again=again)
    rows = [row for row in document["rows"] if not studies or row["case"]["study"] in studies]
    if unchecked := check.unchecked(studies):
        _console().print(f"not checked, as they train nothing and name no programs: {', '.join(unchecked)}")
    _console().print(f"{len(rows)} programs are compiled for a {document['chip']}", soft_wrap=True)
    if found := check.faults(rows):
        raise ConfigError(f"{len(found)} of {len(rows)} programs do not compile or do not fit: {'; '.join(found)}")


@experiments.command("capture")
@_of_one_run
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="valid", show_default=True)
@LAYERS
@click.option("--batch", type=click.IntRange(1, 65536), default=1, show_default=True, help="How many examples.")
@TO
def capture_command(chosen: Run, split: str, layers: str | None, batch: int, to: pathlib.Path) -> None:
    """Write q, k and v of a trained model's attention layers to an .npz that `approx-attention compare` reads.

    Trains the model first if its run has no checkpoint here.
    """
    with _training_run(chosen) as (settings, directory):
        model, dataset, _ = fit(settings, directory, _console())
        examples = data.held_out(dataset, split, batch, 1)[0]
        captured = capture_attention(model, lambda model: predict(model, examples))
    _write_layers(captured, layers, to)


@experiments.command("capture-model")
@click.argument("function", metavar="MODULE:FUNCTION")
@LAYERS
@TO
def capture_model_command(function: str, layers: str | None, to: pathlib.Path) -> None:
    """Write q, k and v of a Flax nnx model of your own to an .npz that `approx-attention compare` reads.

    FUNCTION of MODULE returns (model, run), and run(model) calls the model once.
    """
    module, colon, name = function.partition(":")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module can raise anything
        usual = isinstance(error, (ImportError, AttributeError, ValueError))
        detail = str(error) if usual else f"{type(error).__name__}: {error}"
        detail = detail if colon else "it is MODULE:FUNCTION, as in my_model:make"
        raise ConfigError(f"{function!r} cannot be imported: {detail}") from None
    try:
        made = make()
    except ImportError as error:
        raise ConfigError(f"{function!r}: {error}") from None
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[1]):
        raise ConfigError(f"{function!r} must return (model, run), and run(model) calls the model once")
    try:
        captured = capture_attention(*made)
    except ValueError as error:
        raise ConfigError(f"{function!r}: {error}") from error
    _write_layers(captured, layers, to)


def _write_layers(captured: dict[str, dict[str, np.ndarray]], layers: str | None, to: pathlib.Path) -> None:
    chosen = list(captured) if layers is None else layers.split(",")
    for name in chosen:
        if name not in captured:
            raise ConfigError(unknown("layer", name, captured))
    save_layers(to, {name: captured[name] for name in chosen})
    _console().print(f"wrote {', '.join(chosen)} to {to}; read all of them with --layers '*'", soft_wrap=True)


@experiments.command("sample")
@click.argument("study", default=SAMPLE)
@SCALE
@SET
@OUT
@click.option(
    "--to",
    type=Place(".npz"),
    help="The .npz to write; its provenance goes next to it as .txt.  [default: approx_attention/data/sample.npz]",
)
def sample_command(
    study: str, scale: str, assignments: tuple[str, ...], out: pathlib.Path | None, to: pathlib.Path | None
) -> None:
    """Write the sample that ships with the package, from the language model of STUDY; trains it first if need be."""
    if to is None and (assignments or study != SAMPLE):
        raise ConfigError("with other settings than its own the sample is written where --to says")
    to = to or ROOT / "approx_attention/data/sample.npz"
    console = _console()
    with _training_run(_run_of(study, scale, assignments, out)) as (settings, directory):
        provenance = write_sample(settings, directory, to, console)
    console.print_json(data=provenance)


@contextlib.contextmanager
def _training_run(run: Run) -> Iterator[tuple[TrainingConfig, pathlib.Path]]:
    """The settings and the directory of a run whose model is wanted."""
    if not isinstance(run.config, TrainingConfig):
        raise ConfigError(f"{run.study.path}: only a study of `experiments.trained` trains a model of one method")
    with run.held():
        yield run.config, run.directory


def _console() -> Console:
    """Prints names as they are: square brackets in them are no markup."""
    return Console(markup=False)


def _say(message: object, *_: Any, **__: Any) -> None:
    click.echo(f"experiments: {' '.join(str(message).split())}", err=True)


def main() -> int:
    """Runs the command line; exit code 2, with one line that says why, for input it cannot use."""
    # What orbax logs of files is said here, in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say
            # Not by click's own main, which says an empty line when it is interrupted.
            with experiments.make_context("python -m experiments", sys.argv[1:]) as context:
                experiments.invoke(context)
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
    except click.ClickException as error:
        _say(error.format_message())
    except ConfigError as error:
        _say(error)
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _say(f"{error.filename or 'the output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from what is done")
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
