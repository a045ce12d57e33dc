"""The options and the types of arguments that commands share."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import click

from approx_attention.core import InputError, hashable, unknown
from approx_attention.registry import METHODS

WINDOW = (
    "A window of w contains, under --causal, the query's own token and the w - 1 tokens before it (w in all), else "
    "its own and w - 1 to each side (2w - 1 in all)."
)


class CommaSeparated(click.ParamType):
    """Distinct items separated by commas, each converted."""

    def __init__(self, item: click.ParamType):
        self.item = item
        self.name = f"{item.name},..."

    def convert(self, value, param, ctx):
        """Split the text and convert each item."""
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
        """Accept only names in the registry."""
        if value not in METHODS:
            self.fail(unknown("method", value, METHODS), param, ctx)
        return value


class Option(click.ParamType):
    """A hyper-parameter of one method."""

    name = "method.option=value"

    def convert(self, value, param, ctx):
        """Split the text; a value that is not JSON is a string."""
        if isinstance(value, tuple):
            return value
        path, equals, text = value.partition("=")
        method, dot, option = path.partition(".")
        if not (equals and dot and option):
            self.fail(f"must be METHOD.OPTION=VALUE, such as favor.block_size=64; got {value!r}", param, ctx)
        try:
            setting = json.loads(text)
        except (ValueError, RecursionError):
            setting = text
        return MethodName().convert(method, param, ctx), option, hashable(setting)


class Directory(click.ParamType):
    """A directory for results, which need not exist yet."""

    name = "directory"

    def convert(self, value, param, ctx):
        """Reject an empty name, which pathlib would take for the current directory."""
        if not str(value).strip():
            self.fail("give a directory; the current one is '.'", param, ctx)
        return pathlib.Path(value)


ARRAYS = (
    click.option("--q", "q_name", default="q", show_default=True, help="Name of the queries in FILE."),
    click.option("--k", "k_name", default="k", show_default=True, help="Name of the keys."),
    click.option("--v", "v_name", default="v", show_default=True, help="Name of the values."),
    click.option(
        "--layers",
        metavar="PATTERN",
        help="Names of several layers of FILE, such as 'layer*' for layer0.q, layer0.k, layer0.v, layer1.q, ... (also "
        "layer0/q, layer0_q). Prints a table for each layer, and a summary.",
    ),
    click.option(
        "--lengths",
        metavar="NAME",
        help="Name of an integer array [B] in FILE, or in each layer: the number of real tokens of each sequence. "
        "Padding is then hidden, and errors are those of real queries (of all queries where T differs from S).",
    ),
    click.option(
        "--mask", metavar="NAME", help="Name of the boolean array [B, S] in FILE that is true where a key is real."
    ),
)
DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "gpu", "tpu"]), help="Where to run.  [default: JAX's choice]"
)
_FILE = (
    click.argument("file", required=False, type=click.Path(path_type=pathlib.Path)),
    *ARRAYS,
    click.option(
        "--causal/--no-causal",
        default=None,
        help="Query t sees keys j <= t only.  [default: that of a captured layer; causal for the sample]",
    ),
    click.option(
        "--scale",
        type=click.FloatRange(min=0, min_open=True, max=1e30),
        help="Factor of the logits.  [default: that of a captured layer, else 1/sqrt(D)]",
    ),
)
_METHODS = (
    click.option(
        "--methods",
        "names",
        type=CommaSeparated(MethodName()),
        help="Methods to measure.  [default: all that cost less than exact attention]",
    ),
    click.option(
        "--set",
        "options",
        type=Option(),
        multiple=True,
        help="A hyper-parameter other than the size: favor.block_size=64.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0, max=2**31 - 1),
        default=0,
        show_default=True,
        help="Seed of the first random projection or sample.",
    ),
)


def arrays(command: Callable[..., None]) -> Callable[..., None]:
    """The options that name the arrays of a file."""
    for option in reversed(ARRAYS):
        command = option(command)
    return command


@dataclasses.dataclass(frozen=True)
class Given:
    """The options that all measuring commands share, as given."""

    file: pathlib.Path | None
    q_name: str
    k_name: str
    v_name: str
    layers: str | None
    lengths: str | None
    mask: str | None
    causal: bool | None
    scale: float | None
    device: str | None
    out: pathlib.Path
    names: tuple[str, ...] | None = None
    options: tuple[tuple[str, str, Any], ...] = ()
    seeds: int = 1
    seed: int = 0

    def options_by_method(self) -> dict[str, dict[str, Any]]:
        """The hyper-parameters by the name of the method."""
        options: dict[str, dict[str, Any]] = {}
        for method, option, value in self.options:
            if option in options.setdefault(method, {}):
                raise InputError(f"--set gives {method}.{option} twice")
            options[method][option] = value
        return options


def on_tensors(
    name: str, least_seeds: int | None, endings: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options that all measuring commands share: FILE, its arrays, the methods, and the directory of results.

    The command receives them as its first argument, `Given`. Without seeds it runs no methods.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        seeds = click.option(
            "--seeds",
            type=click.IntRange(min=least_seeds or 1),
            default=3,
            show_default=True,
            help="Seeds of random methods" + ("." if least_seeds == 1 else "; a bound needs at least two."),
        )
        out = click.option(
            "--out",
            type=Directory(),
            default=name,
            show_default=True,
            help=f"Directory for {endings}. Files of an earlier run are replaced. Two runs at once need two "
            "directories.",
        )

        @functools.wraps(command)
        def gathered(**parameters: Any) -> None:
            named = [field.name for field in dataclasses.fields(Given) if field.name in parameters]
            given = Given(**{field: parameters.pop(field) for field in named})
            command(given, **parameters)

        methods = () if least_seeds is None else (*_METHODS[:-1], seeds, _METHODS[-1])
        for option in (out, *reversed((*_FILE, *methods, DEVICE))):
            gathered = option(gathered)
        return gathered

    return add
