"""The comparison at equal time: sizes are found by the clock, once for all seeds, and what is too slow is named."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from approx_attention.evaluation import Timing
from experiments import plots, tables
from experiments.config import ConfigError, read_config_file
from experiments.models import AttentionConfig
from experiments.runs import CONFIGS, Run
from experiments.training import build_model
from experiments.whole_picture import equal_time

STUDY = read_config_file(CONFIGS / "whole_picture" / "equal_time" / "smoke.yaml")


def _config(tmp_path, seed=0):
    return Run.of(STUDY, "run", seed, {}, tmp_path).config


@pytest.fixture
def clock(monkeypatch):
    """A layer takes as many seconds as its size, exact attention 100, and what has no size 200."""

    def layer(training, attention, length, is_causal):
        sizes = [x for name, x in attention.settings.items() if name != "block_size"]
        return 100.0 if attention.method == "exact" else float(sizes[0]) if sizes else 200.0

    monkeypatch.setattr(equal_time, "layer", layer)
    monkeypatch.setattr(
        equal_time, "time_interleaved", lambda calls, rounds: {name: Timing(x, x) for name, x in calls.items()}
    )


@pytest.mark.usefixtures("clock")
def test_sizes_are_the_largest_within_the_share(tmp_path):
    methods = {
        "favor": AttentionConfig("favor", {"block_size": 8}),
        "local": AttentionConfig("local"),
        "cosformer": AttentionConfig("cosformer"),
    }
    config = dataclasses.replace(_config(tmp_path), methods=methods, share=0.5)
    found = equal_time.fit_sizes(config, 512)
    assert found["favor"] == {"size": 32, "share": 0.32, "seconds": 32.0}
    assert found["local"]["size"] == 32
    assert found["cosformer"] == {"size": None, "share": 2.0, "seconds": 200.0}
    # What is too slow at its smallest size stands there with that.
    assert equal_time.fit_sizes(dataclasses.replace(config, share=0.1), 512)["favor"]["size"] == 16


def test_sizes_go_up_to_half_of_the_length():
    assert equal_time.sizes_of(AttentionConfig("favor"), 300) == [16, 32, 64, 128, 150]
    assert equal_time.sizes_of(AttentionConfig("bigbird"), 4096) == [1, 3, 6]
    assert equal_time.sizes_of(AttentionConfig("cosformer"), 4096) == [None]


@pytest.mark.usefixtures("clock")
def test_all_seeds_share_the_sizes_and_other_settings_are_refused(tmp_path, monkeypatch):
    first = equal_time.shared_sizes(_config(tmp_path), tmp_path / "run-seed0", 512)
    monkeypatch.setattr(equal_time, "fit_sizes", None)
    assert equal_time.shared_sizes(_config(tmp_path, 1), tmp_path / "run-seed1", 512) == first
    with pytest.raises(ConfigError, match="run-sizes.json holds the sizes of other settings"):
        equal_time.shared_sizes(dataclasses.replace(_config(tmp_path), share=0.2), tmp_path / "run-seed0", 512)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods": {"exact": {}}}, "exact attention is what all are held to"),
        ({"methods": {"favor": {"method": "favor", "settings": {"num_features": 8}}}}, "sizes are found, not given"),
        ({"share": 0}, "share must be above 0 and at most 1, got 0"),
        ({"training.attention": {"method": "local"}}, "'training' has exact attention"),
    ],
)
def test_bad_settings(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        Run.of(STUDY, "run", 0, overrides, tmp_path)


@pytest.mark.usefixtures("clock", "models")
def test_a_run_its_table_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(equal_time, "fit", lambda training, *_: (build_model(training, dataset), dataset, 0.0))
    config = _config(tmp_path)
    dataset = equal_time.data.load(config.training.data)
    tuned = []
    monkeypatch.setattr(equal_time, "tune", lambda training, steps, model, data: tuned.append(nnx.state(model)))
    run = Run.of(STUDY, "run", 0, {}, tmp_path)
    document = run.result(Console(quiet=True))
    result = document["result"]
    assert set(result["methods"]) == {"exact", "local"}
    assert result["too_slow"] == {"mean_value": 2.0}
    assert len(tuned) == 2
    for entry in result["methods"].values():
        # Nothing was tuned, and the window of as many tokens as there are is exact.
        assert entry["bits"] == entry["untuned"]
    text = "\n".join(tables.tables("equal_time", [document]))
    assert "`mean_value` (2.00)" in text
    figure = plots.draw("equal_time", [document])
    figure.draw_without_rendering()
    ranked, by_error = figure.axes
    assert {label.get_text().split()[0] for label in ranked.get_yticklabels()} == {"exact", "local"}
    assert len(by_error.lines) == 1
    assert np.isfinite(by_error.lines[0].get_ydata()).all()
