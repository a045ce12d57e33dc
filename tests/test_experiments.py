"""The experiments harness: configurations, data, resuming, and verdicts that follow from result files alone."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from rich.console import Console

from experiments import report
from experiments.config import ConfigError, parse_overrides, read_config_file, resolve
from experiments.data import DATASETS, DataConfig, load
from experiments.models import AttentionConfig, ModelConfig
from experiments.runs import CONFIGS, EXPERIMENTS, Run
from experiments.training import OptimizerConfig, TrainingConfig, build_model, make_optimizer, train_step


@pytest.fixture(autouse=True)
def ordinary_promotion():
    """JAX as its users have it: Flax's and the models' own layers broadcast and promote."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


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


GENERATED = ["digits", "digit_scenes", "listops", "pathfinder", "recall", "copying", "match"]


@pytest.mark.parametrize("name", GENERATED)
def test_data_is_a_function_of_the_generator_and_the_split(name):
    dataset = load(DataConfig(name))
    first, again, other = (dataset.draw(np.random.default_rng(0), 4, split) for split in ("train", "train", "test"))
    for field in first:
        np.testing.assert_array_equal(first[field], again[field])
    assert any(not np.array_equal(first[field], other[field]) for field in first)
    targets = first.get("targets", first.get("label"))
    assert -1 <= targets.min() <= targets.max() < dataset.num_classes


def test_recall_asks_for_the_value_that_followed_the_key():
    batch = load(DataConfig("recall", {"length": 64, "pairs": 4, "vocabulary": 32})).draw(
        np.random.default_rng(0), 8, "train"
    )
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        values = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        asked = np.flatnonzero(targets >= 0)
        assert len(asked) == 4
        assert all(values[tokens[place]] == targets[place] for place in asked)


def test_listops_labels_are_the_values():
    batch = load(DataConfig("listops")).draw(np.random.default_rng(1), 16, "train")
    functions = {10: min, 11: max, 12: lambda x: int(np.median(x)), 13: lambda x: sum(x) % 10}
    for tokens, length, label in zip(batch["tokens"], batch["lengths"], batch["label"], strict=True):
        stack = []
        for token in tokens[:length]:
            if token != 14:
                stack.append(int(token))
                continue
            arguments = []
            while stack[-1] < 10:
                arguments.append(stack.pop())
            operator = stack.pop()
            value = functions[operator](arguments)
            stack.append(value)
        assert stack == [label]


@pytest.mark.parametrize("name", ["byte_file", "wikitext", "cifar10", "image_folder"])
def test_missing_paths_are_one_clear_line(name):
    with pytest.raises(ConfigError, match=f"'{name}'.*/nowhere") as error:
        load(DataConfig(name, {"path": "/nowhere"}))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="needs the setting 'path'"):
        load(DataConfig(name))
    assert name in DATASETS


KILLED = {
    "experiment": "quality",
    "data": {"name": "copying", "settings": {"length": 8}},
    "model": {"num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "hidden_dim": 16},
    "train": {"steps": 60, "batch": 2, "checkpoint_every": 4, "log_every": 2, "evaluation_batches": 1},
}


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(KILLED))
    console = Console(quiet=True)
    file = read_config_file(config)
    whole = Run.of(file, "run", 0, {}, tmp_path / "whole").result(console)
    run = Run.of(file, "run", 0, {}, tmp_path / "killed")
    log = run.directory / "metrics.jsonl"

    def logged():
        return len(log.read_text().splitlines()) if log.exists() else 0

    killed_at = []
    for stop in (5, 11):
        command = [sys.executable, "-m", "experiments", "run", str(config), "--out", str(tmp_path / "killed")]
        process = subprocess.Popen(command, cwd=CONFIGS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and logged() < stop:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stdout.read().decode()
        process.stdout.close()
        killed_at.append(logged())
    assert killed_at[0] < killed_at[1] < 30
    resumed = run.result(console)
    for split in ("valid", "test"):
        assert resumed["result"][split] == whole["result"][split]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(2, 61, 2))


def test_learned_draws_are_trained():
    dataset = load(DataConfig("copying", {"length": 8}))
    sizes = ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16)
    favor = AttentionConfig("favor", {"num_features": 4, "block_size": 4}, ("projection",))
    config = TrainingConfig(DataConfig("copying"), OptimizerConfig(steps=4), sizes, favor)
    model = build_model(config, dataset)
    batch = dataset.draw(np.random.default_rng(0), 2, "train")
    before = np.asarray(model.body.layers[0].attention.learned["projection"][...])
    assert before.shape == (4, 8)
    optimizer = make_optimizer(config.train, model)
    for _ in range(3):
        train_step(model, optimizer, batch)
    after = np.asarray(model.body.layers[0].attention.learned["projection"][...])
    assert np.abs(after - before).max() > 1e-5
    with pytest.raises(ValueError, match="'favor' draws no 'omega' to learn; it draws projection"):
        AttentionConfig("favor", learned=("omega",))


def _result(root, study, scale, arm, seed, result):
    directory = root / study / scale / f"{arm}-seed{seed}"
    directory.mkdir(parents=True)
    environment = {"backend": "cpu", "processor": "a processor", "device": "cpu"}
    document = {"arm": arm, "seed": seed, "result": result, "environment": environment, "seconds": 1.0}
    (directory / "result.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("favor", "verdict"), [(2.2, "reproduced"), (2.005, "ordering only"), (1.9, "not reproduced"), (None, "not run")]
)
def test_verdicts_follow_from_the_results(tmp_path, favor, verdict):
    claim = next(c for c in report.read_claims(CONFIGS.parent / "experiments" / "claims.yaml") if "below-exact" in c.id)
    for seed in range(3):
        _result(tmp_path, claim.study, "cpu", "exact", seed, {"test": {"bits": 2.0}})
        if favor is not None:
            _result(tmp_path, claim.study, "cpu", "favor", seed, {"test": {"bits": favor}})
    finding = report.judge(claim, tmp_path)
    assert finding.verdict == verdict


def test_a_directory_of_other_settings_is_refused(tmp_path):
    file = read_config_file(CONFIGS / "harness" / "language_model" / "smoke.yaml")
    run = Run.of(file, "exact", 0, {}, tmp_path)
    settings = run.claim_directory()
    (run.directory / "result.json").write_text(json.dumps({"arm": "exact"}))
    assert run.result(Console(quiet=True)) == {"arm": "exact"}
    with pytest.raises(ConfigError, match=r"train.steps: 4 there, 5 now"):
        Run.of(file, "exact", 0, {"train.steps": 5}, tmp_path).claim_directory()
    # A setting that has come since the run was made stands at its default.
    del settings["attention"]["learned"]
    (run.directory / "config.yaml").write_text(yaml.safe_dump(settings))
    assert run.result(Console(quiet=True)) == {"arm": "exact"}


def test_the_seed_of_a_swap_in_stands_in_one_place():
    file = read_config_file(CONFIGS / "harness" / "swap_in" / "smoke.yaml")
    with pytest.raises(ConfigError, match="the seed stands beside 'training'"):
        Run.of(file, "run", 0, {"training.seed": 3}, CONFIGS)


def test_results_follow_from_the_committed_runs():
    root = CONFIGS.parent / "experiments"
    assert (root / "RESULTS.md").read_text() == report.render(root)


@pytest.mark.parametrize("name", ["language_model", "swap_in", "long_context"])
def test_smoke_studies_run(tmp_path, name):
    file = read_config_file(CONFIGS / "harness" / name / "smoke.yaml")
    for arm in file.arms:
        run = Run.of(file, arm.name, 0, {}, tmp_path)
        document = run.result(Console(quiet=True))
        assert document == run.result(Console(quiet=True))
