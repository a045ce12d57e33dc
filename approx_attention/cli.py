"""The command line: ``approx-attention compare``, ``approx-attention plan`` and ``approx-attention methods``."""

import contextlib
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from approx_attention.checks import InputError, unknown
from approx_attention.compare import (
    comparison_table,
    default_methods,
    draw_frontiers,
    report,
    run_comparison,
    write_results,
)
from approx_attention.plan import draw_plan, plan_document, plan_table
from approx_attention.plan import plan as make_plan
from approx_attention.registry import METHODS, capability_table
from approx_attention.tensor_files import Tensors, load_sample, load_tensors


class CommaSeparated(click.ParamType):
    """Items between commas, each converted and none repeated."""

    def __init__(self, item: click.ParamType):
        self.item = item
        self.name = f"{item.name},..."

    def convert(self, value, param, ctx):
        """Splits the text and converts each item."""
        if isinstance(value, tuple):
            return value
        items = [item.strip() for item in value.split(",") if item.strip()]
        if not items:
            self.fail("give at least one, separated by commas", param, ctx)
        return tuple(dict.fromkeys(self.item.convert(item, param, ctx) for item in items))


class MethodName(click.ParamType):
    """The name of a registered method."""

    name = "method"

    def convert(self, value, param, ctx):
        """Accepts only names in the registry."""
        if value not in METHODS:
            self.fail(unknown("method", value, METHODS), param, ctx)
        return value


class Option(click.ParamType):
    """A hyper-parameter of one method."""

    name = "method.option=value"

    def convert(self, value, param, ctx):
        """Splits the text; a value that is no JSON is a text."""
        if isinstance(value, tuple):
            return value
        path, equals, text = value.partition("=")
        method, dot, option = path.partition(".")
        if not (equals and dot and option):
            self.fail(f"it reads METHOD.OPTION=VALUE, such as favor.block_size=64; got {value!r}", param, ctx)
        try:
            setting = json.loads(text)
        except ValueError:
            setting = text
        return MethodName().convert(method, param, ctx), option, setting


def _by_method(settings: Sequence[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {}
    for method, option, value in settings:
        options.setdefault(method, {})[option] = value
    return options


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="approx_attention")
def approx_attention() -> None:
    """Approximations of attention, measured on your tensors."""


@approx_attention.command()
def methods() -> None:
    """Print the methods and what each can do."""
    click.echo(capability_table())


_ON_TENSORS = (
    click.argument("file", required=False, type=click.Path(path_type=pathlib.Path)),
    click.option("--q", "q_name", default="q", show_default=True, help="Name of the queries in FILE."),
    click.option("--k", "k_name", default="k", show_default=True, help="Name of the keys."),
    click.option("--v", "v_name", default="v", show_default=True, help="Name of the values."),
    click.option(
        "--causal/--no-causal", default=None, help="Query t sees keys j <= t only.  [default: causal for the sample]"
    ),
    click.option(
        "--scale",
        type=click.FloatRange(min=0, min_open=True, max=1e30),
        help="Factor of the logits.  [default: 1/sqrt(D)]",
    ),
    click.option("--methods", "names", type=CommaSeparated(MethodName()), help="Methods to look at.  [default: all]"),
    click.option(
        "--set", "options", type=Option(), multiple=True, help="A hyper-parameter but the size: favor.block_size=64."
    ),
    click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Draws of random methods."),
    click.option(
        "--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, show_default=True, help="The first draw."
    ),
    click.option("--device", type=click.Choice(["cpu", "gpu", "tpu"]), help="Where to run.  [default: JAX's choice]"),
)


def on_tensors(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What the commands that measure have in common: FILE, its arrays, the methods, and where results NAME go."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        out = click.option(
            "--out",
            type=click.Path(path_type=pathlib.Path),
            default=name,
            show_default=True,
            help=f"Directory for {name}.json and {name}.png.",
        )
        for option in (out, *reversed(_ON_TENSORS)):
            command = option(command)
        return command

    return add


@approx_attention.command()
@on_tensors("compare")
@click.option(
    "--budget",
    "budgets",
    type=CommaSeparated(click.IntRange(min=1)),
    default="64,256",
    show_default=True,
    help="Sizes of summaries: landmarks, samples, features, window. Sizes that count other things are in proportion: "
    "at 256 every method has its usual size.",
)
@click.option("--window", type=click.IntRange(min=1), default=128, show_default=True, help="Where the far part begins.")
def compare(
    names: tuple[str, ...] | None,
    options: tuple[tuple[str, str, Any], ...],
    scale: float | None,
    budgets: tuple[int, ...],
    seeds: int,
    seed: int,
    window: int,
    out: pathlib.Path,
    **given: Any,
) -> None:
    """What does each approximation cost and lose, on the tensors in FILE?

    FILE is an .npz or .safetensors file with queries, keys and values, each [T, D], [T, N, D] or [B, T, N, D]; keys and
    values may have fewer heads. Without FILE, a sample from a small trained language model is used.
    """
    tensors, source, is_causal = _load("compare", out, scale, **given)
    console = _console()
    with _progress() as on_progress:
        rows = run_comparison(
            tensors,
            names or default_methods(is_causal),
            budgets,
            is_causal=is_causal,
            scale=scale,
            options=_by_method(options),
            window_size=window,
            num_seeds=seeds,
            seed=seed,
            on_progress=on_progress,
        )
    title = _title(tensors, source, is_causal)
    console.print(comparison_table(rows, title, window))
    settings = {
        "source": source,
        "is_causal": is_causal,
        "scale": scale,
        "methods": list(names or default_methods(is_causal)),
        "options": _by_method(options),
        "budgets": list(budgets),
        "num_seeds": seeds,
        "seed": seed,
        "window_size": window,
    }
    _write(console, out, "compare", report(rows, tensors, settings), lambda: draw_frontiers(rows, title))


@approx_attention.command()
@on_tensors("plan")
@click.option(
    "--tolerance", type=float, required=True, help="Relative error that is allowed, as `compare` measures it."
)
@click.option("--max-bytes", type=int, help="Bytes that may be held per key head and sequence.")
@click.option("--max-milliseconds", type=float, help="Time that a call on these tensors may take.")
@click.option("--held-out", type=float, default=0.5, show_default=True, help="Share of the heads kept for the check.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the bound of unseen heads' error.")
def plan(
    names: tuple[str, ...] | None,
    options: tuple[tuple[str, str, Any], ...],
    scale: float | None,
    seeds: int,
    seed: int,
    tolerance: float,
    max_bytes: int | None,
    max_milliseconds: float | None,
    held_out: float,
    confidence: float,
    out: pathlib.Path,
    **given: Any,
) -> None:
    """Which method, of what size, stays below a tolerance on the tensors in FILE, and is the cheapest?

    Every method is measured at a few sizes on part of the heads; what the error of unseen heads stays below is fitted
    against size, and the smallest size that meets the tolerance is checked on the other heads and timed beside exact
    attention. FILE is as in `compare`; without it, the sample is used. The fastest is recommended; with --max-bytes
    alone, the one that holds the fewest bytes.
    """
    tensors, source, is_causal = _load("plan", out, scale, **given)
    console = _console()
    with _progress() as on_progress:
        made = make_plan(
            tensors,
            tolerance=tolerance,
            max_bytes=max_bytes,
            max_seconds=None if max_milliseconds is None else max_milliseconds / 1e3,
            is_causal=is_causal,
            scale=scale,
            methods=names,
            options=_by_method(options),
            held_out=held_out,
            confidence=confidence,
            num_seeds=seeds,
            seed=seed,
            on_progress=on_progress,
        )
    title = _title(tensors, source, is_causal)
    console.print(plan_table(made, title))
    console.print(made.verdict, highlight=False)
    settings = {
        "source": source,
        "is_causal": is_causal,
        "scale": scale,
        "methods": list(names or default_methods(is_causal)),
        "options": _by_method(options),
        "held_out": held_out,
        "num_seeds": seeds,
        "seed": seed,
    }
    document = report(made.candidates, tensors, settings) | {"plan": plan_document(made)}
    _write(console, out, "plan", document, lambda: draw_plan(made, title))


def _load(
    name: str,
    out: pathlib.Path,
    scale: float | None,
    *,
    file: pathlib.Path | None,
    q_name: str,
    k_name: str,
    v_name: str,
    causal: bool | None,
    device: str | None,
) -> tuple[Tensors, str, bool]:
    """The tensors, what to call them, and whether attention is causal, once there is somewhere to write."""
    if scale is not None and math.isnan(scale):
        raise InputError("--scale must be a positive number, got nan")
    _use_device(device)
    tensors = load_sample() if file is None else load_tensors(file, (q_name, k_name, v_name))
    _require_writable(out, name)
    return tensors, "the shipped sample" if file is None else file.name, file is None if causal is None else causal


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda label, done, total: progress.update(task, description=label, completed=done, total=total)


def _title(tensors: Tensors, source: str, is_causal: bool) -> str:
    batch, length, heads, head_dim = tensors.query.shape
    return (
        f"{source}: {'causal' if is_causal else 'bidirectional'}, B={batch} T={length} S={tensors.key.shape[1]} "
        f"heads={heads}/{tensors.key.shape[2]} D={head_dim}, {jax.devices()[0].device_kind}"
    )


def _write(console: Console, out: pathlib.Path, name: str, document: dict[str, Any], draw: Callable[[], Any]) -> None:
    written = write_results(out, name, document, draw)
    console.print(f"wrote {' and '.join(map(str, written))}")
    if len(written) < 2:
        console.print("no figure: it needs matplotlib, as in pip install 'approx_attention[plot]'")


def _require_writable(out: pathlib.Path, name: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"cannot write to the directory {out}: {error.strerror}") from None
    for path in (out / f"{name}.json", out / f"{name}.png"):
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a directory")


def _use_device(device: str | None) -> None:
    if device is not None:
        jax.config.update("jax_platforms", device)
    try:
        jax.devices()
    except RuntimeError:
        raise InputError(f"JAX finds no device of kind {device!r} on this machine") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 2, with one line that says why, for input it cannot use."""
    try:
        return approx_attention.main(arguments, prog_name="approx-attention", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
    except (click.ClickException, InputError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"approx-attention: {' '.join(message.split())}", err=True)
    except click.Abort:
        click.echo("approx-attention: interrupted", err=True)
        return 130
    except (OSError, MemoryError) as error:
        click.echo(f"approx-attention: {' '.join(str(error).split()) or 'out of memory'}", err=True)
        return 1
    except jax.errors.JaxRuntimeError as error:
        click.echo(f"approx-attention: the device gave up: {str(error).splitlines()[0]}", err=True)
        return 1
    return 2
