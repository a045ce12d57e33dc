"""Bias and variance of the estimators as their draws grow: RA has no bias, those that normalise themselves have."""

import dataclasses
import inspect
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from approx_attention import METHODS, exact
from approx_attention.core import in_float32, unknown
from experiments.config import Count, NonNegative, Seeded, Several, SeveralBy
from experiments.harness.long_context import slope
from experiments.models import AttentionConfig

# Number of parts in which draws are averaged, whose scatter says how much of a bias is noise.
_PARTS = 16
# Draws that are computed at a time.
_MOST_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class BiasConfig(Seeded):
    """One head of Gaussian tensors; each method at growing values of one of its arguments.

    Attributes:
        methods: random ones, by the name they are reported under.
        argument: which argument of each grows, by the same name.
        sizes: its values.
        draws: a multiple of 16.
    """

    methods: SeveralBy[AttentionConfig]
    argument: dict[str, str]
    sizes: Several[Count]
    length: Count = 32
    head_dim: Count = 8
    spread: NonNegative = 1.0
    draws: Count = 16384

    def __post_init__(self) -> None:
        if self.draws % _PARTS:
            raise ValueError(f"draws must be a multiple of {_PARTS}, got {self.draws}")
        for name in self.argument:
            if name not in self.methods:
                raise ValueError(f"argument: {unknown('method', name, self.methods)}")
        for name, method in self.methods.items():
            if name not in self.argument:
                raise ValueError(f"the key 'argument.{name}' is missing; it names the argument of {name!r} that grows")
            capabilities = METHODS[method.method].capabilities
            if not (capabilities.needs_key or capabilities.takes_key):
                raise ValueError(f"methods.{name}: method {method.method!r} is not random")
            _, _, _, _, *known = inspect.signature(METHODS[method.method].function).parameters
            if self.argument[name] not in known:
                raise ValueError(f"argument.{name}: {unknown('argument', self.argument[name], known)}")


@in_float32()  # a bias may be smaller than the rounding of an accelerator
def run(config: BiasConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Relative bias and deviation of each method at each size, with the slopes of their logs.

    The square of the bias is the product of the deviations of two halves of the draws, so that their noise does not
    count; ``noise`` is its standard error, and a bias below it is none that was seen.
    """
    random = np.random.default_rng(config.seed)
    q, k, v = (jnp.asarray(random.normal(size=(config.length, config.head_dim)), jnp.float32) for _ in "qkv")
    q, k = config.spread * q, config.spread * k
    truth = np.asarray(exact(q, k, v), np.float64)
    scale = np.linalg.norm(truth)
    result = {}
    for name, method in config.methods.items():
        by_size: dict[str, dict[int, float]] = {"bias": {}, "deviation": {}, "noise": {}}
        for size in config.sizes:
            outs = draws(method, {**method.arguments(), config.argument[name]: size}, q, k, v, config)
            parts = outs.reshape(_PARTS, -1, *truth.shape).mean(1) - truth
            pairs = np.einsum("aij,bij->ab", parts, parts)
            apart = pairs[~np.eye(_PARTS, dtype=bool)].reshape(_PARTS, _PARTS - 1).mean(1) / scale**2
            by_size["bias"][size] = float(np.sqrt(max(apart.mean(), 0)))
            by_size["noise"][size] = float(np.sqrt(apart.std() / np.sqrt(_PARTS)))
            by_size["deviation"][size] = float(np.sqrt(outs.var(0).sum()) / scale)
        seen = {n: b for n, b in by_size["bias"].items() if b > 2 * by_size["noise"][n]}
        result[name] = {
            **{what: {str(n): x for n, x in values.items()} for what, values in by_size.items()},
            "bias_slope": slope(seen),
            "deviation_slope": slope(by_size["deviation"]),
            "greatest_bias_over_noise": max(by_size["bias"][n] / by_size["noise"][n] for n in config.sizes),
        }
    return {"methods": result}


def draws(
    method: AttentionConfig, arguments: dict[str, Any], q: jax.Array, k: jax.Array, v: jax.Array, config: BiasConfig
) -> np.ndarray:
    """Answers of independent draws, ``[draws, T, Dv]``, in float64."""
    function = METHODS[method.method].function
    one = jax.jit(jax.vmap(lambda key: function(q, k, v, key, **arguments)))
    keys = jax.random.split(jax.random.key(config.seed), config.draws)
    parts = (keys[start : start + _MOST_AT_ONCE] for start in range(0, config.draws, _MOST_AT_ONCE))
    return np.concatenate([np.asarray(one(part), np.float64) for part in parts])
