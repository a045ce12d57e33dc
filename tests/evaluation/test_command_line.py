"""Output of the command line: a closed pipe, a full disk, an interrupt or an unusual name loses nothing."""

import dataclasses
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from approx_attention import InputError, cli
from approx_attention.cli_options import Option
from approx_attention.evaluation import Candidate, Plan, comparison_table, kinds, plan_table, runs, terminal
from approx_attention.evaluation.comparison import no_better_than_mean
from approx_attention.evaluation.units import times
from tests.evaluation.test_compare import comparison, refusal, run
from tests.references import quick_process, random_heads

ROWS = [
    comparison("exact", 0.5, 0.0, is_exact=True),
    comparison("mean_value", 0.1, 0.9),
    comparison("favor", 170.0, 0.95),
    comparison("mean_pool", 0.2, 0.2),
]
ROOT = pathlib.Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-c", "import sys; from approx_attention.cli import main; sys.exit(main())"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a[b] $x$ :+1: [red].npz"
    np.savez(path, **dict(zip("qkv", map(np.asarray, random_heads(0, 1, 8, 8, 8, 8)), strict=True)))
    return path


@pytest.fixture
def measured(monkeypatch):
    """Replace comparisons by instant ones, which a test can make end in an error."""
    ends = []

    def compare(*args, on_row, **options):
        for row in ROWS:
            on_row(row)
        if ends:
            raise ends[0]
        return ROWS

    monkeypatch.setattr(cli, "run_comparison", compare)
    return ends


def candidate(method, bound, held_out, speedup, is_exact=False):
    return Candidate(
        method=method,
        size=None,
        predicted_error=bound,
        error_bound=bound,
        held_out_error=held_out,
        worst_held_out_error=held_out,
        relative_error=held_out,
        held_bytes=64,
        compile_seconds=0.1,
        seconds=1 / speedup,
        speedup=speedup,
        is_exact=is_exact,
        is_predicted=bound <= 0.3,
        in_budget=True,
        meets=held_out <= 0.3,
    )


def made_plan():
    from approx_attention.evaluation.error_laws import split_units

    candidates = [
        candidate("exact", 0.0, 0.0, 1.0, is_exact=True),
        candidate("mean_pool", 0.2, 0.1, 12.34),
        candidate("favor", 0.2, 0.31, 1 / 340),
        candidate("rfa", 0.4, 0.25, 1 / 3),
        candidate("eva", 0.4, 0.35, 1 / 1.5),
        candidate("mean_value", 0.3, 0.3, 2.0),
    ]
    split = split_units((1, 8, 8, 8), 8, 0.5, 0)
    return Plan(0.3, None, None, "seconds", 0.95, split, candidates, {}, candidates[1], "Use mean_pool [b].")


# output streams


class Stream(io.TextIOWrapper):
    """Standard output with a chosen encoding, which can fail."""

    def __init__(self, encoding="utf-8", error=None):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")
        self.error = error

    def write(self, text):
        if self.error:
            raise self.error
        return super().write(text)


@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize("command", ["compare", "plan"])
@pytest.mark.parametrize(
    ("stream", "code", "told"),
    [
        (Stream("ascii"), 0, ""),
        (Stream(error=BrokenPipeError(32, "Broken pipe")), 0, ""),
        (Stream(error=OSError(28, "No space left on device")), 1, "cannot write to standard output: No space left"),
        (Stream(error=ValueError("I/O operation on closed file")), 1, "cannot write to standard output: I/O operation"),
        (None, 0, ""),
    ],
    ids=["ascii", "pipe", "full", "closed", "none"],
)
def test_results_are_written_whatever_becomes_of_the_table(
    file, tmp_path, monkeypatch, measured, capsys, command, stream, code, told
):
    monkeypatch.setattr(cli, "make_plan", lambda *args, **options: made_plan())
    monkeypatch.setattr(sys, "stdout", stream)
    out = tmp_path / "out"
    assert run(command, file, "--out", out, *(["--tolerance", 0.3] if command == "plan" else [])) == code
    assert sorted(path.name for path in out.iterdir()) == [f"{command}.json", f"{command}.png"]
    assert json.loads((out / f"{command}.json").read_text())["is_complete"] is True
    errors = capsys.readouterr().err
    assert told in errors
    assert "Traceback" not in errors
    assert sys.stdout is stream
    if code == 0 and stream is not None and not stream.error:
        assert "mean_pool" in stream.buffer.getvalue().decode("ascii")  # ± and · are question marks


def test_other_output_does_not_fail_either(monkeypatch, capsys):
    for stream, code in (
        (Stream("ascii"), 0),
        (Stream(error=BrokenPipeError(32, "")), 0),
        (Stream(error=OSError(28, "")), 1),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        for arguments in (("methods",), ("--help",), ("--version",), ("plan", "--help")):
            assert run(*arguments) == code
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", Stream(error=BrokenPipeError(32, "")))
    assert run("compare", "nowhere.npz") == 2


def test_real_pipes_and_devices(file, tmp_path):
    instant = "from tests.evaluation.test_command_line import ROWS, cli; cli.run_comparison = lambda *args, **_: ROWS; "
    command = [sys.executable, "-c", instant + "raise SystemExit(cli.main())", "compare", str(file), "--out"]
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        for out, stdout, code, told in (("pipe", write, 0, []), ("full", full, 1, ["No space left on device"])):
            options = {"stdout": stdout, "stderr": subprocess.PIPE, "cwd": ROOT, "text": True, "check": False}
            result = subprocess.run([*command, str(tmp_path / out)], **options)
            lines = result.stderr.splitlines()
            assert result.returncode == code
            assert len(lines) == len(told)
            assert all(part in line for part, line in zip(told, lines, strict=True))
            assert (tmp_path / out / "compare.png").exists()


def test_results_that_cannot_be_written_are_printed(file, tmp_path, monkeypatch, measured, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_results", fail)
    assert run("compare", file, "--out", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "mean_pool" in captured.out
    assert captured.err.splitlines()[-1] == "approx-attention: [Errno 28] No space left on device"


def test_a_figure_is_of_the_run_of_its_results(file, tmp_path, monkeypatch, measured, capsys):
    out = tmp_path / "out"
    assert run("compare", file, "--out", out) == 0
    monkeypatch.setattr(kinds, "draw_frontiers", lambda *args: 1 / 0)
    assert run("compare", file, "--out", out) == 0
    assert [path.name for path in out.iterdir()] == ["compare.json"]
    assert "no figure: ZeroDivisionError: division by zero" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(cli, "run_comparison", lambda *args, **options: ROWS)
    assert run("compare", file, "--out", out) == 0
    assert "pip install 'approx_attention[plot]'" in capsys.readouterr().out


# printed text


def test_names_are_text(file, tmp_path, measured, capsys):
    out = tmp_path / "o[/x] [bold]"
    assert run("compare", file, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith("a[b] $x$ :+1: [red].npz: bidirectional")
    assert f"wrote {out}/compare.json and {out}/compare.png" in printed.replace("\n", "")
    assert "[/q]" in refusal(capsys, "compare", file, "--q", "[/q]", "--out", out)
    assert "[red]no[/red].npz does not exist" in refusal(
        capsys, "compare", tmp_path / "[red]no[/red].npz", "--out", out
    )
    layers = tmp_path / "layers.npz"
    np.savez(layers, **{f"[/x]{i}.{n}": np.ones((8, 4), np.float32) for i in range(2) for n in "qkv"})
    assert run("compare", layers, "--layers", "*", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "layers.npz, [/x]1: bidirectional" in printed
    assert "[/x]0" in printed.splitlines()[-8]


def test_one_layer_of_several_has_no_summary(tmp_path, measured, capsys):
    path, out = tmp_path / "layers.npz", tmp_path / "out"
    np.savez(path, **{f"layer{i}.{n}": np.ones((8, 4), np.float32) for i in range(2) for n in "qkv"})
    assert run("compare", path, "--layers", "layer1", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "layers.npz, layer1: bidirectional" in printed
    assert "worst in" not in printed
    assert list(json.loads((out / "compare.json").read_text())["layers"]) == ["layer1"]


@pytest.mark.parametrize("width", [30, 60, 80, 100, 120, 150, 240])
def test_a_table_that_is_too_wide_leaves_out_columns_and_cuts_no_cell(width):
    sizes = {"size": 256, "held_bytes": 2**16, "compression": 4.0, "num_seeds": 3, "relative_error_std": 0.1}
    row = dataclasses.replace(comparison("uniform_sample", 2.0, 0.1234), **sizes)
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(comparison_table([row], "a title", 128))
    assert "…" not in console.file.getvalue()
    if width < 40:
        return
    header, cells = (line for line in console.file.getvalue().splitlines() if "method" in line or "uniform" in line)
    assert "…" not in header + cells
    assert "uniform_sample" in cells
    assert "0.123 ± 0.1" in cells
    assert ("compile" in header) == (width >= 150)


@pytest.mark.usefixtures("empty_figures")
def test_arrays_with_more_heads_than_tokens_are_pointed_out(tmp_path, measured, capsys):
    for shape, told in (((2, 9, 4, 8), ""), ((2, 4, 9, 8), "note: 4 tokens and 9 heads; is the layout [B, N, T, D]?")):
        tensors = np.ones(shape, np.float32)
        np.savez(tmp_path / "t.npz", q=tensors, k=tensors, v=tensors)
        assert run("compare", tmp_path / "t.npz", "--out", tmp_path / "out") == 0
        err = capsys.readouterr().err
        assert err.startswith(told)
        assert ("note" in err) == bool(told)


def test_names_that_are_no_text(tmp_path, measured, capsys):
    path = os.fsencode(tmp_path) + b"/\xff.npz"
    with open(path, "wb") as file:
        np.savez(file, **{n: np.ones((8, 4), np.float32) for n in "qkv"})
    assert run("compare", os.fsdecode(path), "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("?.npz: bidirectional")
    assert (tmp_path / "out" / "compare.png").exists()


def test_ratios_say_their_direction():
    told = {340.4: "340x", 12.34: "12.3x", 2: "2x", 1.5: "1.5x"}
    for ratio, text in told.items():
        assert times(ratio, "faster", "slower") == f"{text} faster"
        assert times(1 / ratio, "faster", "slower") == f"{text} slower"
    assert times(1.0, "faster", "slower") == times(1.0001, "faster", "slower") == "1x"
    assert times(float("nan"), "faster", "slower") == times(0.0, "faster", "slower") == ""


def cells(table, header):
    column = next(column for column in table.columns if column.header == header)
    return [getattr(cell, "plain", cell) for cell in column.cells]


def test_tables_say_what_they_mean():
    rows = [dataclasses.replace(row, speedup=0.5 / row.seconds) for row in ROWS]
    table = comparison_table(rows, "title", 8)
    assert cells(table, "method") == ["exact", "mean_value *", "favor !", "mean_pool *"]
    assert cells(table, "than exact") == ["1x", "5x faster", "340x slower", "2.5x faster"]
    assert "! error not below that of `mean_value`" in str(table.caption)
    table = plan_table(made_plan(), "title")
    assert cells(table, "remark") == [
        "",
        "",
        "missed when checked",
        "bound exceeds the tolerance",
        "misses the tolerance",
        "",
    ]
    assert cells(table, "method") == ["exact", "mean_pool", "favor !", "rfa", "eva !", "mean_value"]
    assert cells(table, "than exact") == ["1x", "12.3x faster", "340x slower", "3x slower", "1.5x slower", "2x faster"]
    assert "! error not below that of `mean_value`" in str(table.caption)
    assert no_better_than_mean([comparison("favor", 1.0, float("nan")), comparison("mean_value", 1.0, 0.9)]) == {0}


def test_windows_are_explained(capsys):
    for command in ("compare", "plan"):
        assert run(command, "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "w - 1 tokens before it (w in all), else its own and w - 1 to each side (2w - 1 in all)." in text


# interruptions and errors


@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the measurements so far are in"),
        (terminal.Terminated(), 143, "terminated; the measurements so far are in"),
        (InputError("eva does not take it"), 2, "eva does not take it; the measurements so far are in"),
        (MemoryError(), 1, "the measurements so far are in"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), 1, "the measurements so far are in"),
    ],
)
def test_what_is_measured_until_then_is_written(file, tmp_path, measured, capsys, error, code, told):
    measured.append(error)
    out = tmp_path / "out"
    assert run("compare", file, "--out", out) == code
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.splitlines()
    assert lines[0].startswith(f"approx-attention: {told} {out}/compare.json and {out}/compare.png")
    assert len(lines) == (1 if code in (2, 130, 143) else 2)
    document = json.loads((out / "compare.json").read_text())
    assert document["is_complete"] is False
    assert [row["method"] for row in document["rows"]] == [row.method for row in ROWS]


def test_an_interrupt_before_anything_is_measured(file, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_comparison", interrupt)
    assert run("compare", file, "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "approx-attention: interrupted before anything was measured\n"
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(cli, "load_layers", interrupt)
    assert run("compare", file, "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "approx-attention: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path, number, code):
    path = tmp_path / "x.npz"
    np.savez(path, **dict(zip("qkv", map(np.asarray, random_heads(0, 1, 64, 64, 8, 8)), strict=True)))
    command = ["compare", str(path), "--out", str(tmp_path / "out")]
    if number == signal.SIGTERM:
        command = ["plan", *command[1:], "--tolerance", "0.1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*COMMAND, *command], **pipes, env=quick_process(), text=True)
    assert process.stderr is not None
    for line in process.stderr:  # a line is printed as each measurement begins, while others are still to come
        if "uniform_sample" in line:
            break
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.05)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert printed == ""
    assert "Traceback" not in errors
    assert "the measurements so far are in" in errors.splitlines()[-1]
    document = json.loads((tmp_path / "out" / f"{command[0]}.json").read_text())
    assert document["is_complete"] is False
    assert {"exact", "mean_value", "local"} <= {row["method"] for row in document["rows"]}
    assert (tmp_path / "out" / f"{command[0]}.png").exists()


@pytest.mark.usefixtures("empty_figures")
def test_two_runs_do_not_mix(file, tmp_path, measured, capsys):
    out = tmp_path / "out"
    assert run("compare", file, "--out", out) == 0
    before = (out / "compare.json").read_bytes()
    with terminal.only_holder(out) as is_held:
        assert is_held
        assert "another run is writing to" in refusal(capsys, "compare", file, "--out", out)
    assert (out / "compare.json").read_bytes() == before
    assert run("compare", file, "--out", out) == 0


def test_progress_is_a_line_for_each(file, tmp_path, capsys):
    options = ["--methods", "mean_pool", "--budget", 2, "--seeds", 1, "--out", tmp_path / "out"]
    assert run("compare", file, *options) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines][-3:] == ["7/9 uniform_sample 2", "8/9 mean_pool 2", "9/9 timing"]


# unusable input


def test_what_is_wrong_is_said_before_anything_is_measured(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("approx_attention.evaluation.comparison.compile_arm", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr("approx_attention.evaluation.bench.compile_arm", lambda *args: pytest.fail("measured"))

    def message(*options):
        return refusal(capsys, options[0], file, "--out", tmp_path / "out", *options[1:])

    huge = 10**20
    tolerance = ("plan", "--tolerance", 0.1)
    assert "a budget must be at most 1048576, got 100000000000000000000" in message("compare", "--budget", huge)
    assert "num_seeds must be at most 1000" in message("compare", "--seeds", huge)
    assert "num_seeds must be at most 1000" in message(*tolerance, "--seeds", huge)
    assert "1 is not in the range x>=2" in message(*tolerance, "--seeds", 1)
    assert "is not in the range" in message("compare", "--seed", huge)
    assert "max_bytes must be a positive number" in message(*tolerance, "--max-bytes", 10**400)
    assert "tolerance must be a positive number, got inf" in message("plan", "--tolerance", "inf")
    assert "favor does not support" in message("compare", "--methods", "favor", "--set", f"favor.block_size={huge}x")
    assert "favor does not support block_size=0" in message(
        *tolerance, "--methods", "favor", "--set", "favor.block_size=0"
    )
    assert "favor does not support" in message(
        "compare", "--methods", "favor", "--set", f"favor.block_size={'[' * 9000}"
    )
    assert "favor does not support logits_soft_cap=30" in message(
        "compare", "--methods", "favor", "--set", "favor.logits_soft_cap=30"
    )
    assert "Invalid value for '--out': give a directory; the current one is '.'" in message("compare", "--out", "")
    assert "Invalid value for '--out': give a directory" in message(*tolerance, "--out", " ")
    (tmp_path / "taken").touch()
    assert "taken: it is a file" in message("compare", "--out", tmp_path / "taken")
    assert "File name too long" in message("compare", "--out", tmp_path / ("x" * 300))
    assert "cannot write to the directory /proc/none" in message(*tolerance, "--out", "/proc/none")
    assert "--layers and --lengths can only be given with a FILE" in refusal(
        capsys, "compare", "--layers", "*", "--lengths", "n"
    )
    assert "has no array 'n'" in message("compare", "--lengths", "n")
    assert "has no array ''" in message("compare", "--mask", "")
    assert "has no layer 'layer*'" in message(*tolerance, "--layers", "layer*")


def test_help_of_seeds_agrees_with_the_check(capsys):
    for command, least in (("compare", 1), ("plan", 2)):
        assert run(command, "--help") == 0
        assert f"[default: 3; x>={least}]" in " ".join(capsys.readouterr().out.split())


def test_a_list_is_a_tuple_that_a_method_accepts():
    assert Option().convert("eva.spatial_shape=[4, 4]", None, None) == ("eva", "spatial_shape", (4, 4))


@pytest.mark.usefixtures("empty_figures")
def test_settings_that_json_does_not_have(file, tmp_path, measured):
    assert run("compare", file, "--set", "favor.x=NaN", "--set", "favor.y=[1e999]", "--out", tmp_path / "out") == 0
    options = json.loads((tmp_path / "out" / "compare.json").read_text())["settings"]["options"]
    assert options == {"favor": {"x": None, "y": [None]}}


# several layers


@pytest.mark.parametrize("command", ["compare", "plan"])
def test_layers_and_padding_in_one_run(tmp_path, capsys, command):
    path = tmp_path / "x.npz"
    arrays = {
        f"layer{i}.{name}": np.asarray(x) * (1 + i)
        for i in range(2)
        for name, x in zip("qkv", random_heads(i, 2, 24, 24, 4, 2), strict=True)
    }
    np.savez(path, **arrays, n=np.array([24, 15]), **{"layer1.n": np.array([20, 24])})
    options = ["--layers", "layer*", "--lengths", "n", "--methods", "mean_value", "--out", tmp_path / "out"]
    own = ["--budget", 4, "--seeds", 1] if command == "compare" else ["--tolerance", 0.9, "--seeds", 2]
    assert run(command, path, *options, *own) == 0
    captured = capsys.readouterr()
    for layer in ("layer0", "layer1"):
        assert f"x.npz, {layer}: bidirectional, padded, B=2 T=24" in captured.out
        assert f"{layer}: mean_value" in captured.err
    assert "x.npz: 2 layers" in captured.out
    document = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    assert document["is_complete"] is True
    assert document["settings"]["lengths"] == "n"
    assert list(document["layers"]) == ["layer0", "layer1"]
    name = "relative_error" if command == "compare" else "held_out_error"
    errors = {
        layer: next(row[name] for row in part["rows"] if row["method"] == "mean_value")
        for layer, part in document["layers"].items()
    }
    summary = next(row for row in document["summary"] if row["method"] == "mean_value")
    assert summary["num_layers"] == 2
    assert summary["relative_error"] == pytest.approx(np.median(list(errors.values())))
    assert summary["worst_error"] == max(errors.values())
    assert errors[summary["worst_layer"]] == summary["worst_error"]
    if command == "plan":
        assert sum(row["num_picked"] for row in document["summary"]) == 2
        assert all("verdict" in part["plan"] for part in document["layers"].values())
    assert (tmp_path / "out" / f"{command}.png").exists()


def test_layers_measured_before_an_interrupt(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.npz"
    np.savez(path, **{f"layer{i}.{n}": np.ones((8, 4), np.float32) for i in range(3) for n in "qkv"})
    calls = []

    def compare(*args, on_row, **options):
        calls.append(None)
        on_row(ROWS[0])
        if len(calls) == 2:
            assert json.loads((tmp_path / "out" / "compare.json").read_text())["is_complete"] is False
            raise KeyboardInterrupt
        return ROWS

    monkeypatch.setattr(cli, "run_comparison", compare)
    assert run("compare", path, "--layers", "layer*", "--out", tmp_path / "out") == 130
    assert "x.npz, layer0" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {layer: len(part["rows"]) for layer, part in document["layers"].items()} == {"layer0": 4, "layer1": 1}


def test_plans_of_layers_before_an_interrupt(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.npz"
    np.savez(path, **{f"layer{i}.{n}": np.ones((8, 4), np.float32) for i in range(3) for n in "qkv"})
    made = made_plan()
    unchecked = [
        dataclasses.replace(c, held_out_error=math.nan, relative_error=math.nan, seconds=math.nan, speedup=math.nan)
        for c in made.candidates
    ]
    calls = []

    def plan(*args, on_part, **options):
        calls.append(None)
        on_part(dataclasses.replace(made, candidates=unchecked, pick=None, verdict="Interrupted."))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(cli, "make_plan", plan)
    options = ["--layers", "layer*", "--tolerance", 0.3, "--out", tmp_path / "out"]
    assert run("plan", path, *options) == 130
    assert "Use mean_pool [b]." in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [part["plan"]["verdict"] for part in document["layers"].values()] == ["Use mean_pool [b].", "Interrupted."]
    assert document["layers"]["layer1"]["rows"][1]["seconds"] is None
    assert document["layers"]["layer1"]["rows"][1]["error_bound"] == 0.2
    assert (tmp_path / "out" / "plan.png").exists()
