"""The command line: ``approx-attention compare``, ``plan``, ``check``, ``heads`` and ``methods``."""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
import jax

from approx_attention.cli_options import (
    DEVICE,
    WINDOW,
    CommaSeparated,
    Directory,
    Given,
    arrays,
    on_tensors,
)
from approx_attention.core import InputError
from approx_attention.evaluation import (
    HeadDiagnosis,
    Interrupted,
    Layer,
    Measurement,
    OnProgress,
    Plan,
    Policy,
    Problem,
    Task,
    capability_table,
    comparison_kind,
    default_methods,
    diagnose,
    heads_kind,
    load_layers,
    load_sample,
    only_run,
    outputs,
    plan_kind,
    run,
    run_comparison,
    run_model_plan,
    run_policy_check,
    sample_layers,
    terminable,
)
from approx_attention.evaluation import plan as make_plan

# The exit codes that shells give to SIGINT and SIGTERM.
INTERRUPTED = (130, 143)


class Group(click.Group):
    """A group of commands that reports an interruption in one line."""

    def invoke(self, ctx):
        """Run the command; the exit code names the signal that interrupted it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as signal:
            raise Interrupted(signal) from None


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="approx_attention")
def approx_attention() -> None:
    """Measure approximations of attention on your tensors."""


@approx_attention.command()
def methods() -> None:
    """Print the methods and their capabilities."""
    click.echo(capability_table())


@approx_attention.command()
@on_tensors("compare", least_seeds=1, endings="compare.json and compare.png")
@click.option(
    "--budget",
    "budgets",
    type=CommaSeparated(click.IntRange(min=1)),
    default="64,256",
    show_default=True,
    help="Sizes of summaries: landmarks, samples, features, window. Other sizes scale in proportion: "
    f"256 stands for the default size of every method. {WINDOW}",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Window (of `local`) beyond which keys count as far.",
)
def compare(given: Given, budgets: tuple[int, ...], window: int) -> None:
    """Measure the error, time and memory of each approximation on the tensors in FILE.

    FILE is an .npz or .safetensors file with queries, keys and values, each [T, D], [T, N, D] or [B, T, N, D]; keys and
    values may have fewer heads. Without FILE, the command uses a sample from a small trained language model.

    Results are written before they are printed. An interrupted run writes the rows that it has measured.
    """
    with _task("compare", given) as task:
        options = given.options_by_method()
        settings = task.settings | {
            "options": options,
            "budgets": list(budgets),
            "num_seeds": given.seeds,
            "seed": given.seed,
            "window_size": window,
        }

        def measure(layer: Layer, keep: Callable[[list[Any]], None], on_progress: OnProgress) -> list[Any]:
            so_far: list[Any] = []

            def keep_row(row: Any) -> None:
                so_far.append(row)
                keep(so_far)

            return run_comparison(
                Problem.of(layer.tensors, is_causal=bool(layer.is_causal), scale=layer.scale, mask=layer.kv_mask),
                task.names,
                budgets,
                options=options,
                window_size=window,
                num_seeds=given.seeds,
                seed=given.seed,
                on_progress=on_progress,
                on_row=keep_row,
            )

        run(task, settings, comparison_kind(window, is_padded=task.is_padded), measure)


@approx_attention.command()
@on_tensors("plan", least_seeds=2, endings="plan.json and plan.png")
@click.option(
    "--tolerance", type=float, required=True, help="Largest relative error allowed, as `compare` measures it."
)
@click.option("--max-bytes", type=int, help="Most cache bytes per key head and sequence.")
@click.option(
    "--max-milliseconds",
    type=float,
    help="Longest time of a call on these tensors, as measured on this machine while planning.",
)
@click.option(
    "--held-out",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of the heads (with --policy, of the queries of each) kept for the check.",
)
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Confidence of the error bound.")
@click.option(
    "--policy",
    type=click.Path(path_type=pathlib.Path),
    help="Choose a method for each key head of each layer, and write the choices to this JSON file. The tolerance "
    "applies to each head; budgets apply to all layers and heads together.",
)
@click.option("--decode", is_flag=True, help="With --policy: only methods that can decode with a cache.")
def plan(
    given: Given,
    tolerance: float,
    max_bytes: int | None,
    max_milliseconds: float | None,
    held_out: float,
    confidence: float,
    policy: pathlib.Path | None,
    decode: bool,
) -> None:
    """Recommend the cheapest method and size whose error stays below a tolerance on the tensors in FILE.

    Every method is measured at a few sizes on part of the heads. A bound of the error of unseen heads is fitted
    against size. The smallest size that meets the tolerance is checked on the other heads and timed with exact
    attention. FILE is as in `compare`; without it, the command uses the sample. The fastest method is recommended;
    with --max-bytes alone, the method with the fewest cache bytes.

    The size of `local` and `longformer` is a window. A window of w contains, under --causal, the query's own token
    and the w - 1 tokens before it (w in all), else its own and w - 1 to each side (2w - 1 in all).

    Results are written before they are printed. An interrupted run without --policy writes the bounds
    that it has fitted.
    """
    max_seconds = None if max_milliseconds is None else max_milliseconds / 1e3
    if max_seconds is not None and not 0 < max_seconds < 1e30:
        raise InputError(f"--max-milliseconds must be a positive number, got {max_milliseconds}")
    if decode and policy is None:
        raise InputError("--decode can only be given with --policy")
    with _task("plan", given) as task:
        options = given.options_by_method()
        measured = {"held_out": held_out, "num_seeds": given.seeds, "seed": given.seed}
        measurement = Measurement(confidence=confidence, **measured)
        settings = task.settings | {"options": options} | measured
        asked: dict[str, Any] = {"tolerance": tolerance, "max_bytes": max_bytes, "max_seconds": max_seconds}
        asked |= {"options": options, "measurement": measurement}
        if policy is not None:
            asked |= {"decode": decode, "methods": given.names}
            run_model_plan(task, policy, settings | {"decode": decode}, asked)
            return

        def measure(layer: Layer, keep: Callable[[Plan], None], on_progress: OnProgress) -> Plan:
            return make_plan(
                layer.tensors,
                is_causal=bool(layer.is_causal),
                scale=layer.scale,
                methods=task.names,
                mask=layer.kv_mask,
                **asked,
                on_progress=on_progress,
                on_part=keep,
            )

        run(task, settings, plan_kind(), measure)


@approx_attention.command()
@on_tensors("heads", least_seeds=None, endings="heads.json, heads.md and heads.png")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help=f"Number of keys of the ideal methods that heads are compared with, and the window. {WINDOW}",
)
@click.option("--tolerance", type=float, default=0.1, show_default=True, help="Largest relative error allowed.")
@click.option(
    "--queries", type=click.IntRange(min=1), default=512, show_default=True, help="Most queries analysed per sequence."
)
def heads(given: Given, size: int, tolerance: float, queries: int) -> None:
    """Say which heads in FILE can be approximated, by which methods, and which theorems apply at their norms.

    FILE is as in `compare`; without it, the command uses the two layers of the sample.
    """
    with _task("heads", given) as task:
        task = task if given.file else task._replace(layers=_as_asked(sample_layers(), given))
        settings = {name: x for name, x in task.settings.items() if name != "methods"}
        settings |= {"size": size, "tolerance": tolerance, "num_queries": queries}

        def measure(layer: Layer, keep: Callable[[Any], None], on_progress: OnProgress) -> list[HeadDiagnosis]:
            return diagnose(
                layer.tensors,
                is_causal=bool(layer.is_causal),
                scale=layer.scale,
                size=size,
                tolerance=tolerance,
                num_queries=queries,
                mask=layer.kv_mask,
                on_progress=on_progress,
            )

        run(task, settings, heads_kind(size, tolerance), measure)


@approx_attention.command()
@click.argument("policy", type=click.Path(path_type=pathlib.Path))
@click.argument("file", type=click.Path(path_type=pathlib.Path))
@arrays
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Seeds of random methods.")
@click.option("--seed", type=click.IntRange(min=0, max=2**31 - 1), default=0, show_default=True, help="The first seed.")
@DEVICE
@click.option(
    "--out", type=Directory(), default="check", show_default=True, help="Directory for check.json, .md, .png."
)
def check(
    policy: pathlib.Path,
    file: pathlib.Path,
    q_name: str,
    k_name: str,
    v_name: str,
    layers: str | None,
    lengths: str | None,
    mask: str | None,
    seeds: int,
    seed: int,
    device: str | None,
    out: pathlib.Path,
) -> None:
    """Check a POLICY from `plan --policy` on the tensors in FILE, from another text.

    Prints and writes the error of each key head of each layer, and says which errors exceed the tolerance.
    """
    _use_device(device)
    made = Policy.load(policy)
    pattern = layers or (None if list(made.layers) == [""] else "*")
    loaded = load_layers(file, (q_name, k_name, v_name), layers=pattern, lengths=lengths, mask=mask)
    settings = {"policy": policy.name, "source": file.name, "num_seeds": seeds, "seed": seed}
    with only_run(out, "check"):
        run_policy_check(out, made, loaded, file.name, settings, num_seeds=seeds, seed=seed)


@contextlib.contextmanager
def _task(kind: str, given: Given) -> Iterator[Task]:
    """The tensors and methods of a run, which locks its output directory against other runs."""
    file, scale = given.file, given.scale
    # A range of click lets NaN pass.
    if scale is not None and math.isnan(scale):
        raise InputError("--scale must be a positive number, got nan")
    arrays = {"layers": given.layers, "lengths": given.lengths, "mask": given.mask}
    arrays = {option: name for option, name in arrays.items() if name is not None}
    if file is None and arrays:
        options = " and ".join(f"--{option}" for option in arrays)
        raise InputError(f"{options} can only be given with a FILE; the sample is one layer without padding")
    _use_device(given.device)
    loaded = {"": Layer(load_sample(), None, is_causal=True)}
    if file is not None:
        loaded = load_layers(file, (given.q_name, given.k_name, given.v_name), **arrays)
    loaded = _as_asked(loaded, given)
    for name, layer in loaded.items():
        (_, tokens, heads, _), (_, num_keys, key_heads, _) = (x.shape for x in layer.tensors[:2])
        if tokens < heads and num_keys < key_heads:
            found = f"{name and f'{name}: '}{tokens} tokens and {heads} heads"
            click.echo(f"note: {found}; is the layout [B, N, T, D]? It must be [B, T, N, D]", err=True)
    by_layer = {name: bool(layer.is_causal) for name, layer in loaded.items()}
    is_causal = by_layer if len({*by_layer.values()}) > 1 else any(by_layer.values())
    chosen = given.names or tuple(default_methods(any(by_layer.values())))
    source = "the shipped sample" if file is None else file.name
    settings = {"source": source, "is_causal": is_causal, "scale": scale, "methods": list(chosen), **arrays}
    with only_run(given.out, kind):
        yield Task(given.out, source, loaded, chosen, settings)


def _as_asked(layers: Mapping[str, Layer], given: Given) -> dict[str, Layer]:
    """Layers with the given causality and scale, by default those of the file."""
    own = {"is_causal": given.causal, "scale": given.scale}
    asked: Any = {name: x for name, x in own.items() if x is not None}
    return {path: layer._replace(**asked) for path, layer in layers.items()}


def _use_device(device: str | None) -> None:
    if device is not None:
        jax.config.update("jax_platforms", device)
    try:
        jax.devices()
    except RuntimeError:
        kind = device or jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        of_kind = f" of kind {kind!r}{'' if device else ', which JAX_PLATFORMS names,'}" if kind else ""
        raise InputError(f"JAX finds no device{of_kind} on this machine") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2, with one line of explanation, for invalid input.

    Without arguments it uses those of the process, and ends the process if it is interrupted.
    """
    with terminable() as ignore_signals:
        with outputs() as out:
            code = _exit_code(arguments, ignore_signals)
            ignore_signals()
            out.flush()
            if out.error:
                click.echo(f"approx-attention: cannot write to standard output: {out.error}", err=True)
            code = code or int(bool(out.error))
        if arguments is None and code in INTERRUPTED:
            # While XLA is at work, Python's own exit can crash, and a further signal would print a traceback.
            os._exit(code)
        return code


def _exit_code(arguments: Sequence[str] | None, ignore_signals: Callable[[], None]) -> int:
    try:
        return approx_attention.main(arguments, prog_name="approx-attention", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
    except (click.ClickException, InputError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"approx-attention: {' '.join(message.split())}", err=True)
        if isinstance(error, Interrupted):
            # Inside the handler: afterwards the arrays that the error refers to are freed, which can take long.
            ignore_signals()
            return INTERRUPTED[error.is_terminated]
    except click.Abort:
        click.echo("approx-attention: interrupted", err=True)
        ignore_signals()
        return INTERRUPTED[0]
    except (OSError, MemoryError) as error:
        click.echo(f"approx-attention: {' '.join(str(error).split()) or 'out of memory'}", err=True)
        return 1
    except jax.errors.JaxRuntimeError as error:
        click.echo(f"approx-attention: the device failed: {str(error).splitlines()[0]}", err=True)
        return 1
    return 2
