"""The experiments harness: configurations, the command line, sweeps, and every study at its smallest scale."""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from approx_attention import METHODS
from approx_attention.evaluation import figure_style
from experiments import __main__ as cli
from experiments.config import ConfigError, parse_overrides, resolve
from experiments.results import Result, ResultFile, figure_of, frame
from experiments.studies import COMMITTED, SCALES, Places, Run, every_study, read_study
from experiments.training import TrainingConfig
from tests.experiments.test_claims import STUDY
from tests.experiments.test_training import KILLED

pytestmark = pytest.mark.usefixtures("models")


@pytest.mark.parametrize("scale", SCALES)
def test_every_configuration_of_every_study_resolves(scale):
    names = every_study(scale)
    assert len(names) > 40
    for name in names:
        assert read_study(name, scale).runs()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=3", "unknown key 'stesp'; did you mean 'steps'"),
        ("attention.method=favr", "unknown method 'favr'; did you mean 'favor'"),
        ("train.steps=many", "'train.steps' is 'many'"),
        ("train", "an override is KEY=VALUE"),
    ],
)
def test_bad_overrides(override, message):
    study = read_study(STUDY, "smoke")
    with pytest.raises(ConfigError, match=message):
        resolve(TrainingConfig, study.settings, parse_overrides([override]), "file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["run", "harness/nothing"], "nothing.yaml cannot be read"),
        (["run", "harness/sample", "--scale", "gpu"], "has no scale 'gpu'; it has cpu"),
        (["run", "{config}", "--configuration", "exakt"], "unknown configuration 'exakt'; did you mean 'exact'"),
        (["run", "{config}", "--set", "train.steps=[1"], "the value of train.steps is not YAML"),
        (["run", "{config}", "--set", "train.steps=0"], "greater than or equal to 1"),
        (["run", "{config}", "--set", "train.log_every=3"], "checkpoint_every must be a multiple of log_every"),
        (["run", "{config}", "--set", "seed=5"], "the seed of a run is one of 'seeds'"),
        (["run", "{config}", "--set", "model.num_kv_heads=3"], "key heads must divide query heads"),
        (["run", "{config}", "--set", "data.settings.length=abc"], "'length' is 'abc'"),
        (
            ["run", "{config}", "--configuration", "local", "--set", "attention.settings.window_size=-2"],
            "window_size must be",
        ),
        (["run", "{swap}", "--set", "methods.favor.setings=1"], "unknown key"),
        (
            ["run", "{swap}", "--set", "training.attention.method=favor"],
            "training.attention.method must be 'exact', got 'favor'",
        ),
        (["sample", "--set", "train.steps=1"], "--to"),
        (["capture", "{swap}", "--to", "x.npz"], "only a study of `experiments.trained` trains"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    names = {"config": STUDY, "swap": "harness/swap_in"}
    arguments = [argument.format(**names) for argument in arguments]
    if "--scale" not in arguments:
        arguments += ["--scale", "smoke"]
    if arguments[0] == "run":
        arguments += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    assert cli.main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_result_and_a_damaged_checkpoint(tmp_path):
    config = tmp_path / "damaged.yaml"
    config.write_text(yaml.safe_dump({**KILLED, "train": {**KILLED["train"], "steps": 8}}))
    run = Run.of(read_study(config, "smoke"), "run", 0, {}, Places(tmp_path, tmp_path))
    whole = run.result(Console(quiet=True))
    run.file.path.write_text('{"scale": "r')
    with pytest.raises(ConfigError, match=r"damaged.jsonl, line 1 is damaged; remove it"):
        run.result(Console(quiet=True))
    run.file.path.unlink()
    (run.directory / "checkpoints" / "8" / "clock" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="checkpoint 8 cannot be read"):
        again = run.result(Console(quiet=True))
    assert again.records[0]["bits"] == whole.records[0]["bits"]


def test_swap_in_leaves_no_method_out():
    # At the scale cpu, later methods are added when the study is run again.
    later = {"coreset", "scatterbrain", "cosformer", "linformer", "block_linformer", "polynomial"}
    later |= {"sparse_coreset", "longformer", "bigbird", "top_k", "lsh_top_k", "priority", "lsh_priority"}
    for scale, missing in (("cpu", later), ("gpu", set())):
        config = Run.of(read_study("harness/swap_in", scale), "run", 0, {}).config
        named = {attention.method for attention in config.methods.values()} | {"exact"} | missing
        assert named == {name for name, method in METHODS.items() if method.capabilities.causal}


def test_work_and_results_of_other_settings_are_refused(tmp_path, never_run):
    places, study = Places(tmp_path, tmp_path), read_study(STUDY, "smoke")
    run, other = (Run.of(study, "exact", 0, changes, places) for changes in ({}, {"train.steps": 5}))
    run.claim_directory()
    (run.directory / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"train.steps: 4 there, 5 now"):
        other.claim_directory()
    result = run.result(Console(quiet=True))
    assert run.result(Console(quiet=True)) == result
    assert never_run == ["exact-seed0"]
    with pytest.raises(ConfigError, match=r"language_model.jsonl, line 1 is 'exact' with seed 0 at other settings"):
        other.result(Console(quiet=True))


@pytest.mark.parametrize(
    ("more", "folder"),
    [
        ((), "experiments/results"),
        (("--scale", "smoke"), "out/smoke"),
        (("--seed", "9"), "out/experiments"),
        (("--scale", "smoke", "--set", "train.steps=5"), "out/experiments"),
    ],
)
def test_only_runs_that_decide_claims_are_among_those_that_are_committed(
    tmp_path, monkeypatch, never_run, command, more, folder
):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(cli, "COMMITTED", Places(tmp_path / "experiments/results", tmp_path / "out/experiments"))
    assert command("run", STUDY, *more)[0] == 0
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl")] == [
        pathlib.Path(folder, f"{STUDY}.jsonl")
    ]


def test_a_result_that_could_not_be_read_again_is_not_kept(tmp_path):
    result = Result("smoke", "run", 0, "", "", {}, 1.0, [{"error": 0.5}])
    file = ResultFile(tmp_path / "study.jsonl")
    file.add(result)
    with pytest.raises(ConfigError, match=r"study.jsonl cannot hold this result \(the result: 'records.0.error"):
        file.add(dataclasses.replace(result, seed=1, records=[{"error": {"mean": 0.5}}]))
    assert file.read() == [result]


def test_a_line_is_json_for_any_parser_and_is_read_as_it_was_added(tmp_path):
    own = 'NaN, "-Infinity" \\'
    record = {own: own, "nan": math.nan, "inf": math.inf, "low": -math.inf, "curve": [1.5, math.nan], "count": 3}
    added = ResultFile(tmp_path / "study.jsonl").add(Result("smoke", "run", 0, "", "", {}, 1.0, [record]))
    assert added.records == [record | {"nan": None, "curve": [1.5, None]}]
    assert ResultFile(tmp_path / "study.jsonl").read() == [added]
    (line,) = (tmp_path / "study.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=_no_json)["records"] == added.records
    shown = frame([added])
    assert np.isnan(shown["nan"].iloc[0])
    assert figure_of(added.records, "inf", {}) == math.inf
    assert math.isnan(figure_of(added.records, "nan", {}))


def _no_json(constant):
    raise ValueError(f"{constant} is no JSON")


def test_every_result_on_file_is_json_for_any_parser():
    for path in COMMITTED.results.rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=_no_json)


def test_results_that_are_added_at_the_same_time_are_all_kept(tmp_path):
    results = [Result("smoke", "run", seed, "", "", {}, 1.0, [{"error": 0.5}] * 100) for seed in range(24)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(ResultFile(tmp_path / "study.jsonl").add, results))
    assert sorted(ResultFile(tmp_path / "study.jsonl").read(), key=lambda result: result.seed) == results
    assert {path.name for path in tmp_path.iterdir()} == {"study.jsonl", "study.lock"}


def test_the_result_of_a_process_that_was_faster_is_taken(tmp_path, never_run, monkeypatch):
    run, held = Run.of(read_study(STUDY, "smoke"), "exact", 0, {}, Places(tmp_path, tmp_path)), Run.held

    def after_another(self):
        monkeypatch.setattr(Run, "held", held)
        run.result(Console(quiet=True))
        return held(self)

    monkeypatch.setattr(Run, "held", after_another)
    assert [run.result(Console(quiet=True))] == run.file.read()
    assert never_run == ["exact-seed0"]


def test_a_setting_that_comes_later_changes_no_fingerprint(tmp_path, monkeypatch):
    run = Run.of(read_study(STUDY, "smoke"), "local", 0, {}, Places(tmp_path, tmp_path))

    @dataclasses.dataclass(frozen=True)
    class Later(TrainingConfig):
        more: int = 3

    settings = {field.name: getattr(run.config, field.name) for field in dataclasses.fields(run.config)}
    assert dataclasses.replace(run, config=Later(**settings)).fingerprint == run.fingerprint
    assert dataclasses.replace(run, config=Later(**settings, more=4)).fingerprint != run.fingerprint


def test_the_seed_of_a_swap_in_stands_in_one_place():
    with pytest.raises(ConfigError, match="the seed is a key next to 'training'"):
        Run.of(read_study("harness/swap_in", "smoke"), "run", 0, {"training.seed": 3})


def test_a_sweep_leaves_out_what_is_done(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**KILLED, "train": {**KILLED["train"], "steps": 4}, "seeds": [0, 1]}))
    command = ["sweep", str(config), "--scale", "smoke", "--out", str(tmp_path / "out")]
    for _ in range(2):
        outcome = CliRunner().invoke(cli.experiments, command)
        assert outcome.exit_code == 0, outcome.output
    logs = sorted((tmp_path / "out").rglob("metrics.jsonl"))
    assert [path.parent.name for path in logs] == ["run-seed0", "run-seed1"]
    assert all(len(path.read_text().splitlines()) == 2 for path in logs)
    outcome = CliRunner().invoke(cli.experiments, ["list"])
    assert outcome.exit_code == 0
    assert "harness/language_model" in outcome.output


QUICK = ("harness/language_model", "harness/swap_in")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in every_study("smoke")]
)
def test_every_study_runs_and_is_shown(tmp_path, name):
    study = read_study(name, "smoke")
    places = Places(tmp_path, tmp_path)
    runs = [Run.of(study, configuration, 0, {}, places) for configuration in study.configurations]
    results = [run.result(Console(quiet=True)) for run in runs]
    assert results == [run.result(Console(quiet=True)) for run in runs] == study.results(places)
    assert all("|" in text for text in study.module.table(frame(results)) if text.startswith("|"))
    with figure_style():
        study.module.figure(frame(results)).draw_without_rendering()
