"""The sample and captured tensors: the model is causal, the commands work."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx

from approx_attention.evaluation import load_tensors
from experiments.__main__ import experiments
from experiments.config import ConfigError
from experiments.models import AttentionConfig, LanguageModel, ModelConfig


class TwoLayers(nnx.Module):
    """A model with two of Flax's attention layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = (
            nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs) for _ in range(2)
        )

    def __call__(self, x):
        return self.second(self.first(x))


def two_layers():
    model = TwoLayers(nnx.Rngs(0))
    return model, lambda model: model(jnp.ones((1, 5, 8)))


@pytest.mark.usefixtures("models")
def test_the_model_does_not_see_the_future():
    sizes = ModelConfig(num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=16)
    model = LanguageModel(sizes, AttentionConfig(), vocabulary=256, rngs=nnx.Rngs(0))
    tokens = np.arange(12)[None]
    answer = nnx.jit(lambda model, tokens: model(tokens))
    before, after = (np.asarray(answer(model, x)) for x in (tokens, np.where(tokens == 7, 200, tokens)))
    np.testing.assert_allclose(after[0, :7], before[0, :7], atol=1e-6)
    assert np.abs(after[0, 7:] - before[0, 7:]).max() > 1e-3


@pytest.mark.usefixtures("models")
def test_the_sample_is_captured_from_a_trained_model(tmp_path):
    out = tmp_path / "sample.npz"
    sizes = "model={num_layers: 2, model_dim: 16, num_heads: 4, num_kv_heads: 2, head_dim: 8, hidden_dim: 16}"
    arguments = [
        "sample",
        "harness/language_model",
        "--scale",
        "smoke",
        "--set",
        sizes,
        "--out",
        str(tmp_path / "runs"),
        "--to",
        str(out),
    ]
    outcome = CliRunner().invoke(experiments, arguments)
    assert outcome.exit_code == 0, outcome.output
    tensors = load_tensors(out)
    assert tensors.query.shape == (2, 64, 2, 8)
    assert tensors.key.shape == (2, 64, 1, 8)
    provenance = json.loads(out.with_suffix(".txt").read_text())
    assert len({entry["layer"] for entry in provenance["layers"]}) == 2
    assert provenance["data"]["sha256"]


@pytest.mark.usefixtures("models")
def test_layers_of_a_trained_model_are_captured(tmp_path):
    out = tmp_path / "layers.npz"
    arguments = ["capture", "harness/language_model", "--scale", "smoke", "--configuration", "local"]
    arguments += ["--out", str(tmp_path / "runs"), "--to", str(out)]
    outcome = CliRunner().invoke(experiments, [*arguments, "--batch", "3"])
    assert outcome.exit_code == 0, outcome.output
    name = "body.layers.0.attention"
    assert load_tensors(out, tuple(f"{name}.{x}" for x in "qkv")).query.shape == (3, 64, 2, 8)
    outcome = CliRunner().invoke(experiments, [*arguments, "--layers", "body.layers.1.attention"])
    assert isinstance(outcome.exception, ConfigError)
    assert "unknown layer 'body.layers.1.attention'; did you mean 'body.layers.0.attention'" in str(outcome.exception)


def test_a_users_model_is_captured_to_a_file_that_compare_reads(tmp_path):
    out = tmp_path / "captured.npz"
    outcome = CliRunner().invoke(
        experiments, ["capture-model", "tests.experiments.test_sample:two_layers", "--to", str(out)]
    )
    assert outcome.exit_code == 0, outcome.output
    tensors = load_tensors(out, ("second.q", "second.k", "second.v"))
    assert tensors.query.shape == (1, 5, 2, 4)
    outcome = CliRunner().invoke(experiments, ["capture-model", "tests.nowhere:make", "--to", str(out)])
    assert isinstance(outcome.exception, ConfigError)
    assert "'tests.nowhere:make' cannot be imported: No module named 'tests.nowhere'" in str(outcome.exception)
