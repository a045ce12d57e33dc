"""Trains the model on Python's standard library and writes the sample: ``python -m experiments.sample --out FILE``."""

import dataclasses
import hashlib
import importlib
import json
import pathlib
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from approx_attention.compare import write_atomically
from experiments.capture import capture
from experiments.sample.model import ByteLanguageModel, ModelConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training run: steps of ``batch`` sequences of ``length`` bytes."""

    steps: int
    batch: int
    length: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines the sample, beside the Python version that supplies the text."""

    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    # Most steps on short sequences, where they are cheap; the last ones at the length that is captured.
    stages: tuple[Stage, ...] = (Stage(1500, 8, 512), Stage(400, 2, 2048))
    peak_learning_rate: float = 1e-3
    weight_decay: float = 0.1
    capture_length: int = 2048


def read_corpus() -> tuple[np.ndarray, np.ndarray]:
    """Python's own top-level modules as bytes, split into training and validation text by file (9 to 1)."""
    text: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        held_out = hashlib.sha256(path.name.encode()).digest()[0] < 26
        text[held_out].append(path.read_bytes())
    corpus, held_out_text = (np.frombuffer(b"".join(text[held_out]), np.uint8) for held_out in (False, True))
    return corpus, held_out_text


def batches(corpus: np.ndarray, stages: tuple[Stage, ...], seed: int) -> Iterator[np.ndarray]:
    """Random windows of the text, each one byte longer than the model's input."""
    random = np.random.default_rng(seed)
    for stage in stages:
        for _ in range(stage.steps):
            starts = random.integers(0, len(corpus) - stage.length, stage.batch)
            yield np.stack([corpus[start : start + stage.length + 1] for start in starts]).astype(np.int32)


def bits_per_byte(model: ByteLanguageModel, window: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next byte, in bits."""
    logits = model(window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean() / np.log(2)


@nnx.jit
def train_step(model: ByteLanguageModel, optimizer: nnx.Optimizer, window: jax.Array) -> jax.Array:
    """One step of gradient descent; returns the loss before it."""
    loss, gradient = nnx.value_and_grad(bits_per_byte)(model, window)
    optimizer.update(model, gradient)
    return loss


def train(config: Config, console: Console) -> tuple[ByteLanguageModel, dict[str, float]]:
    """Trains the model and reports the bits per byte it reached."""
    corpus, held_out = read_corpus()
    model = ByteLanguageModel(config.model, rngs=nnx.Rngs(config.seed))
    steps = sum(stage.steps for stage in config.stages)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.peak_learning_rate, steps // 20, steps)
    decayed = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), decayed), wrt=nnx.Param)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    start, losses = time.monotonic(), []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss="")
        for window in batches(corpus, config.stages, config.seed):
            losses.append(float(train_step(model, optimizer, jnp.asarray(window))))
            progress.update(task, advance=1, loss=f"{np.mean(losses[-50:]):.3f} bits/byte")
    length = config.capture_length
    windows = [held_out[i : i + length + 1].astype(np.int32) for i in range(0, len(held_out) - length - 1, length)]
    evaluate = nnx.jit(bits_per_byte)
    validation = float(np.mean([evaluate(model, jnp.asarray(window)[None]) for window in windows[:64]]))
    result = {
        "train_bits_per_byte": round(float(np.mean(losses[-50:])), 4),
        "validation_bits_per_byte": round(validation, 4),
        "train_bytes": len(corpus),
        "validation_bytes": len(held_out),
        "training_minutes": round((time.monotonic() - start) / 60, 1),
    }
    return model, result


def mean_entropy(q: np.ndarray, k: np.ndarray) -> float:
    """Mean entropy, in nats, of the causal attention rows of query heads ``q [T, G, D]`` over keys ``k [T, D]``."""
    logits = np.einsum("tgd,sd->gts", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(np.tri(len(k), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return float(-(weights * np.log(np.maximum(weights, 1e-30))).sum(-1).mean())


def choose(captured: dict[str, dict[str, np.ndarray]]) -> list[tuple[str, int, float]]:
    """The two key heads, of different layers, whose attention has the least and the most entropy."""
    entropies = []
    for name, tensors in captured.items():
        num_kv_heads = tensors["k"].shape[-2]
        groups = np.split(tensors["q"][0], num_kv_heads, axis=-2)
        entropies += [
            (name, head, mean_entropy(groups[head], tensors["k"][0, :, head])) for head in range(num_kv_heads)
        ]
    sharpest = min(entropies, key=lambda entry: entry[2])
    return [sharpest, max((e for e in entropies if e[0] != sharpest[0]), key=lambda entry: entry[2])]


def load_user_model(spec: str) -> tuple[nnx.Module, Callable[[Any], Any]]:
    """``module:function``, where the function returns ``(model, run)`` for `capture`."""
    module, _, function = spec.partition(":")
    return getattr(importlib.import_module(module), function)()


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=pathlib.Path), required=True, help="The .npz to write."
)
@click.option(
    "--model", "spec", help="module:function that returns (model, run); captures every layer instead of training."
)
def main(out: pathlib.Path, spec: str | None) -> None:
    """Writes q, k and v of a trained model's attention to an .npz file."""
    console = Console()
    if spec is not None:
        captured = capture(*load_user_model(spec))
        arrays: dict[str, Any] = {
            f"{name}.{x}": value for name, tensors in captured.items() for x, value in tensors.items()
        }
        write_atomically(out, lambda file: np.savez_compressed(file, **arrays))
        console.print(f"wrote {len(captured)} layers to {out}; name one with --q LAYER.q --k LAYER.k --v LAYER.v")
        return

    config = Config()
    model, result = train(config, console)
    text = read_corpus()[1][: config.capture_length].astype(np.int32)
    captured = capture(model, lambda model: model(jnp.asarray(text)[None]))
    chosen = choose(captured)
    group = config.model.num_heads // config.model.num_kv_heads
    parts = [
        (
            captured[name]["q"][0, :, head * group : (head + 1) * group],
            *(captured[name][x][0, :, head : head + 1] for x in "kv"),
        )
        for name, head, _ in chosen
    ]
    q, k, v = (np.stack(x).astype(np.float16) for x in zip(*parts, strict=True))
    write_atomically(out, lambda file: np.savez_compressed(file, q=q, k=k, v=v))
    provenance = {
        "what": "q, k, v after rotary embedding, [layers, T, heads, head_dim], of a causal byte-level language model",
        "text": "the first held-out files of Python's standard library",
        "made_by": "python -m experiments.sample --out approx_attention/sample.npz",
        "layers": [{"layer": name, "kv_head": head, "mean_entropy_nats": round(e, 3)} for name, head, e in chosen],
        "chosen_by": "least and most mean attention entropy among the key heads of different layers",
        "config": dataclasses.asdict(config),
        **result,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
    }
    lines = json.dumps(provenance, indent=2) + "\n"
    write_atomically(out.with_suffix(".txt"), lambda file: file.write(lines.encode()))
    console.print(lines)


if __name__ == "__main__":
    main()
