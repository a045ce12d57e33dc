"""``python -m benchmarks COMMAND``: run measurements, or write RESULTS.md from them."""

import pathlib

import click
import jax
from rich.console import Console

from benchmarks import (
    accelerator,
    collectives,
    compiled,
    control_variates,
    coresets,
    decode,
    exact,
    kernels,
    low_rank,
    ratios,
    report,
    scaling,
    sparse_patterns,
    tensor,
    wire,
)
from benchmarks.ahead_of_time import Platform
from benchmarks.compilers import compile_into, compiler_options
from benchmarks.files import HERE, REPORT, RESULTS, write_document, write_text


@click.group()
def main() -> None:
    """Measure speed and memory. Keep the machine otherwise idle."""


def _write(name: str, document: dict) -> None:
    path = RESULTS / f"{name}.json"
    write_document(path, document)
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
    # Each kind of machine has a separate file.
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
    """Time to build coresets, and the speedup of attention over them."""
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


@main.command("ratios")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
def ratios_command(rounds: int) -> None:
    """Ratios of times on a CPU: causal forms, gradients, decoding, sparse attention, PyTorch, the import."""
    _write("ratios", ratios.measure(rounds))


@main.command("collectives")
def collectives_command() -> None:
    """Bytes that devices exchange, counted in compiled programs; nothing is timed."""
    _write("collectives", collectives.measure())


@main.command("compiled")
@compiler_options
@click.option("--method", "methods", multiple=True, help="Compile the cases of this method alone; may be repeated.")
@click.option(
    "--before",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=pathlib.Path),
    help="Compile the library of this source tree instead, as the earlier state, into a separate file.",
)
def compiled_command(
    platform: Platform,
    methods: tuple[str, ...],
    limit: float,
    again: bool,
    python: pathlib.Path | None,
    before: pathlib.Path | None,
) -> None:
    """Programs compiled for an absent accelerator: memory, size, sequential operations; no times."""
    name = f"compiled_{platform}_before" if before else f"compiled_{platform}"
    options = {"methods": methods, "limit": limit, "again": again}
    compile_into(RESULTS / f"{name}.json", compiled.measure, platform, python, before or HERE.parent, **options)


@main.command("kernels")
@compiler_options
def kernels_command(platform: Platform, limit: float, again: bool, python: pathlib.Path | None) -> None:
    """The fused kernels compiled for an absent accelerator: schedules, registers, memory; no times."""
    path = RESULTS / f"kernels_{platform}.json"
    compile_into(path, kernels.measure, platform, python, limit=limit, again=again)


main.add_command(accelerator.main, "accelerator")


@main.command("report")
def report_command() -> None:
    """Write RESULTS.md from the measurements, and docs/scaling.md from the model that they confirm."""
    for path, text in {REPORT: report.render(RESULTS), wire.PAGE: wire.page(RESULTS)}.items():
        write_text(path, text)
        Console().print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
