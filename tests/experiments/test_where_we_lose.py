"""The study of where methods lose: properties of its data, and verdicts that follow from the errors."""

import numpy as np
import pandas as pd
import pytest

from approx_attention.evaluation import held_bytes
from experiments.config import ConfigError, resolve
from experiments.whole_picture.where_we_lose import (
    FAMILIES,
    Config,
    draw,
    equal_size,
    loss_rows,
    losses,
    mean_errors,
)

CONFIG = Config(["needle"], tokens=64, length=512, num_heads=2, head_dim=32)


def weights(family, head=0):
    """The exact attention weights of a head, and its values."""
    q, k, v = (np.asarray(x[0, :, head], np.float64) for x in draw(CONFIG, family))
    logits = q @ k.T / np.sqrt(q.shape[1])
    w = np.exp(logits - logits.max(1, keepdims=True))
    return w / w.sum(1, keepdims=True), v


@pytest.mark.parametrize("head", [0, 1])
def test_one_key_takes_nine_tenths_of_a_needle_and_of_a_sink(head):
    needle, _ = weights("needle", head)
    assert len(set(needle.argmax(1))) == 1
    assert abs(needle.max(1).mean() - 0.9) < 0.02
    sink, v = weights("sink", head)
    assert set(sink.argmax(1)) == {0}
    assert abs(sink[:, 0].mean() - 0.9) < 0.02
    assert not v[0].any()


def test_local_weights_fall_with_distance():
    w, _ = weights("local")
    distance = np.abs(np.arange(512)[:, None] - np.arange(512)[None, :])
    distance = np.minimum(distance, 512 - distance)
    assert 7 < np.sqrt(np.sum(w * distance**2) / 512) < 9  # a standard deviation of 8


def test_the_spread_of_gaussian_logits_and_what_outliers_are():
    for spread in (0.5, 2.0):
        q, k, _ = (np.asarray(x[0, :, 0], np.float64) for x in draw(CONFIG, f"gaussian-{spread:g}"))
        assert np.std(q @ k.T / np.sqrt(32)) == pytest.approx(spread**2, rel=0.1)
    w, _ = weights("outliers")
    # Half of the queries put most of their weight on the one key in a hundred that lies opposite.
    q, k, _ = (np.asarray(x[0, :, 0]) for x in draw(CONFIG, "outliers"))
    few = np.argsort(k @ k.mean(0))[:5]
    assert 0.4 < (w[:, few].sum(1) > 0.5).mean() < 0.6


def test_heads_and_seeds_differ_and_unknown_families_are_refused():
    for family in ("gaussian-1", "clustered", "outliers", "needle", "local", "sink"):
        key = draw(CONFIG, family).value
        assert key.shape == (1, 512, 2, 32)
        assert not np.allclose(key[0, :, 0], key[0, :, 1])
    assert {"sample", "gaussian", "sink"} <= set(FAMILIES)
    with pytest.raises(ConfigError, match="unknown family 'needles'; did you mean 'needle'"):
        resolve(Config, {"families": ["needles"], "tokens": 1}, {}, "here")


def test_sizes_fill_the_budget_and_no_more():
    tensors = draw(CONFIG, "needle")
    allowed = 64 * 64 * 4
    for name, argument in (("mean_pool", "num_landmarks"), ("favor", "num_features"), ("local", "window_size")):
        size, fits = equal_size(tensors, name, 64, is_causal=False)
        assert fits
        assert size is not None
        held = [held_bytes(tensors, name, {argument: size + more}, is_causal=False) for more in (0, 2)]
        assert held[0] is not None
        assert held[1] is not None
        assert held[0] <= allowed < held[1]
    assert equal_size(tensors, "linformer", 64, is_causal=False) == (64, True)  # by the cost of its products
    assert equal_size(tensors, "mean_value", 64, is_causal=False) == (None, True)
    assert equal_size(tensors, "bigbird", 64, is_causal=False) == (2, False)  # its fixed blocks alone see more


def test_verdicts_follow_from_the_errors():
    errors = {
        0: {"mean_value": 0.5, "local": 0.2, "a": 0.3, "b": 0.1},
        1: {"mean_value": 0.5, "local": 0.2, "a": 0.5},
    }
    records = pd.DataFrame(
        [
            {
                "configuration": "run",
                "seed": seed,
                "family": family,
                "method": name,
                "error": error,
                "fits": name != "b",
            }
            for seed, by_name in errors.items()
            for family in ("x", "y")
            for name, error in by_name.items()
        ]
    )
    assert mean_errors(records).loc["a", "x"] == pytest.approx(0.4)
    assert loss_rows(records) == [["`a`", "none", "all"], ["`b` *", "none", "none"]]
    known = pd.DataFrame(
        {"x": {"mean_value": 0.5, "local": 0.2, "a": 0.4, "b": 0.1}, "y": {"mean_value": 0.3, "local": 0.6, "a": 0.4}}
    )
    assert losses(known) == {"a": {"mean_value": ["y"], "local": ["x"]}, "b": {"mean_value": [], "local": []}}
