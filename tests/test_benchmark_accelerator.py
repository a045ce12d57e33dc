"""The benchmark of accelerators: the command on this machine, its budget and cases, and the report of invented rows."""

import dataclasses
import json

import jax
import pytest
from click.testing import CliRunner

from approx_attention import METHODS
from benchmarks import accelerator, accelerator_report
from benchmarks.accelerator import CAUSAL, CAUSAL_GRADIENT, DECODE, FULL, FULL_GRADIENT, LENGTHS, Case
from tests.forms import FORM

pytestmark = pytest.mark.all_forms

CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what happens without an accelerator")


def run(*arguments):
    return CliRunner().invoke(accelerator.main, list(arguments))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The file of a tiny run, and its printed output."""
    path = tmp_path_factory.mktemp("accelerator") / "tiny.json"
    # JAX's own attention promotes half precision. On a CPU the programs run in the form for CPUs alone.
    with jax.numpy_dtype_promotion("standard"), FORM("cpu" if jax.default_backend() == "cpu" else "all"):
        result = run("--tiny", "--output", str(path))
    assert result.exit_code == 0, result.output
    return path, result.output


def test_a_tiny_run_measures_every_kind_and_its_report_shows_them(tiny):
    path, output = tiny
    document = json.loads(path.read_text())
    good = [row for row in document["rows"] if "error" not in row]
    kinds = {(row["is_causal"], row["backward"], row["decode"]) for row in good}
    assert kinds == {CAUSAL, CAUSAL_GRADIENT, DECODE, FULL}
    assert {row["arm"] for row in good} >= {"exact", "exact dense", "exact jax.nn xla", "mean_value", "mean_pool"}
    assert all(0 < row["least_seconds"] <= row["seconds"] for row in good)
    assert document["not_begun"] == 0
    assert {row["length"] for row in good} == {64, 128}
    assert "mean_pool n=64 causal with gradient" in output
    text = "\n\n".join(accelerator_report.section([document]))
    for part in ("Break-even", "Causal, forward:", "Bidirectional, forward:", "Decoding:", "Memory:"):
        assert f"### {part}" in text


@CPU
def test_an_implementation_that_fails_is_recorded_and_not_tried_at_longer_sequences(tiny):
    document = json.loads(tiny[0].read_text())
    failed = [row for row in document["rows"] if row["arm"] == "exact cudnn" and not row["decode"]]
    assert {row["length"] for row in failed} == {64}
    assert all("needs a GPU" in row["error"] for row in failed)
    assert "- `exact cudnn`, causal at 64, " in "\n\n".join(accelerator_report.section([document]))


def test_a_second_run_measures_nothing_anew(tiny, monkeypatch):
    path, _ = tiny
    before = path.read_text()
    monkeypatch.setattr(accelerator, "measured", lambda case, rounds: pytest.fail(f"{case} was measured again"))
    assert run("--tiny", "--output", str(path)).exit_code == 0
    assert path.read_text() == before


def test_a_budget_of_zero_begins_nothing_and_writes_a_valid_file(tmp_path):
    path = tmp_path / "none.json"
    result = run("--tiny", "--budget", "0", "--output", str(path))
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert document["rows"] == []
    assert document["not_begun"] == len(accelerator.cases(tiny=True))
    assert "were not begun" in "\n".join(accelerator_report.section([document]))


@CPU
def test_without_an_accelerator_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(accelerator, "measured", lambda case, rounds: pytest.fail(f"{case} was measured"))
    assert "no GPU or TPU was found" in run().output
    assert "--tiny needs --output" in run("--tiny").output


def test_on_an_accelerator_the_results_and_the_report_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(accelerator, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(accelerator, "REPORT", tmp_path / "RESULTS.md")
    result = run("--budget", "0")
    assert result.exit_code == 0, result.output
    chip = jax.devices()[0].device_kind
    assert json.loads(accelerator.path_of(chip).read_text())["not_begun"] == len(accelerator.cases())
    assert f"## Times on an accelerator: {chip}" in (tmp_path / "RESULTS.md").read_text()


def figures(seconds, **others):
    return {
        "seconds": seconds,
        "least_seconds": seconds,
        "compile_seconds": 1.0,
        "case_seconds": 2.0,
        "temp_bytes": 2**20,
        "cache_bytes": None,
        "peak_bytes": None,
        **others,
    }


def test_each_row_is_written_at_once_and_rows_of_other_code_are_left_out(monkeypatch):
    asked = [Case("exact", 64), Case("favor", 64)]
    written = []

    def measure(known, again=False):
        written.clear()
        return accelerator.measure(asked, known, written.append, budget=60, again=again)

    monkeypatch.setattr(accelerator, "measured", lambda case, rounds: figures(1e-3))
    document = measure({})
    assert [len(x["rows"]) for x in written] == [1, 2, 2]
    monkeypatch.setattr(accelerator, "measured", lambda case, rounds: figures(2e-3))
    assert measure(document)["rows"] == document["rows"]
    assert {row["seconds"] for row in measure(document, again=True)["rows"]} == {2e-3}
    assert {row["seconds"] for row in measure({**document, "code": "other"})["rows"]} == {2e-3}
    assert [len(x["rows"]) for x in written] == [1, 2, 2]


def test_a_run_ends_where_the_device_stops_working_and_the_next_goes_on_after_that_case(monkeypatch):
    asked, written = [Case("exact", 64), Case("favor", 64)], []
    monkeypatch.setattr(accelerator, "measured", lambda case, rounds: {"error": "crash", "case_seconds": 1.0})
    monkeypatch.setattr(accelerator, "device_works", lambda: False)
    with pytest.raises(RuntimeError, match=r"after exact n=64 causal: crash; rerun"):
        accelerator.measure(asked, {}, written.append, budget=60)
    assert [row["arm"] for row in written[-1]["rows"]] == ["exact"]
    monkeypatch.undo()
    assert accelerator.device_works()
    monkeypatch.setattr(accelerator, "measured", lambda case, rounds: figures(1e-3))
    rows = accelerator.measure(asked, written[-1], written.append, budget=60)["rows"]
    assert [("error" in row) for row in rows] == [True, False]


def test_longer_sequences_are_left_out_after_failures_and_slow_calls():
    case = Case("favor", 256)
    assert not accelerator.is_hopeless(case, {})
    assert not accelerator.is_hopeless(case, {Case("favor", 128): figures(0.5)})
    assert accelerator.is_hopeless(case, {Case("favor", 128): figures(1.5)})
    assert accelerator.is_hopeless(case, {Case("favor", 128): figures(0.1, case_seconds=61)})
    assert accelerator.is_hopeless(case, {Case("favor", 128): {"error": "no room", "case_seconds": 1}})
    assert not accelerator.is_hopeless(case, {Case("favor", 128, backward=True): figures(1.5)})
    assert not accelerator.is_hopeless(case, {Case("favor", 512): figures(1.5)})
    decoded = {Case("favor", 128, decode=True): figures(0.5)}
    assert accelerator.is_hopeless(Case("favor", 256, decode=True), decoded)


def test_all_methods_are_cases_once_and_the_causal_forward_pass_comes_first():
    asked = accelerator.cases()
    assert len(set(asked)) == len(asked)
    assert asked[0] == Case("exact", 2048)
    of_local = [case for case in asked if case.arm == "local"]
    assert {(case.kind, case.length) for case in of_local} == {
        (kind, n) for kind in (CAUSAL, CAUSAL_GRADIENT, FULL, FULL_GRADIENT) for n in LENGTHS
    }
    assert {case.arm for case in asked} >= set(METHODS)
    assert {case.length for case in asked if case.arm == "exact dense"} == {2048, 4096, 8192}
    main = [case for case in asked if case.kind == CAUSAL and case.arm in accelerator.MAIN_METHODS]
    assert asked.index(main[2 * len(main) // 7]) < min(i for i, case in enumerate(asked) if case.kind != CAUSAL)


def document(*rows, chip="NVIDIA H200", **others):
    return {
        "chip": chip,
        "num_heads": 8,
        "head_dim": 64,
        "dtype": "bfloat16",
        "size": 256,
        "sizes": {"favor": 256, "local": 128},
        "rounds": 10,
        "decoded": 128,
        "environment": {"processor": "P", "processor_cores": 2, "backend": "gpu", "python": "3", "jax": "1"},
        "device_bytes": 2**37,
        "not_begun": 0,
        "rows": list(rows),
        **others,
    }


def rows_of(arm, seconds, **kind):
    return [dataclasses.asdict(Case(arm, n, **kind)) | figures(x) for n, x in seconds.items()]


def cells(text, title, name):
    """The cells of a row in the table below a title."""
    table = text.split(f"### {title}")[1].split("\n#")[0]
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_break_even_is_against_the_fastest_exact_implementation_of_the_same_kind():
    made_up = document(
        *rows_of("exact", {2048: 1.0, 4096: 4.0, 8192: 16.0}),
        *rows_of("exact cudnn", {2048: 0.5, 4096: 3.0}),
        *rows_of("local", {2048: 0.1, 4096: 0.2, 8192: 0.3}),
        *rows_of("favor", {2048: 0.9, 4096: 2.0, 8192: 3.0}),
        *rows_of("eva", {2048: 2.0, 4096: 3.0, 8192: 17.0, 16384: 18.0}),
        *rows_of("exact", {2048: 1.0}, is_causal=False),
        *rows_of("favor", {2048: 0.99}, is_causal=False),
        *rows_of("favor", {2048: 0.5}, backward=True),
        *rows_of("exact decoder", {2048: 3e-4}, decode=True),
        *rows_of("favor", {2048: 1e-4}, decode=True),
        dataclasses.asdict(Case("coreset", 2048)) | {"error": "no room", "case_seconds": 1.0},
    )
    text = "\n\n".join(accelerator_report.section([made_up]))
    columns = ["causal forward", "causal gradient", "bidirectional", "decoding"]
    found = {
        name: dict(zip(columns, cells(text, "Break-even", f"`{name}`"), strict=True))
        for name in ("local", "favor", "eva")
    }
    always, from_4096, never = (found[name]["causal forward"] for name in found)
    assert (always, from_4096, never) == ("2048", "4096", "beyond 8192")
    # 1% does not count as faster, and without a measured exact form there is no break-even length.
    assert found["favor"] == {
        **found["favor"],
        "bidirectional": "beyond 2048",
        "causal gradient": "",
        "decoding": "2048",
    }
    assert cells(text, "Causal, forward: ", "best exact") == ["500", "3000", "16000", ""]
    assert cells(text, "Decoding", "`favor`") == ["100"]
    assert "- `coreset`, causal at 2048: no room" in text


def test_the_share_of_the_peak_is_said_of_known_chips_alone():
    rows = rows_of("exact", {8192: 1e-3})
    known, unknown = (
        "\n\n".join(accelerator_report.section([document(*rows, chip=chip)])) for chip in ("NVIDIA H200", "Abacus")
    )
    # 8 heads, two products of half of the pairs, 64 channels: 6.9e10 operations in a millisecond.
    assert cells(known, "Exact attention: share", "`exact`, causal, forward") == ["6.95%"]
    assert "share of the peak" not in unknown
    assert cells(unknown, "Causal, forward: ", "`exact`") == ["1"]


def test_the_peak_of_memory_is_said_where_the_device_reports_it():
    (row,) = rows_of("exact", {8192: 1e-3})
    text = "\n\n".join(accelerator_report.section([document({**row, "peak_bytes": 2**34})]))
    assert "held 16 GiB on the device of 128 GiB" in text
    assert cells(text, "Memory", "`exact`") == ["1"]


def test_memory_is_shown_at_the_longest_sequence_of_most_methods():
    rows = rows_of("exact", {2048: 1.0, 4096: 1.0, 8192: 1.0}) + rows_of("local", {2048: 1.0, 4096: 1.0})
    text = "\n\n".join(accelerator_report.section([document(*rows, *rows_of("favor", {2048: 1.0}))]))
    assert "Causal, forward, n = 4096" in text
    assert cells(text, "Memory", "`local`") == ["1"]


def test_without_a_file_the_report_says_what_measures():
    text = "\n\n".join(accelerator_report.section([]))
    assert "Nothing has been measured on an accelerator yet" in text
    assert accelerator_report.COMMAND in text


def test_the_file_has_the_name_of_the_chip():
    assert accelerator.path_of("NVIDIA H100 80GB HBM3").name == "accelerator-nvidia-h100-80gb-hbm3.json"
