"""From random features over EVA to softmax attention: more groups of keys, more keys taken exactly."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import AttentionState, FeatureMoments, WeightedKV, attend, exact, fold_scale
from approx_attention.core import PositiveFeatures, in_float32, orthogonal_projection
from approx_attention.core import control_variate_state as estimate
from approx_attention.evaluation import output_error
from experiments.config import ConfigError, Count, NonNegative, Seeded, Several, Whole
from experiments.control_variates import gap
from experiments.results import Frame, Record
from experiments.show import curves, having, pivot, spread


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """One head of smoothed tensors; the exact sets and the numbers of groups that the other keys are split into."""

    exact_sizes: Several[Whole]
    groups: Several[Count]
    num_features: Count = 64
    length: Count = 256
    head_dim: Count = 16
    smoothing: NonNegative = 4.0
    spread: NonNegative = 1.0


@in_float32()  # as many groups as keys give the truth
def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Error of the estimate by the size of the exact set and the number of groups, whose masses are exact."""
    sizes: Any = {"length": config.length, "head_dim": config.head_dim, "seed": config.seed}
    tensors = gap.smoothed(gap.Config({}, smoothing=config.smoothing, spread=config.spread, **sizes))
    q, k, v = (x[0, :, 0] for x in tensors)
    truth = exact(q, k, v)
    scaled_q, scaled_k = fold_scale(q, k)
    features = PositiveFeatures(
        orthogonal_projection(jax.random.key(config.seed), config.num_features, config.head_dim)
    )
    records: list[Record] = []
    for size in config.exact_sizes:
        near = AttentionState.empty(config.length, config.head_dim)
        if size:
            near = attend(scaled_q, WeightedKV.of_tokens(scaled_k[:size], v[:size]))
        rest = config.length - size
        for groups in [*config.groups, rest]:
            if rest % groups:
                raise ConfigError(f"{groups} groups do not divide the {rest} keys other than the {size} exact ones")
            parts = (x[size:].reshape(groups, -1, config.head_dim) for x in (scaled_k, v))
            moments = jax.vmap(lambda k, v: FeatureMoments.of_tokens(features, k, v))(*parts)
            logits = (scaled_q @ scaled_k[size:].T).reshape(config.length, groups, -1)
            state = estimate(scaled_q, near, moments, jax.nn.logsumexp(logits, axis=2))
            error = float(output_error(state.out, truth).relative)
            records.append({"exact_keys": size, "groups": groups, "error": error})
    random_features = attend(scaled_q, FeatureMoments.of_tokens(features, scaled_k, v)).out
    mean = jnp.broadcast_to(v.mean(0), v.shape)
    ends = {"random_features": random_features, "mean_value": mean}
    return [*records, {name: float(output_error(out, truth).relative) for name, out in ends.items()}]


def table(records: Frame) -> Iterable[str]:
    """Errors by the number of exact keys and of groups."""
    features, mean = (spread(list(records[name].dropna())) for name in ("random_features", "mean_value"))
    yield f"Relative error by the number of groups; random features alone {features}, mean of the values {mean}."
    shown = having(records, "groups").sort_values("groups", kind="stable")
    yield pivot(shown, "exact_keys", "groups", "error", cell=spread, head="keys taken exactly", quoted=False)


def figure(records: Frame) -> Figure:
    """Errors by the number of groups."""
    shown = having(records, "groups")
    features = records["random_features"].mean()

    def ends(axes: Any, *_: Any) -> None:
        axes.axhline(features, color="0.5", linestyle=":")
        axes.annotate("random features", (1, features), va="bottom")

    return curves(
        shown.assign(named=[f"{size:g} keys exactly" for size in shown["exact_keys"]]),
        x="groups",
        y="error",
        by="named",
        labels=("groups of keys with a coefficient each", "relative error"),
        ticks=None,
        least=1e-7,  # one key per group is exact but for rounding
        each=ends,
        size=(7.0, 4.0),
    )
