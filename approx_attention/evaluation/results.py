"""Files of results: JSON with the environment, Markdown and a figure, each written atomically."""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from approx_attention.evaluation.atomic import write_atomically
from approx_attention.evaluation.files import Tensors


def environment() -> dict[str, Any]:
    """The versions of the library, JAX, NumPy and Python, and the device and the processor, for results files."""
    # The device of computations, which `jax.default_device` may set to another than the first.
    (device,) = jnp.zeros(()).devices()
    return {
        "approx_attention": importlib.metadata.version("approx_attention"),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "backend": device.platform,
        "device": device.device_kind,
        "processor": processor_name(),
        "processor_cores": os.cpu_count(),
    }


def processor_name() -> str:
    """The processor's model name if the system reports it, else its architecture."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def report(rows: Sequence[Any], tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make a JSON document of measurements, tensors, settings and environment.

    Args:
        rows: `Comparison` or other dataclasses.
        tensors: the tensors of the measurement.
        settings: the settings of the measurement.

    Returns:
        The document, with None in place of numbers that are not finite.
    """
    return finite(
        {
            "settings": dict(settings),
            "shapes": {name: list(x.shape) for name, x in tensors._asdict().items()},
            "environment": environment(),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
    )


def finite(document: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not support, by None."""
    if isinstance(document, Mapping):
        return {name: finite(x) for name, x in document.items()}
    if isinstance(document, list | tuple):
        return [finite(x) for x in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def write_results(
    out: pathlib.Path, name: str, document: Mapping[str, Any], draw: Callable[[], Any], markdown: str | None = None
) -> tuple[list[pathlib.Path], str]:
    """Write NAME.json, NAME.md and, if possible, NAME.png, each atomically; removes the figure of an earlier run.

    Args:
        out: an existing directory.
        name: the name of the files without ending.
        document: the content of the JSON file.
        draw: makes the figure.
        markdown: the text of NAME.md, if there is one.

    Returns:
        The written files, and the reason if there is no figure.
    """
    written = [out / f"{name}.json"]
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_atomically(written[0], lambda file: file.write(text.encode()))
    if markdown is not None:
        written.append(out / f"{name}.md")
        write_atomically(written[-1], lambda file: file.write(markdown.encode(errors="replace")))
    picture = out / f"{name}.png"
    # The figure of an earlier run.
    picture.unlink(missing_ok=True)
    try:
        figure = draw()
        write_atomically(picture, lambda file: figure.savefig(file, format="png"))
    except ImportError:
        return written, "it needs matplotlib: pip install 'approx_attention[plot]'"
    except Exception as error:  # a failing figure must not lose the measurements
        return written, " ".join(f"{type(error).__name__}: {error}".split())
    return [*written, picture], ""
