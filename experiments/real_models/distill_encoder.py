"""The learned parts of attention fitted to a trained sentence encoder, layer by layer, and then the whole model."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure

from approx_attention.core import unknown
from approx_attention.nnx import (
    ApproxAttention,
    Eva,
    Hedgehog,
    Lara,
    LinformerAttention,
    Rfa,
    distill_attention,
    mean_pool_init,
    tune,
)
from experiments.config import Count, Positive, Seeded, Several
from experiments.real_models.documents import excerpts
from experiments.real_models.encoder import Encoder, SelfAttention, load_encoder
from experiments.real_models.swap_encoder import batches, embeddings
from experiments.results import Frame, Record
from experiments.show import code, markdown, parts, spread


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Texts, sizes and steps.

    Attributes:
        modules: of the standard library, whose docstrings are learned from.
        held_out: those on which all figures are measured.
        excerpt_length: tokens of an excerpt.
        methods: names in `MODULES`.
        size: slots of Linformer, chunks of EVA and its window, landmarks of LARA, a quarter of the features of RFA.
        batch_size: excerpts per step.
        steps: of fitting attention.
        tuning_steps: of the whole model after that, to the exact embeddings.
        learning_rate: of Adam, while fitting.
        tuning_rate: of Adam, while tuning.
    """

    modules: Several[str]
    held_out: Several[str]
    methods: Several[str]
    excerpt_length: Count = 128
    size: Count = 16
    batch_size: Count = 16
    steps: Count = 100
    tuning_steps: Count = 20
    learning_rate: Positive = 0.003
    tuning_rate: Positive = 1e-4

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in MODULES:
                raise ValueError(unknown("method", name, MODULES))


def linformer(layer: SelfAttention, config: Config, rngs: nnx.Rngs) -> nnx.Module:
    options: Any = {"num_slots": config.size, "sharing": "none", "init": mean_pool_init()}
    return LinformerAttention(layer.num_heads, config.excerpt_length, rngs=rngs, **options)


def hedgehog(layer: SelfAttention, config: Config, rngs: nnx.Rngs) -> nnx.Module:
    return Hedgehog(layer.head_dim, layer.num_heads)


def eva(layer: SelfAttention, config: Config, rngs: nnx.Rngs) -> nnx.Module:
    options = {"window_size": config.size, "num_chunks": config.size}
    return Eva(layer.head_dim, layer.num_heads, options=options, adaptors=True, rngs=rngs)


def lara(layer: SelfAttention, config: Config, rngs: nnx.Rngs) -> nnx.Module:
    return Lara(layer.head_dim, num_landmarks=config.size, rngs=rngs)


def rfa(layer: SelfAttention, config: Config, rngs: nnx.Rngs) -> nnx.Module:
    return Rfa(layer.head_dim, layer.num_heads, options={"num_features": 4 * config.size}, rngs=rngs)


MODULES: dict[str, Callable[[SelfAttention, Config, nnx.Rngs], nnx.Module]] = {
    "linformer": linformer, "hedgehog": hedgehog, "eva": eva, "lara": lara, "rfa": rfa,
}  # fmt: skip


def run(config: Config, directory: pathlib.Path, console: Any) -> list[Record]:
    """One record for each method: errors of attention and cosines to the exact embedding, before and after."""
    exact, tokenizer = load_encoder()
    learned_from, held_out = (
        excerpts(modules, config.excerpt_length, tokenizer) for modules in (config.modules, config.held_out)
    )
    truth, targets = (embeddings(exact, x, config.batch_size) for x in (held_out, learned_from))
    pairs = shuffled(config, learned_from, jnp.asarray(targets))
    records: list[Record] = []
    for method in config.methods:
        model, rngs = nnx.clone(exact), nnx.Rngs(config.seed)
        for layer in model.layers:
            module = MODULES[method](layer.attention, config, rngs)
            layer.attention.attention_fn = nnx.data(ApproxAttention(module, rngs=rngs))

        def cosine(model: Encoder = model) -> float:
            return float(np.mean(np.sum(embeddings(model, held_out, config.batch_size) * truth, axis=-1)))

        cosines = [cosine()]
        fitted = distill_attention(
            model,
            exact,
            [tokens for tokens, _ in pairs],
            config.steps,
            optimizer=optax.adam(config.learning_rate),
            held_out=batches(held_out, config.batch_size),
        )
        cosines.append(cosine())
        tune(model, distance, pairs, config.tuning_steps, optimizer=optax.adam(config.tuning_rate))
        cosines.append(cosine())
        before, after = (float(np.mean([*of.values()])) for of in (fitted.before, fitted.after))
        records.append(
            {
                "method": method,
                "tokens_read": fitted.num_tokens,
                "tokens_of_texts": int(learned_from.size),
                "error_before": before,
                "error_after": after,
                "cosine_before": cosines[0],
                "cosine_fitted": cosines[1],
                "cosine_tuned": cosines[2],
            }
        )
        console.print(f"{method}: error {before:.3f} -> {after:.3f}, cosine {' -> '.join(f'{x:.3f}' for x in cosines)}")
    return records


def distance(model: Encoder, batch: tuple[Array, Array]) -> Array:
    """One less the mean cosine of embeddings to those of exact attention."""
    tokens, target = batch
    return 1 - jnp.mean(jnp.sum(model(tokens) * target, axis=-1))


def shuffled(config: Config, tokens: Array, targets: Array) -> list[tuple[Array, Array]]:
    """Batches of excerpts in random order, each with the exact embeddings."""
    order = jax.random.permutation(jax.random.key(config.seed), len(tokens))
    count = len(tokens) // config.batch_size * config.batch_size
    return [(tokens[rows], targets[rows]) for rows in order[:count].reshape(-1, config.batch_size)]


def table(records: Frame) -> Iterable[str]:
    """Errors and cosines before and after."""
    figures = ("error_before", "error_after", "cosine_before", "cosine_fitted", "cosine_tuned")
    rows = [
        [code(method), *(spread(list(own[name])) for name in figures), f"{own['tokens_read'].iloc[0]:,.0f}"]
        for method, own in parts(records, "method")
    ]
    yield "Relative error of the attention and cosine to the exact embedding, on held-out modules"
    yield markdown("|error before|fitted|cosine before|fitted|tuned|tokens read", rows)


def figure(records: Frame) -> Figure:
    """Cosines before, after fitting and after tuning."""
    stages = ("cosine_before", "cosine_fitted", "cosine_tuned")
    drawn = Figure(figsize=(6.5, 4))
    axes = drawn.subplots()
    for method, own in parts(records, "method"):
        axes.plot(range(3), [own[stage].mean() for stage in stages], marker="o", label=method)
    axes.set_xticks(range(3), ["as put in", "fitted", "tuned"])
    axes.set(ylabel="cosine to the exact embedding")
    drawn.legend(loc="outside lower center", ncols=5)
    return drawn
