"""How close a trained model's attention is to exact attention on the tensors the model itself makes."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from approx_attention.core import in_float32
from approx_attention.evaluation import output_error
from approx_attention.nnx import capture_attention
from experiments.models import AttentionConfig, attention_layers
from experiments.training import predict


def attention_errors(
    model: nnx.Module, batch: dict[str, Any], methods: Mapping[str, AttentionConfig | None]
) -> dict[str, Any]:
    """Relative error of each method on the queries, keys and values of every attention layer of a model.

    Args:
        model: a trained reference model.
        batch: the examples that it reads; one is enough, the sequences are long.
        methods: the methods by the name to report them under; None for each layer's own, as it was trained.

    Returns:
        For each name the relative Frobenius error ``mean`` over layers and that of each layer, in order.
    """
    examples = {name: jnp.asarray(array) for name, array in batch.items()}
    captured = capture_attention(model, lambda model: predict(model, examples))
    layers = attention_layers(model)
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for path, tensors in captured.items():
        arguments = [jnp.asarray(tensors[x], jnp.float32) for x in "qkv"]

        def answers(
            config: AttentionConfig | None,
            layer: Any = layers[path],
            tensors: Any = tensors,
            arguments: Any = arguments,
        ) -> Any:
            own = {
                name: jnp.asarray(x)
                for name, x in tensors.items()
                if name not in ("q", "k", "v", "is_causal", "mask", "scale")
            }
            if config is not None:
                layer, own = nnx.clone(layer), {}
                layer.use(config)
            return layer.attention_fn(*arguments, **own)

        with in_float32():
            exact = answers(AttentionConfig("exact"))
        for name, config in methods.items():
            errors[name].append(float(output_error(answers(config), exact).relative))
    return {name: {"mean": float(np.mean(of)), "layers": of} for name, of in errors.items()}
