"""Commands that compile for an absent accelerator: their options, and the files of their rows."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import click

from benchmarks.ahead_of_time import Platform
from benchmarks.files import HERE, write_document


def compiler_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options ``--platform``, ``--limit``, ``--again`` and ``--python``."""
    options = (
        click.option("--platform", type=click.Choice(["tpu", "gpu"]), required=True, help="The target platform."),
        click.option("--limit", type=click.FloatRange(min=1), default=900, show_default=True, help="Seconds per case."),
        click.option("--again", is_flag=True, help="Compile again what was compiled from the same code."),
        click.option(
            "--python",
            type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
            help="Interpreter of an environment with the platform's compiler.  [default: .venv-PLATFORM/bin/python]",
        ),
    )
    return functools.reduce(lambda command, option: option(command), reversed(options), command)


def compile_into(
    path: pathlib.Path,
    measure: Callable[..., None],
    platform: Platform,
    python: pathlib.Path | None,
    library: pathlib.Path = HERE.parent,
    **options: Any,
) -> dict[str, Any]:
    """Compile cases into a document, except those that it has, and return the document.

    Raises:
        click.ClickException: the compiler is not installed.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    # The path of a symbolic link identifies the environment, so links are not resolved.
    python = (python or HERE.parent / f".venv-{platform}" / "bin" / "python").absolute()
    try:
        measure(platform, python, library, known, functools.partial(write_document, path), **options)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    return json.loads(path.read_text())
