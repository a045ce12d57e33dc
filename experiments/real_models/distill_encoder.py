"""The learned parts of attention fitted to a trained sentence encoder, layer by layer, and then the whole model."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments import fitting
from experiments.config import Count, Seeded, Several
from experiments.fitting import FitConfig, Layer, Subject
from experiments.real_models.documents import excerpts
from experiments.real_models.encoder import Encoder, load_encoder
from experiments.real_models.swap_encoder import batches, embeddings
from experiments.results import Record

table, figure = fitting.table, fitting.figure


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Texts, sizes and steps.

    Attributes:
        modules: of the standard library, whose docstrings are learned from.
        held_out: those on which all figures are measured.
        fit: methods and steps.
        excerpt_length: tokens of an excerpt.
    """

    modules: Several[str]
    held_out: Several[str]
    fit: FitConfig
    excerpt_length: Count = 128


def run(config: Config, directory: pathlib.Path, console: Any) -> list[Record]:
    """One record for each method; its score is the cosine to the exact embedding."""
    exact, tokenizer = load_encoder()
    learned_from, held_out = (
        excerpts(modules, config.excerpt_length, tokenizer) for modules in (config.modules, config.held_out)
    )
    truth, targets = (embeddings(exact, x, config.fit.batch) for x in (held_out, learned_from))
    embed = nnx.jit(lambda model, tokens: model(tokens))

    def score(model: nnx.Module) -> dict[str, float]:
        found = np.concatenate([embed(model, tokens) for tokens in batches(held_out, config.fit.batch)])
        return {"cosine": float(np.mean(np.sum(found * truth, axis=-1)))}

    attention = exact.layers[0].attention
    subject = Subject(
        teacher=exact,
        layer=Layer(attention.num_kv_heads, attention.head_dim, config.excerpt_length, is_causal=False),
        batches=shuffled(config, learned_from, jnp.asarray(targets)),
        held_out=[(tokens, None) for tokens in batches(held_out, config.fit.batch)],
        call=lambda model, batch: model(batch[0]),
        loss=distance,
        score=score,
    )
    return [fitting.fitted(subject, method, config.fit, config.seed, console) for method in config.fit.methods]


def distance(model: Encoder, batch: tuple[Array, Array]) -> Array:
    """One less the mean cosine of embeddings to those of exact attention."""
    tokens, target = batch
    return 1 - jnp.mean(jnp.sum(model(tokens) * target, axis=-1))


def shuffled(config: Config, tokens: Array, targets: Array) -> list[tuple[Array, Array]]:
    """Batches of excerpts in random order, each with the exact embeddings."""
    order = jax.random.permutation(jax.random.key(config.seed), len(tokens))
    count = len(tokens) // config.fit.batch * config.fit.batch
    return [(tokens[rows], targets[rows]) for rows in order[:count].reshape(-1, config.fit.batch)]
