"""From random features over EVA to softmax attention: more groups of keys, more keys taken exactly."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from approx_attention import AttentionState, FeatureMoments, WeightedKV, attend, exact, fold_scale
from approx_attention.core import PositiveFeatures, in_float32, orthogonal_projection
from approx_attention.core import control_variate_state as estimate
from approx_attention.evaluation import output_error
from experiments.config import ConfigError, Count, NonNegative, Seeded, Several, Whole
from experiments.control_variates.gap import GapConfig, smoothed


@dataclasses.dataclass(frozen=True)
class ContinuumConfig(Seeded):
    """One head of smoothed tensors; the exact sets and the numbers of groups that the other keys are split into."""

    exact_sizes: Several[Whole]
    groups: Several[Count]
    num_features: Count = 64
    length: Count = 256
    head_dim: Count = 16
    smoothing: NonNegative = 4.0
    spread: NonNegative = 1.0


@in_float32()  # as many groups as keys give the truth
def run(config: ContinuumConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Error of the estimate by the size of the exact set and the number of groups, whose masses are exact."""
    sizes: Any = {"length": config.length, "head_dim": config.head_dim, "seed": config.seed}
    tensors = smoothed(GapConfig({}, smoothing=config.smoothing, spread=config.spread, **sizes))
    q, k, v = (x[0, :, 0] for x in tensors)
    truth = exact(q, k, v)
    scaled_q, scaled_k = fold_scale(q, k)
    features = PositiveFeatures(
        orthogonal_projection(jax.random.key(config.seed), config.num_features, config.head_dim)
    )
    errors: dict[str, dict[str, float]] = {}
    for size in config.exact_sizes:
        near = AttentionState.empty(config.length, config.head_dim)
        if size:
            near = attend(scaled_q, WeightedKV.of_tokens(scaled_k[:size], v[:size]))
        rest = config.length - size
        errors[str(size)] = {}
        for groups in [*config.groups, rest]:
            if rest % groups:
                raise ConfigError(f"{groups} groups do not divide the {rest} keys beside the {size} exact ones")
            parts = (x[size:].reshape(groups, -1, config.head_dim) for x in (scaled_k, v))
            moments = jax.vmap(lambda k, v: FeatureMoments.of_tokens(features, k, v))(*parts)
            logits = (scaled_q @ scaled_k[size:].T).reshape(config.length, groups, -1)
            state = estimate(scaled_q, near, moments, jax.nn.logsumexp(logits, axis=2))
            errors[str(size)][str(groups)] = float(output_error(state.out, truth).relative)
    random_features = attend(scaled_q, FeatureMoments.of_tokens(features, scaled_k, v)).out
    return {
        "errors": errors,
        "random_features": float(output_error(random_features, truth).relative),
        "mean_value": float(output_error(jnp.broadcast_to(v.mean(0), v.shape), truth).relative),
    }
