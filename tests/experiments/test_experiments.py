"""The experiments harness: configurations, the command line, sweeps, and every study at its smallest scale."""

import json
import sys

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from approx_attention import METHODS
from experiments import __main__ as cli
from experiments.config import ConfigError, parse_overrides, read_config_file, resolve
from experiments.runs import CONFIGS, EXPERIMENTS, Run
from experiments.training import TrainingConfig
from tests.experiments.test_claims import STUDY
from tests.experiments.test_training import KILLED

pytestmark = pytest.mark.usefixtures("models")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: "-".join(path.parts[-3:]))
def test_every_arm_of_every_configuration_resolves(path):
    file = read_config_file(path)
    for arm in file.arms:
        resolve(EXPERIMENTS[file.experiment].config, file.settings, dict(arm.overrides), str(path))


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
    file = read_config_file(CONFIGS / "harness" / "language_model" / "smoke.yaml")
    with pytest.raises(ConfigError, match=message):
        resolve(TrainingConfig, file.settings, parse_overrides([override]), "file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["run", "{config}", "--arm", "exakt"], "unknown arm 'exakt'; did you mean 'exact'"),
        (["run", "{config}", "--set", "train.steps=[1"], "the value of train.steps is not YAML"),
        (["run", "{config}", "--set", "train.steps=0"], "greater than or equal to 1"),
        (["run", "{config}", "--set", "train.log_every=3"], "checkpoint_every must be a multiple of log_every"),
        (["run", "{config}", "--set", "seed=5"], "the seed of a run is one of 'seeds'"),
        (["run", "{config}", "--set", "model.num_kv_heads=3"], "key heads must divide query heads"),
        (["run", "{config}", "--set", "data.settings.length=abc"], "'length' is 'abc'"),
        (["run", "{config}", "--arm", "local", "--set", "attention.settings.window_size=-2"], "window_size must be"),
        (["run", "{swap}", "--set", "methods.favor.setings=1"], "unknown key"),
        (["run", "{swap}", "--set", "training.attention.method=favor"], "what is trained is 'exact'"),
        (["sample", "--set", "train.steps=1"], "--to"),
        (["capture", "{swap}", "--to", "x.npz"], "only the experiment 'quality' trains"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    places = {"config": STUDY, "swap": "harness/swap_in"}
    places = {name: str(CONFIGS / study / "smoke.yaml") for name, study in places.items()}
    arguments = [argument.format(**places) for argument in arguments]
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
    run = Run.of(read_config_file(config), "run", 0, {}, tmp_path)
    whole = run.result(Console(quiet=True))
    (run.directory / "result.json").write_text('{"arm": "r')
    with pytest.raises(ConfigError, match=r"result.json is damaged; remove it"):
        run.result(Console(quiet=True))
    (run.directory / "result.json").unlink()
    (run.directory / "checkpoints" / "8" / "clock" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="checkpoint 8 cannot be read"):
        again = run.result(Console(quiet=True))
    assert again["result"]["test"] == whole["result"]["test"]


def test_swap_in_leaves_no_method_out():
    # On cpu the later methods join when the study is run again.
    later = {"coreset", "scatterbrain", "cosformer", "linformer", "block_linformer", "polynomial"}
    later |= {"sparse_coreset", "longformer", "bigbird", "top_k", "lsh_top_k", "priority"}
    for scale, missing in (("cpu", later), ("gpu", set())):
        config = Run.of(read_config_file(CONFIGS / f"harness/swap_in/{scale}.yaml"), "run", 0, {}, CONFIGS).config
        named = {attention.method for attention in config.methods.values()} | {"exact"} | missing
        assert named == {name for name, method in METHODS.items() if method.capabilities.causal}


def test_a_directory_of_other_settings_is_refused(tmp_path):
    file = read_config_file(CONFIGS / "harness" / "language_model" / "smoke.yaml")
    run = Run.of(file, "exact", 0, {}, tmp_path)
    settings = run.claim_directory()
    document = {"arm": "exact", "seed": 0, "config": dict(settings), "result": {}, "seconds": 1.0, "environment": {}}
    (run.directory / "result.json").write_text(json.dumps(document))
    assert run.result(Console(quiet=True)) == document
    with pytest.raises(ConfigError, match=r"train.steps: 4 there, 5 now"):
        Run.of(file, "exact", 0, {"train.steps": 5}, tmp_path).claim_directory()
    # A setting that has come since the run was made stands at its default.
    settings["attention"] = {name: x for name, x in settings["attention"].items() if name != "learned"}
    (run.directory / "config.yaml").write_text(yaml.safe_dump(settings))
    assert run.result(Console(quiet=True)) == document


def test_the_seed_of_a_swap_in_stands_in_one_place():
    file = read_config_file(CONFIGS / "harness" / "swap_in" / "smoke.yaml")
    with pytest.raises(ConfigError, match="the seed is a key next to 'training'"):
        Run.of(file, "run", 0, {"training.seed": 3}, CONFIGS)


def test_a_sweep_leaves_out_what_is_done(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**KILLED, "train": {**KILLED["train"], "steps": 4}, "seeds": [0, 1]}))
    command = ["sweep", str(config), "--out", str(tmp_path / "out")]
    for _ in range(2):
        outcome = CliRunner().invoke(cli.experiments, command)
        assert outcome.exit_code == 0, outcome.output
    logs = sorted((tmp_path / "out").rglob("metrics.jsonl"))
    assert [path.parent.name for path in logs] == ["run-seed0", "run-seed1"]
    assert all(len(path.read_text().splitlines()) == 2 for path in logs)
    outcome = CliRunner().invoke(cli.experiments, ["list"])
    assert outcome.exit_code == 0
    assert "harness/language_model/cpu.yaml" in outcome.output


@pytest.mark.parametrize(
    "study",
    [
        "harness/language_model",
        "harness/swap_in",
        pytest.param("harness/long_context", marks=pytest.mark.slow),
        pytest.param("harness/parallel", marks=pytest.mark.slow),
        pytest.param("whole_picture/zoo", marks=pytest.mark.slow),
        *(
            pytest.param(f"control_variates/{name}", marks=pytest.mark.slow)
            for name in ("gap", "continuum", "bias", "swap_in", "vision", "language_model")
        ),
        *(
            pytest.param(f"coresets/{name}", marks=pytest.mark.slow)
            for name in (
                *("size", "growth", "instances", "table", "guard", "bits"),
                *("language_model", "recall", "latency", "certified"),
            )
        ),
        *(
            pytest.param(f"low_rank/{name}", marks=pytest.mark.slow)
            for name in (
                "sketch",
                "projection_fit",
                "spectra",
                "slots",
                "lengths",
                "digits",
                "heads",
                "listops",
                "pathfinder",
            )
        ),
        *(
            pytest.param(f"tensor/{name}", marks=pytest.mark.slow)
            for name in (
                "scaling",
                "decode",
                "degree",
                "least_degrees",
                "phase",
                "budget",
                "sketches",
                "index_sets",
                "window",
                "match",
            )
        ),
        *(
            pytest.param(f"sparse_patterns/{name}", marks=pytest.mark.slow)
            for name in ("log_law", "headline", "budget", "many_patterns", "precision", "picture")
        ),
        *(pytest.param(f"whole_picture/{name}", marks=pytest.mark.slow) for name in ("where_we_lose", "equal_time")),
    ],
)
def test_smoke_studies_run(tmp_path, study):
    file = read_config_file(CONFIGS / study / "smoke.yaml")
    for arm in file.arms:
        run = Run.of(file, arm.name, 0, {}, tmp_path)
        document = run.result(Console(quiet=True))
        assert document == run.result(Console(quiet=True))
