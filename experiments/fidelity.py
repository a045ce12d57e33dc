"""How close a trained model's attention is to exact attention on the tensors the model itself makes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from approx_attention import METHODS, attention, diagnostics
from experiments.capture import capture
from experiments.models import AttentionConfig, attention_layers
from experiments.training import predict


def attention_errors(model: nnx.Module, batch: dict[str, Any], configs: dict[str, AttentionConfig]) -> dict[str, Any]:
    """Relative error of each method on the queries, keys and values of every attention layer of a model.

    Args:
        model: a trained reference model.
        batch: the examples that it reads; one is enough, the sequences are long.
        configs: the methods by the name to report them under.

    Returns:
        For each name the relative Frobenius error ``mean`` over layers and that of each layer, in order.
    """
    captured = capture(model, lambda model: predict(model, batch))
    layers = attention_layers(model)
    lengths = jnp.asarray(batch["lengths"]) if "lengths" in batch else None
    result: dict[str, Any] = {}
    for name, config in configs.items():
        errors = []
        for path, tensors in captured.items():
            arguments = [jnp.asarray(tensors[x], jnp.float32) for x in "qkv"]
            options = {"is_causal": layers[path].is_causal, "key_value_seq_lengths": lengths}
            rng = jax.random.key(layers[path].draw) if METHODS[config.method].capabilities.needs_key else None
            exact = attention(*arguments, method="exact", **options)
            out = attention(*arguments, method=config.method, rng=rng, **options, **config.settings)
            if lengths is not None:  # what stands beyond a sequence's end is no answer
                real = (jnp.arange(out.shape[1])[None, :] < lengths[:, None])[..., None, None]
                out, exact = jnp.where(real, out, 0), jnp.where(real, exact, 0)
            errors.append(float(diagnostics.output_error(out, exact).relative))
        result[name] = {"mean": float(np.mean(errors)), "layers": errors}
    return result
