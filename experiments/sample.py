"""The q, k, v that ship with the package: of a trained language model's attention on held-out text."""

import json
import pathlib
import platform
from typing import Any

import flax
import jax
import numpy as np
from rich.console import Console

from approx_attention.evaluation import write_atomically
from approx_attention.nnx import capture_attention
from experiments import data
from experiments.config import as_plain
from experiments.training import TrainingConfig, evaluate, fit, predict


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


def write_sample(config: TrainingConfig, directory: pathlib.Path, to: pathlib.Path, console: Console) -> dict[str, Any]:
    """Trains the model, or goes on from its checkpoint in ``directory``, and writes the sample and its provenance.

    Returns:
        The provenance, which is also written next to ``to`` as ``.txt``.
    """
    model, dataset, seconds = fit(config, directory, console)
    text = data.held_out(dataset, "valid", 1, 1)[0]
    captured = capture_attention(model, lambda model: predict(model, text))
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
    write_atomically(to, lambda file: np.savez_compressed(file, q=q, k=k, v=v))  # pyright: ignore[reportArgumentType]
    provenance = {
        "what": "q, k, v after rotary embedding, [layers, T, heads, head_dim], of a causal byte-level language model",
        "text": "a window of the validation files of Python's standard library",
        "made_by": "python -m experiments sample",
        "layers": [{"layer": name, "kv_head": head, "mean_entropy_nats": round(e, 3)} for name, head, e in chosen],
        "chosen_by": "least and most mean attention entropy among the key heads of different layers",
        "validation_bits_per_byte": round(evaluate(config, model, dataset, "valid")["bits"], 4),
        "training_minutes": round(seconds / 60, 1),
        "config": as_plain(config),
        "data": dict(dataset.provenance),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
    }
    lines = json.dumps(provenance, indent=2) + "\n"
    write_atomically(to.with_suffix(".txt"), lambda file: file.write(lines.encode()))
    return provenance
