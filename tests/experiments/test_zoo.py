"""The comparison of all methods: every one is in it, and they have equally many bytes to answer from."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from approx_attention import METHODS
from experiments import data
from experiments.config import ConfigError, read_config_file
from experiments.data import DataConfig
from experiments.fidelity import attention_errors
from experiments.harness.quality import bytes_held
from experiments.runs import CONFIGS, Run
from experiments.training import build_model
from experiments.whole_picture import comparison
from experiments.whole_picture.choice import choose
from experiments.whole_picture.comparison import rank_correlation
from experiments.whole_picture.figures import by_score
from experiments.whole_picture.zoo import CHOOSE, ENDS, answer_bytes

ZOO = CONFIGS / "whole_picture" / "zoo"
# Methods that are newer than the committed runs, which a configuration with them would make runs of another one.
NOT_RUN = {"priority"}
SCALES = [(scale, arm) for scale in ("cpu", "gpu") for arm in ("recall", "bytes", "listops")]


def _config(scale, arm):
    return Run.of(read_config_file(ZOO / f"{scale}.yaml"), arm, 0, {}, ZOO).config


def _length(config):
    settings = config.training.data.settings
    return settings.get("length") or settings["greatest_length"]


@pytest.mark.parametrize(("scale", "arm"), SCALES)
def test_no_method_is_left_out(scale, arm):
    named = {attention.method for attention in _config(scale, arm).methods.values()}
    facts = {name: method.capabilities for name, method in METHODS.items()}
    if arm == "listops":
        wanted = {name for name in METHODS if facts[name].subquadratic} | {"exact"}
    else:
        # Without the future it is favor.
        wanted = {name for name in METHODS if facts[name].causal} - {"scatterbrain"}
    if scale == "cpu":
        wanted -= NOT_RUN
    assert named == wanted


@pytest.mark.parametrize(("scale", "arm"), SCALES)
def test_bytes_are_equal(scale, arm):
    config = _config(scale, arm)
    # All monomials of degree 2, which keep the weights positive, are as many as they are.
    exempt = {*ENDS, "polynomial"}
    if arm == "bytes":  # what has a summary of every block grows with the length
        exempt |= {"sparse_coreset", "block_linformer"}
    held = {
        name: answer_bytes(attention, _length(config), config.training.model.head_dim, arm != "listops")
        for name, attention in config.methods.items()
    }
    window = held["local"]
    for name, count in held.items():
        assert (abs(count / window - 1) <= 0.15) == (name not in exempt), (name, count / window)


@pytest.mark.parametrize("arm", ["recall", "listops"])
def test_bytes_agree_with_what_summaries_and_caches_hold(arm):
    config = _config("cpu", arm)
    # The count of caches has room for more blocks than the task has.
    unlike = {*CHOOSE, "block_linformer"}
    dataset = data.load(DataConfig("recall", {"length": _length(config), "pairs": 4}))
    if arm == "listops":
        dataset = dataclasses.replace(dataset, is_causal=False)
    compared = 0
    for name, attention in config.methods.items():
        held = bytes_held(config.training, dataset, attention)
        if held is None or attention.method in unlike:
            continue
        own = answer_bytes(attention, _length(config), config.training.model.head_dim, dataset.is_causal)
        # Masses of exact tokens and the scales of features are counted in one and not in the other.
        assert own == pytest.approx(held, rel=0.07), name
        compared += 1
    assert compared >= 7


def test_joined_pairs_are_asked_for_by_their_keys():
    pairs, vocabulary = 4, 20
    dataset = data.load(DataConfig("recall", {"length": 16, "pairs": pairs, "vocabulary": vocabulary, "joined": True}))
    batch = dataset.draw(np.random.default_rng(0), 16, "train")
    half = vocabulary // 2
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        key, value = np.divmod(tokens[:pairs] - vocabulary, vocabulary - half)
        held = dict(zip(1 + key, half + value, strict=True))
        asked = np.flatnonzero(targets >= 0)
        assert len(asked) == len(held) == pairs <= asked.min()
        assert all(held[tokens[place]] == targets[place] for place in asked)
        assert not np.any(np.delete(tokens[pairs:], asked - pairs))
    assert batch["tokens"].max() < dataset.vocabulary


def test_ranks():
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 90.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, float("nan")], [9.0, 5.0, 1.0]) == pytest.approx(-1)


def test_the_best_is_first_and_what_diverged_is_last():
    def entry(accuracy):
        return {"accuracy": accuracy, "bits": 8 * (1 - accuracy)}

    methods = {"a": entry(0.5), "b": entry(float("nan")), "c": entry(0.9)}
    assert list(by_score([{"methods": methods, "data": {}}])) == ["c", "a", "b"]
    assert list(by_score([{"methods": methods, "data": {"bytes": {}}}])) == ["c", "a", "b"]


def test_exact_attention_must_take_part():
    with pytest.raises(ConfigError, match="must have 'exact' among them"):
        Run.of(read_config_file(ZOO / "smoke.yaml"), "run", 0, {"methods": {"local": {"method": "local"}}}, ZOO)


@pytest.mark.slow
@pytest.mark.usefixtures("models")
def test_the_plan_chooses_the_least_error_in_the_bytes():
    config = _config("cpu", "recall")
    dataset = data.load(config.training.data)
    examples = data.held_out(dataset, "valid", 4, 1)[0]
    model = build_model(config.training, dataset)
    methods = {name: config.methods[name] for name in ("exact", "mean_value", "local", "uniform_sample", "top_k")}
    chosen, facts = choose(model, examples, methods, 2400, True)
    # `top_k` holds all tokens, and the smallest window is far from this one.
    assert chosen.method in {"mean_value", "local", "uniform_sample"}
    assert facts["held_bytes"] <= 2400
    errors = attention_errors(model, examples, {"chosen": chosen, **{name: methods[name] for name in methods}})
    assert facts["held_out_error"] == pytest.approx(errors["chosen"]["mean"], rel=0.2)
    assert errors["chosen"]["mean"] <= 1.1 * min(
        errors[name]["mean"] for name in ("mean_value", "local", "uniform_sample")
    )


@pytest.mark.slow
@pytest.mark.usefixtures("models")
def test_times_are_taken_again_without_training(tmp_path, monkeypatch):
    run = Run.of(read_config_file(ZOO / "smoke.yaml"), "run", 0, {}, tmp_path)
    first = run.result(Console(quiet=True))["result"]
    (run.directory / "result.json").unlink()
    monkeypatch.setattr(comparison, "fit", None)
    second = run.result(Console(quiet=True))["result"]
    assert second["rank_correlation"] == first["rank_correlation"]
    assert second["plan"] == first["plan"]
    # `exact` holds more than the plan may: it is not what the plan is compared with.
    assert first["plan"]["best"] in {entry["bits"] for name, entry in first["methods"].items() if name != "exact"}
    for name, entry in second["methods"].items():
        assert entry.pop("seconds") > 0
        assert entry == {what: figure for what, figure in first["methods"][name].items() if what != "seconds"}
    with pytest.raises(ConfigError, match="training.train.steps: 4 there, 8 now"):
        Run.of(read_config_file(ZOO / "smoke.yaml"), "run", 0, {"training.train.steps": 8}, tmp_path).claim_directory()
