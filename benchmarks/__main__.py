"""``python -m benchmarks COMMAND``: measures, or turns the measurements into RESULTS.md."""

import json
import pathlib

import click
import jax
from rich.console import Console

from approx_attention.evaluation import write_atomically
from benchmarks import (
    collectives,
    control_variates,
    coresets,
    decode,
    exact,
    low_rank,
    report,
    scaling,
    sparse_patterns,
    tensor,
    wire,
)

HERE = pathlib.Path(__file__).parent


@click.group()
def main() -> None:
    """Speed and memory, side by side in one run. Keep the machine otherwise idle."""


def _write(name: str, document: dict) -> None:
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(document, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    Console().print(f"wrote {path.relative_to(HERE.parent)}")


@main.command("exact")
@click.option("--longest", type=click.IntRange(min=512), default=16384, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
def exact_command(longest: int, rounds: int) -> None:
    """Exact attention against jax.nn and PyTorch."""
    _write("exact", exact.measure(longest, rounds))


@main.command("scaling")
@click.option("--longest", type=click.IntRange(min=512), default=32768, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def scaling_command(longest: int, rounds: int) -> None:
    """Every method against the fastest exact attention as the sequence grows."""
    # A machine of another kind has a file of its own.
    backend = jax.default_backend()
    _write("scaling" if backend == "cpu" else f"scaling_{backend}", scaling.measure(longest, rounds))


@main.command("control-variates")
@click.option("--longest", type=click.IntRange(min=2048), default=32768, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def control_variates_command(longest: int, rounds: int) -> None:
    """FAVOR+, LARA and EVA against exact attention and PyTorch."""
    _write("control_variates", control_variates.measure(longest, rounds))


@main.command("coresets")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def coresets_command(rounds: int) -> None:
    """What coresets take to build, and what attention through them saves."""
    _write("coresets", coresets.measure(rounds))


@main.command("low-rank")
@click.option("--longest", type=click.IntRange(min=2048), default=32768, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def low_rank_command(longest: int, rounds: int) -> None:
    """Linformer and Nystrom against exact attention and PyTorch, and fast sketches against dense ones."""
    _write("low_rank", low_rank.measure(longest, rounds))


@main.command("sparse-patterns")
@click.option("--longest", type=click.IntRange(min=4096), default=32768, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def sparse_patterns_command(longest: int, rounds: int) -> None:
    """Sparse attention against exact attention and its memory traffic, and the time of a certificate."""
    _write("sparse_patterns", sparse_patterns.measure(longest, rounds))


@main.command("tensor")
@click.option("--longest", type=click.IntRange(min=2048), default=65536, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def tensor_command(longest: int, rounds: int) -> None:
    """Third-order attention, exact and by the polynomial method, and the exact form's share of the peak."""
    _write("tensor", tensor.measure(longest, rounds))


@main.command("decode")
@click.option("--longest", type=click.IntRange(min=1024), default=32768, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def decode_command(longest: int, rounds: int) -> None:
    """Tokens per second and bytes of cache of a small language model, against exact attention."""
    _write("decode", decode.measure(longest, rounds))


@main.command("collectives")
def collectives_command() -> None:
    """Bytes that devices send each other, counted in compiled programs; nothing is timed."""
    _write("collectives", collectives.measure())


@main.command("report")
def report_command() -> None:
    """Write RESULTS.md from the measurements, and docs/scaling.md from the model that they confirm."""
    texts = {HERE / "RESULTS.md": report.render(HERE / "results"), wire.PAGE: wire.page(HERE / "results")}
    for path, text in texts.items():
        write_atomically(path, lambda file, text=text: file.write(text.encode()))
        Console().print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
