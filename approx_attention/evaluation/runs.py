"""Runs of commands: layers are measured one by one; results are written before they are printed, or on an interrupt."""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click
import jax

from approx_attention.core import InputError
from approx_attention.evaluation.files import Layer
from approx_attention.evaluation.programs import shared_programs
from approx_attention.evaluation.results import finite, report, write_results
from approx_attention.evaluation.terminal import Terminated, end_if_asked, only_holder, progress, say

OnProgress = Callable[[str, int, int], None]


class Interrupted(click.ClickException):
    """The end of an interrupted run, with the exit code that shells give to its signal.

    Args:
        signal: the interrupt.
        message: the end of the error message, such as where the results are.
    """

    def __init__(self, signal: KeyboardInterrupt, message: str = ""):
        self.is_terminated = isinstance(signal, Terminated)
        super().__init__(f"{'terminated' if self.is_terminated else 'interrupted'}{message}")


class Task(NamedTuple):
    """The layers that a command measures, and its output directory.

    Attributes:
        out: the output directory.
        source: name of the tensors, for titles.
        layers: the layers by name; a single layer without a name is called "".
        names: names of the methods.
        settings: the options of the command, for the JSON document.
    """

    out: pathlib.Path
    source: str
    layers: Mapping[str, Layer]
    names: tuple[str, ...]
    settings: dict[str, Any]

    def title(self, layer: str) -> str:
        """A title with the layer and its shapes."""
        (query, key, _), kv_mask, is_causal, _ = self.layers[layer]
        batch, length, heads, head_dim = query.shape
        padded = "" if kv_mask is None else ", padded"
        return (
            f"{shown_name(self.source)}{layer and f', {shown_name(layer)}'}: "
            f"{'causal' if is_causal else 'bidirectional'}{padded}, B={batch} T={length} S={key.shape[1]} "
            f"heads={heads}/{key.shape[2]} D={head_dim}, {jax.devices()[0].device_kind}"
        )

    @property
    def is_padded(self) -> bool:
        """Whether some tokens are padding."""
        return any(layer.kv_mask is not None for layer in self.layers.values())

    @property
    def over_layers(self) -> str:
        """The title of the results over all layers."""
        return f"{shown_name(self.source)}: {len(self.layers)} layers"


def shown_name(name: str) -> str:
    """A name with question marks in place of bytes that are not UTF-8."""
    return name.encode(errors="replace").decode()


class Kind(NamedTuple):
    """The files, tables and figures that a command makes of the results of its layers.

    Attributes:
        name: the name of the files.
        rows: makes the rows of a result.
        more: makes further content of the JSON file.
        shown: makes the tables and texts of a layer, with a title.
        draw: draws the figure of a layer.
        over_layers: makes the rows of the summary.
        summary: makes the tables of the summary.
        draw_layers: draws the figure of all layers.
        markdown: makes the text of NAME.md from the results and titles of the layers, if there is one.
    """

    name: str
    rows: Callable[[Any], Sequence[Any]]
    more: Callable[[Any], dict[str, Any]]
    shown: Callable[[Any, str], list[Any]]
    draw: Callable[[Any, str], Any]
    over_layers: Callable[[dict[str, Any]], list[Any]]
    summary: Callable[[dict[str, Any], str], list[Any]]
    draw_layers: Callable[[dict[str, Any], str], Any]
    markdown: Callable[[dict[str, Any], dict[str, str]], str] | None = None


def run(
    task: Task,
    settings: dict[str, Any],
    kind: Kind,
    measure: Callable[[Layer, Callable[[Any], None], OnProgress], Any],
) -> None:
    """Measure every layer, write the results after each and after an interrupt, and then print them.

    Args:
        task: the layers, and the output directory.
        settings: the settings in the JSON document.
        kind: the files, tables and figures to make.
        measure: ``(layer, keep, on_progress) -> result``; ``keep(result)`` stores a result so far.

    Raises:
        Interrupted: SIGINT or SIGTERM; the results so far are written first.
        InputError: from ``measure``, with the place of the results so far.
        OSError: results cannot be written; all layers are measured and printed first.
    """
    results: dict[str, Any] = {}
    has_layers = "" not in task.layers
    num_measured = 0

    def write() -> tuple[list[pathlib.Path], str]:
        parts = {
            layer: report(kind.rows(result), task.layers[layer].tensors, settings) | finite(kind.more(result))
            for layer, result in results.items()
        }
        document = parts.get("", {})
        if has_layers:
            common = {"settings": settings, "environment": next(iter(parts.values()))["environment"]}
            own = {layer: {k: x for k, x in part.items() if k not in common} for layer, part in parts.items()}
            over = [dataclasses.asdict(row) for row in kind.over_layers(results)]
            document = finite(common | {"layers": own, "summary": over})
        document["is_complete"] = num_measured == len(task.layers)

        def picture() -> Any:
            if len(task.layers) > 1:
                return kind.draw_layers(results, task.over_layers)
            (layer,) = results
            return kind.draw(results[layer], task.title(layer))

        text = kind.markdown and kind.markdown(results, {layer: task.title(layer) for layer in results})
        return write_results(task.out, kind.name, document, picture, text)

    failure, written, no_figure = None, [], ""
    programs: dict[bytes, Any] = {}
    try:
        for layer in task.layers:

            def keep(result: Any, layer: str = layer) -> None:
                results[layer] = result
                end_if_asked()

            kv_mask = task.layers[layer].kv_mask
            own = programs.setdefault(b"" if kv_mask is None else kv_mask.tobytes(), {}) if has_layers else {}
            with shared_programs(own), progress(f"{layer}: " if has_layers else "") as on_progress:
                results[layer] = measure(task.layers[layer], keep, on_progress)
            num_measured += 1
            try:
                written, no_figure = write()
                failure = None
            except OSError as error:
                failure = error
            say(*kind.shown(results[layer], task.title(layer)))
    except BaseException as error:
        _write_the_rest(error, write if results else None)
        raise
    if len(task.layers) > 1:
        say(*kind.summary(results, task.over_layers))
    if failure is not None:
        raise failure
    say(f"wrote {' and '.join(map(str, written))}")
    if no_figure:
        say(f"no figure: {no_figure}")


def _write_the_rest(error: BaseException, write: Callable[[], Any] | None) -> None:
    """Write the measurements before an error or an interrupt."""
    where = "before anything was measured"
    if write:
        try:
            written, _ = write()
            where = f"the measurements so far are in {' and '.join(map(str, written))}"
        except OSError as failure:
            where = f"the measurements so far cannot be written: {failure}"
    if isinstance(error, KeyboardInterrupt):
        raise Interrupted(error, f"; {where}" if write else f" {where}") from None
    if isinstance(error, InputError):
        raise InputError(f"{error}; {where}" if write else str(error)) from None
    if write:
        click.echo(f"approx-attention: {where}", err=True)


@contextlib.contextmanager
def only_run(out: pathlib.Path, kind: str) -> Iterator[None]:
    """Make and lock an output directory, as a context.

    Args:
        out: the directory.
        kind: the name of the files that a run writes there.

    Raises:
        InputError: the directory or a file in it cannot be written, or another run holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, ValueError) as error:
        is_file = isinstance(error, FileExistsError)
        reason = "it is a file" if is_file else getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to the directory {out}: {reason}") from None
    for path in (out / f"{kind}.{ending}" for ending in ("json", "md", "png")):
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a directory")
    with only_holder(out) as is_held:
        if not is_held:
            raise InputError(f"another run is writing to {out}; use another --out, or wait until it ends")
        yield
