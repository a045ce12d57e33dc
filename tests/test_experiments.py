"""The experiments harness: configurations, data, resuming, and verdicts that follow from result files alone."""

import json

import numpy as np
import pytest
import yaml
from rich.console import Console

from experiments import report
from experiments.config import ConfigError, parse_overrides, read_config_file, resolve
from experiments.data import DATASETS, DataConfig, load
from experiments.models import ModelConfig
from experiments.runs import CONFIGS, EXPERIMENTS, run_arm
from experiments.training import OptimizerConfig, TrainingConfig, evaluate, fit


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


class Killed(BaseException):
    """What a kill does to the program: nothing below it gets to react."""


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    config = TrainingConfig(
        DataConfig("copying", {"length": 8}),
        OptimizerConfig(steps=12, batch=2, checkpoint_every=4, log_every=2, evaluation_batches=1),
        ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16),
    )
    console = Console(quiet=True)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    model, dataset, _ = fit(config, tmp_path / "whole", console)
    whole = evaluate(config, model, dataset, "valid")

    import experiments.training as training

    train_step, calls = training.train_step, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 11:
            raise Killed
        return train_step(*arguments)

    monkeypatch.setattr(training, "train_step", dies)
    with pytest.raises(Killed):
        fit(config, tmp_path / "killed", console)
    monkeypatch.setattr(training, "train_step", train_step)
    model, dataset, _ = fit(config, tmp_path / "killed", console)
    assert evaluate(config, model, dataset, "valid") == whole
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]


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


def test_a_directory_of_another_configuration_is_refused(tmp_path):
    file = read_config_file(CONFIGS / "harness" / "language_model" / "smoke.yaml")
    directory = tmp_path / "harness" / "language_model" / "smoke" / "exact-seed0"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"seed": 9}))
    (directory / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="seed: 9 there, 0 now"):
        run_arm(file, "exact", 0, {}, tmp_path, Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["language_model", "swap_in", "long_context"])
def test_smoke_studies_run(tmp_path, name):
    file = read_config_file(CONFIGS / "harness" / name / "smoke.yaml")
    for arm in file.arms:
        run_arm(file, arm.name, 0, {}, tmp_path, Console(quiet=True))
        assert run_arm(file, arm.name, 0, {}, tmp_path, Console(quiet=True))["arm"] == arm.name
