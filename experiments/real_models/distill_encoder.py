"""The learned parts of attention fitted to a trained sentence encoder, layer by layer, and then the whole model."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments import fitting
from experiments.config import Count, Seeded, Several
from experiments.fitting import FitConfig, Layer, Subject
from experiments.real_models.documents import excerpts
from experiments.real_models.encoder import Encoder, load_encoder
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
        shuffled(config, excerpts(modules, config.excerpt_length, tokenizer))
        for modules in (config.modules, config.held_out)
    )
    embed = nnx.jit(lambda model, tokens: model(tokens))
    truth = [embed(exact, tokens) for tokens in held_out]

    def score(model: nnx.Module) -> dict[str, float]:
        cosines = [jnp.sum(embed(model, tokens) * own, axis=-1) for tokens, own in zip(held_out, truth, strict=True)]
        return {"cosine": float(jnp.mean(jnp.stack(cosines)))}

    attention = exact.layers[0].attention
    subject = Subject(
        teacher=exact,
        layer=Layer(attention.num_kv_heads, attention.head_dim, config.excerpt_length, is_causal=False),
        batches=learned_from,
        tuning_batches=[(tokens, embed(exact, tokens)) for tokens in learned_from[: config.fit.tuning_steps]],
        held_out=held_out,
        call=lambda model, tokens: model(tokens),
        loss=distance,
        score=score,
    )
    return [fitting.fitted(subject, method, config.fit, config.seed, console) for method in config.fit.methods]


def distance(model: Encoder, batch: tuple[Array, Array]) -> Array:
    """One less the mean cosine of embeddings to those of exact attention."""
    tokens, target = batch
    return 1 - jnp.mean(jnp.sum(model(tokens) * target, axis=-1))


def shuffled(config: Config, tokens: Array) -> list[Array]:
    """Whole batches of excerpts in random order."""
    order = jax.random.permutation(jax.random.key(config.seed), len(tokens))
    count = len(tokens) // config.fit.batch * config.fit.batch
    return list(tokens[order[:count].reshape(-1, config.fit.batch)])
