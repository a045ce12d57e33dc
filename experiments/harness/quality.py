"""Task score of a model trained with one method, with the error of its attention beside it."""

import pathlib
from typing import Any

from rich.console import Console

from approx_attention.evaluation import Tensors, held_bytes
from experiments import data
from experiments.data import Dataset
from experiments.fidelity import attention_errors
from experiments.models import AttentionConfig
from experiments.training import TrainingConfig, evaluate, fit


def run(config: TrainingConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Trains, evaluates on the validation and test splits, and measures the attention of the trained model.

    The attention error is that of the method on the trained model's own q, k and v, with `mean_value` beside it: a
    score can be good while the attention approximates nothing.
    """
    model, dataset, seconds = fit(config, directory, console)
    example = data.held_out(dataset, "valid", 1, 1)[0]
    arms = {"method": None, "mean_value": AttentionConfig("mean_value")}
    return {
        **{split: evaluate(config, model, dataset, split) for split in ("valid", "test")},
        "attention_error": attention_errors(model, example, arms),
        "held_bytes": bytes_held(config, dataset, config.attention),
        "training_seconds": round(seconds, 1),
        "data": dict(dataset.provenance),
        "oracles": dict(dataset.oracles),
    }


def bytes_held(config: TrainingConfig, dataset: Dataset, attention: AttentionConfig) -> int | None:
    """Bytes of keys and values, or of what stands for them, per key head and sequence at the length of the task."""
    if dataset.kind == "image":
        return None
    import jax
    import jax.numpy as jnp

    length = data.held_out(dataset, "train", 1, 1)[0]["tokens"].shape[1]
    model = config.model
    query, key = (
        jax.ShapeDtypeStruct((1, length, heads, model.head_dim), jnp.float32)
        for heads in (model.num_heads, model.num_kv_heads)
    )
    return held_bytes(Tensors(query, key, key), attention.method, attention.arguments(), is_causal=dataset.is_causal)  # pyright: ignore[reportArgumentType]
