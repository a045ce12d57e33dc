"""What `approx_attention.evaluation.plan` chooses for a model trained with exact attention, in the bytes of the zoo."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from approx_attention.evaluation import Tensors, plan
from approx_attention.nnx import capture_attention
from approx_attention.registry import get_method
from experiments.models import AttentionConfig
from experiments.training import predict

# Below what float32 can do: the plan then names what comes nearest within the bytes.
TOLERANCE = 1e-9


def choose(
    model: nnx.Module, batch: Mapping[str, Any], methods: Mapping[str, AttentionConfig], max_bytes: int, is_causal: bool
) -> tuple[AttentionConfig, dict[str, Any]]:
    """The method and size of least error within ``max_bytes`` a head, chosen on half of the heads of all layers.

    Args:
        model: trained with exact attention.
        batch: the examples that it reads; they are cut to the shortest, because a plan knows no padding.
        methods: what may be chosen, with its hyper-parameters; sizes are the plan's own.
        max_bytes: per key head and sequence.
        is_causal: whether attention is causal.

    Returns:
        How to train with the choice, and what was predicted and measured of it.
    """
    examples = {name: jnp.asarray(array) for name, array in batch.items()}
    layers = capture_attention(model, lambda model: predict(model, examples)).values()
    length = int(np.min(batch["lengths"])) if "lengths" in batch else None
    tensors = Tensors(*(jnp.concatenate([jnp.asarray(of[x][:, :length], jnp.float32) for of in layers]) for x in "qkv"))
    options = {
        attention.method: {
            name: value for name, value in attention.arguments().items() if name != get_method(attention.method).size
        }
        for attention in methods.values()
        if attention.method != "exact" and get_method(attention.method).capabilities.subquadratic
    }
    made = plan(
        tensors,
        tolerance=TOLERANCE,
        max_bytes=max_bytes,
        is_causal=is_causal,
        methods=options,
        options={name: own for name, own in options.items() if own},
        rounds=1,
    )
    within = [candidate for candidate in made.candidates if candidate.in_budget and not candidate.is_exact]
    if not within:
        raise ValueError(f"no method fits {max_bytes} bytes: {made.verdict}")
    chosen = min(within, key=lambda candidate: candidate.error_bound)
    size = {} if chosen.size is None else {str(get_method(chosen.method).size): chosen.size}
    facts = {
        "method": chosen.method,
        "settings": options[chosen.method] | size,
        "held_bytes": chosen.held_bytes,
        "error_bound": chosen.error_bound,
        "held_out_error": chosen.held_out_error,
    }
    return AttentionConfig(chosen.method, facts["settings"]), facts
