"""The reference models: generation from caches, and the attention modules they are built on."""

import dataclasses
import functools

import numpy as np
import pytest
from flax import nnx

from approx_attention.nnx import ApproxAttention, init_cache, replace_attention
from benchmarks.decode import continue_tokens, read_prompt
from experiments.models import AttentionConfig, LanguageModel, ModelConfig, attention_layers, use_attention
from tests.cases import settings
from tests.references import having

pytestmark = pytest.mark.usefixtures("models")

SIZES = ModelConfig(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=32)
PROMPT = np.random.default_rng(1).integers(0, 17, (2, 6))


@functools.cache
def _model_of(name, num_layers):
    config = AttentionConfig(name, settings(name))
    sizes = dataclasses.replace(SIZES, num_layers=num_layers)
    return nnx.split(LanguageModel(sizes, config, vocabulary=17, rngs=nnx.Rngs(0)))


def model_of(name, num_layers=2):
    """A copy of a model that is made once."""
    return nnx.merge(*_model_of(name, num_layers), copy=True)


@functools.partial(nnx.jit, static_argnames=("batch", "max_length"))
def start(model, *, batch, max_length):
    init_cache(model, batch, max_length=max_length)


def generate(model, prompt, *, steps):
    """The likeliest tokens after a prompt, one by one, from caches."""
    start(model, batch=len(prompt), max_length=prompt.shape[1] + steps)
    tokens = continue_tokens(model, read_prompt(model, prompt)[:, -1], steps)
    for layer in attention_layers(model).values():
        layer.attention_fn.drop_cache()
    return tokens


@nnx.jit
def logits_of(model, tokens):
    return model(tokens)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("exact", "favor", "mean_pool") else pytest.mark.slow)
        for name in having(decode=True)
    ],
)
def test_greedy_generation_takes_the_likeliest_token_of_the_whole_sequence(name):
    # All layers are alike: only exact attention is tested with caches of more than one.
    model = model_of(name, num_layers=2 if name == "exact" else 1)
    tokens = np.asarray(generate(model, PROMPT, steps=5))
    logits = np.asarray(logits_of(model, np.concatenate([PROMPT, tokens], axis=1)))
    np.testing.assert_array_equal(tokens, logits[:, PROMPT.shape[1] - 1 : -1].argmax(-1))


def test_layers_are_built_on_the_library_modules():
    model, twin = model_of("favor"), model_of("exact")
    assert all(isinstance(layer.attention_fn, ApproxAttention) for layer in attention_layers(model).values())
    replace_attention(twin, "favor", is_causal=True, rngs=nnx.Rngs(1), **settings("favor"))
    keys = [layer.attention_fn.stream.key for layer in attention_layers(model).values()]
    for key, layer in zip(keys, attention_layers(twin).values(), strict=True):
        layer.attention_fn.stream.key[...] = key[...]
    np.testing.assert_allclose(logits_of(twin, PROMPT), logits_of(model, PROMPT), atol=1e-6)
    use_attention(model, AttentionConfig("exact"))
    np.testing.assert_allclose(logits_of(model, PROMPT), logits_of(model_of("exact"), PROMPT), atol=1e-6)


def test_a_convolution_sees_no_later_token_and_goes_on_in_caches():
    sizes = ModelConfig(
        num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16, convolution=3
    )
    model = LanguageModel(sizes, AttentionConfig(), vocabulary=32, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 31, (2, 12))
    whole = logits_of(model, tokens)
    other = logits_of(model, np.where(np.arange(12) == 7, 31, tokens))
    np.testing.assert_allclose(other[:, :7], whole[:, :7], atol=1e-6)
    for place in (7, 8, 9):  # the last position is reached by two layers, or by attention
        assert np.abs(other[:, place] - whole[:, place]).max() > 1e-4
    for _ in range(2):  # a second sequence starts with empty caches
        start(model, batch=2, max_length=12)
        parts = [logits_of(model, tokens[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 7), (7, 12))]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
