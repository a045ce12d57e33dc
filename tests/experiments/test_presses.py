"""The study of compressed caches of a generating model, and generation after compression."""

import functools
import pathlib

import jax
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from rich.console import Console

from approx_attention.nnx import compress_caches, init_cache
from benchmarks.decode import continue_tokens, read_prompt
from experiments.config import ConfigError, resolve
from experiments.models import attention_layers
from experiments.real_models import presses
from tests.experiments.test_models import PROMPT, generate, model_of

pytestmark = pytest.mark.usefixtures("models")


def test_generation_goes_on_from_caches_that_lost_nothing():
    model, steps = model_of("exact", num_layers=1), 14
    expected = generate(model, PROMPT, steps=steps)
    init_cache(model, len(PROMPT), max_length=8, block_size=2, keep_queries=4)
    last = read_prompt(model, PROMPT)[:, -1]
    nnx.jit(functools.partial(compress_caches, budget=6, policy="snapkv", coreset_size=16))(model, jax.random.key(0))
    # More steps than the original cache had room for.
    tokens = continue_tokens(model, last, steps)
    np.testing.assert_array_equal(tokens, expected)
    assert all(int(layer.attention_fn.num_seen) == PROMPT.shape[1] for layer in attention_layers(model).values())


SETTINGS = {
    "training": {
        "data": {
            "name": "retrieval",
            "settings": {"length": 16, "questions": 3, "names": 8, "values": 4, "noise": 4, "needles": 2, "chains": 2},
        },
        "model": {
            "num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "hidden_dim": 16
        },
        "train": {"steps": 2, "batch": 4, "log_every": 2, "checkpoint_every": 2},
    },
    "policies": ["kvzip+mass"],
    "budgets": [6, 32],
    "tasks": ["needles"],
    "block_size": 2,
    "keep_queries": 8,
    "chunk": 8,
    "batches": 1,
}  # fmt: skip


def test_the_study_compares_a_seen_question_with_a_new_one(tmp_path: pathlib.Path):
    config = resolve(presses.Config, SETTINGS, {}, "test")
    records = pd.DataFrame(presses.run(config, tmp_path, Console(quiet=True)))
    assert len(records) == 2 * (1 + 2)
    assert set(records.question) == {"seen", "new"}
    whole, full, small = (
        records[chosen] for chosen in (records.policy == "none", records.budget == 32, records.budget == 6)
    )
    assert (whole.attention_error == 0).all()
    # Room for all tokens loses nothing; a small budget loses something, and its cache is smaller.
    assert (full.attention_error < 1e-4).all()
    assert (small.attention_error > 1e-3).all()
    assert small.cache_bytes.max() < whole.cache_bytes.min()
    assert (full.accuracy.to_numpy() == whole.accuracy.to_numpy()).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policies": ["snapkw"]}, "unknown policy 'snapkw'"),
        ({"policies": ["halving+mass"]}, "heuristics with"),
        ({"chunk": 9}, "9 are more than 8"),
        (
            {"training.data.name": "copying", "training.data.settings": {}},
            "training.data.name must be 'retrieval', got 'copying'",
        ),
    ],
)
def test_what_is_wrong_is_said(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(presses.Config, SETTINGS, overrides, "test")
