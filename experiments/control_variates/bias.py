"""Bias and variance of the estimators as their draws grow: RA has no bias, those that normalise themselves have."""

import dataclasses
import inspect
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import METHODS, exact
from approx_attention.core import in_float32, unknown
from approx_attention.evaluation import method_styles
from experiments.config import Count, NonNegative, Seeded, Several, SeveralBy
from experiments.fits import slope
from experiments.models import AttentionConfig
from experiments.results import Frame, Record
from experiments.show import curves, having, pivot, slopes

# Number of parts in which draws are averaged, whose scatter says how much of a bias is noise.
_PARTS = 16
# Draws that are computed at a time.
_MOST_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
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
def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Relative bias and deviation of each method at each size, with the slopes of their logs.

    A bias below ``noise`` is none that was seen.
    """
    random = np.random.default_rng(config.seed)
    q, k, v = (jnp.asarray(random.normal(size=(config.length, config.head_dim)), jnp.float32) for _ in "qkv")
    q, k = config.spread * q, config.spread * k
    truth = np.asarray(exact(q, k, v), np.float64)
    scale = np.linalg.norm(truth)
    records: list[Record] = []
    for name, method in config.methods.items():
        bias, deviation, seen, over_noise = {}, {}, {}, 0.0
        for size in config.sizes:
            outs = draws(method, {**method.arguments(), config.argument[name]: size}, q, k, v, config)
            squared, error = squared_bias(outs.reshape(_PARTS, -1, *truth.shape).mean(1) - truth)
            bias[size] = float(np.sqrt(max(squared, 0)) / scale)
            noise = float(np.sqrt(error) / scale)
            deviation[size] = float(np.sqrt(outs.var(0).sum()) / scale)
            over_noise = max(over_noise, bias[size] / noise)
            if bias[size] > 2 * noise:
                seen[size] = bias[size]
            figures = {"bias": bias[size], "noise": noise, "deviation": deviation[size]}
            records.append({"method": name, "size": size, **figures})
        fitted = {**slope(seen, "bias_slope"), **slope(deviation, "deviation_slope")}
        records.append({"method": name, **fitted, "greatest_bias_over_noise": over_noise})
    return records


def squared_bias(deviations: np.ndarray) -> tuple[float, float]:
    """The squared norm of the mean of ``[parts, T, Dv]`` means of draws, and its standard error where there is no bias.

    It is the mean of the products of two different parts, so that the noise of each does not count.
    """
    number = len(deviations)
    products = np.einsum("aij,bij->ab", deviations, deviations)
    by_part = products[~np.eye(number, dtype=bool)].reshape(number, number - 1).mean(1)
    # Each product is in two of these means: the variance of their mean is twice theirs over their number.
    return by_part.mean(), np.sqrt(2 / number) * by_part.std(ddof=1)


def table(records: Frame) -> Iterable[str]:
    """Bias, noise and deviation by size, with the exponents of bias and deviation."""
    sizes = having(records, "size")
    long = sizes.melt(["method", "size", "seed"], ["bias", "noise", "deviation"], "relative", "value")

    def exponent(key: tuple[str, str], own: Frame) -> str:
        name, what = key
        return "" if what == "noise" else slopes(records, "method", f"{what}_slope")[f"{what} slope"](name, own)

    more = {"exponent": exponent}
    yield pivot(long, ["method", "relative"], "size", "value", head=["", "relative to attention"], more=more)


def figure(records: Frame) -> Figure:
    """Bias, where it was seen, and deviation by size."""
    sizes = having(records, "size")
    seen = sizes[sizes["bias"] > 2 * sizes["noise"]]
    shown = pd.concat(
        [
            seen.assign(panel="bias (dotted: what could be seen)", value=seen["bias"]),
            sizes.assign(panel="deviation of one sample", value=sizes["deviation"]),
        ]
    )
    styles = method_styles(dict.fromkeys(sizes["method"]))

    def noise(axes: Any, title: str, _: Frame) -> None:
        if title.startswith("bias"):
            for name, own in sizes.groupby("method", sort=False):
                mean = own.groupby("size")["noise"].mean()
                axes.plot(mean.index, mean, color=styles[name]["color"], linestyle=":", linewidth=1)

    labels = ("features or samples", "relative to attention")
    return curves(shown, x="size", y="value", by="method", panel="panel", labels=labels, each=noise)


def draws(
    method: AttentionConfig, arguments: dict[str, Any], q: jax.Array, k: jax.Array, v: jax.Array, config: Config
) -> np.ndarray:
    """Answers of independent draws, ``[draws, T, Dv]``, in float64."""
    function = METHODS[method.method].function
    one = jax.jit(jax.vmap(lambda key: function(q, k, v, key, **arguments)))
    keys = jax.random.split(jax.random.key(config.seed), config.draws)
    parts = (keys[start : start + _MOST_AT_ONCE] for start in range(0, config.draws, _MOST_AT_ONCE))
    return np.concatenate([np.asarray(one(part), np.float64) for part in parts])
