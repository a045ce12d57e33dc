"""SIGINT and SIGTERM end a command even where Python drops the exception, and interrupt no write."""

import json
import signal
import subprocess
import time
import weakref

import numpy as np
import pytest

from approx_attention import cli
from approx_attention.evaluation import kinds, runs
from tests.evaluation.test_command_line import COMMAND, ROWS, Stream
from tests.evaluation.test_compare import run
from tests.references import quick_process

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.npz"
    array = np.ones((8, 4), np.float32)
    np.savez(path, q=array, k=array, v=array)
    return path


def measuring(monkeypatch, during):
    """Replace comparisons by instant ones that call ``during``."""

    def compare(*args, on_row, on_progress, **options):
        on_row(ROWS[0])
        during(on_row, on_progress)
        return ROWS

    monkeypatch.setattr(cli, "run_comparison", compare)


class Disturbed(Stream):
    """Standard output that receives a signal at each flush."""

    number: signal.Signals | None = None

    def flush(self):
        if self.number:
            signal.raise_signal(self.number)
        super().flush()


def document(tmp_path):
    return json.loads((tmp_path / "out" / "compare.json").read_text())


@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("seen_by", ["progress", "keep"])
def test_a_signal_that_python_drops(file, tmp_path, monkeypatch, capsys, number, code, seen_by):
    def during(on_row, on_progress):
        held = {1}
        _ = weakref.ref(held, lambda ref: signal.raise_signal(number))
        del held  # an exception in this callback is lost
        if seen_by == "progress":
            on_progress("next", 1, 2)
        else:
            on_row(ROWS[1])
        pytest.fail("it went on")

    measuring(monkeypatch, during)
    assert run("compare", file, "--out", tmp_path / "out") == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert "the measurements so far are in" in told[0]
    assert document(tmp_path)["is_complete"] is False


@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_further_signals_while_writing(file, tmp_path, monkeypatch, capsys, number, code):
    write = runs.write_results

    def disturbed(*args):
        signal.raise_signal(number)
        written = write(*args)
        signal.raise_signal(signal.SIGINT)
        return written

    def during(on_row, on_progress):
        monkeypatch.setattr(runs, "write_results", disturbed)
        stream.number = number
        signal.raise_signal(number)

    measuring(monkeypatch, during)
    stream = Disturbed()
    monkeypatch.setattr("sys.stdout", stream)
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    assert run("compare", file, "--out", tmp_path / "out") == code
    stream.number = None
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [row["method"] for row in document(tmp_path)["rows"]] == ["exact"]


@pytest.mark.usefixtures("empty_figures")
def test_a_signal_while_the_last_output_is_flushed(file, tmp_path, monkeypatch, capsys):
    stream = Disturbed()
    end = cli._exit_code

    def ended(*arguments):
        code = end(*arguments)
        stream.number = signal.SIGINT
        return code

    measuring(monkeypatch, lambda on_row, on_progress: None)
    monkeypatch.setattr(cli, "_exit_code", ended)
    monkeypatch.setattr("sys.stdout", stream)
    assert run("compare", file, "--out", tmp_path / "out") == 0
    stream.number = None
    assert document(tmp_path)["is_complete"] is True


@pytest.mark.parametrize("lines", [1, 2, 4])
def test_signals_at_any_time_end_in_one_line(file, tmp_path, lines):
    command = [*COMMAND, "plan", str(file), "--tolerance", "0.1", "--out", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, env=quick_process(), text=True)
    assert process.stderr is not None
    for _ in range(lines):
        process.stderr.readline()
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "approx-attention: interrupted" in errors.splitlines()[-1]


@pytest.mark.parametrize("where", ["comparison_table", "draw_frontiers"])
def test_an_interrupt_after_the_last_layer_leaves_its_results_complete(file, tmp_path, monkeypatch, capsys, where):
    calls = []

    def interrupted(*args, **options):
        calls.append(None)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)

    measuring(monkeypatch, lambda on_row, on_progress: None)
    monkeypatch.setattr(kinds, where, interrupted)
    assert run("compare", file, "--out", tmp_path / "out") == 130
    assert document(tmp_path)["is_complete"] is True
    assert len(document(tmp_path)["rows"]) == len(ROWS)
