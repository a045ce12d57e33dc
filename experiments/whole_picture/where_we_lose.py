"""Every method at equal memory on data of several kinds: on which is it no better than the trivial baselines?"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.core import in_float32, unknown
from approx_attention.evaluation import (
    Problem,
    Tensors,
    default_methods,
    held_bytes,
    load_sample,
    method_arm,
    output_error,
)
from approx_attention.registry import METHODS
from experiments.config import Count, Seeded, Several
from experiments.coresets import instances
from experiments.results import Frame, Record
from experiments.show import in_kib, markdown

# What a method has to beat to be worth its trouble, and how the texts call it.
TO_BEAT = {"mean_value": "mean(V)", "local": "local"}
FAMILIES = {
    "sample": "the shipped tensors",
    "gaussian": "independent normal entries, in q and k of the deviation that stands behind the name",
    "clustered": "64 tight clusters of keys, values alike within them, every query near a cluster",
    "outliers": "most keys in one cap, 1 % opposite to it with other values, and half of the queries near these",
    "needle": "one key takes nine tenths of every query's weight, the others are noise",
    "local": "weights fall with the distance of tokens, like a Gaussian of deviation 8",
    "sink": "the first token takes nine tenths of every query's weight, and its value is 0",
}
# The norm of the queries where that of keys is at most 1.
RADII = {"clustered": 8.0, "outliers": 8.0}


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Data, and what a method may hold.

    Attributes:
        families: names in `FAMILIES`; ``gaussian-S`` says the deviation S of the entries of q and k.
        tokens: the cache of a method takes no more bytes than this number of keys and values. One that keeps all keys
            gets the size at which its products cost no more than attention to this number. Both have parts of fixed
            size, so a method may take more at its smallest.
    """

    families: Several[str]
    tokens: Count
    length: Count = 1024
    num_heads: Count = 4
    head_dim: Count = 32
    is_causal: bool = False

    def __post_init__(self) -> None:
        for family in self.families:
            if family.partition("-")[0] not in FAMILIES:
                raise ValueError(f"{unknown('family', family, FAMILIES)} gaussian-0.5 has entries of deviation 0.5.")


def draw(config: Config, family: str) -> Tensors:
    """Tensors ``[1, T, N, D]`` of a family, which differ from head to head."""
    if family == "sample":
        return load_sample()
    heads = [_head(config, family, head) for head in range(config.num_heads)]
    return Tensors(*(jnp.asarray(np.stack(x, axis=1)[None], jnp.float32) for x in zip(*heads, strict=True)))


def _head(config: Config, family: str, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, dim = config.length, config.head_dim
    random = np.random.default_rng((config.seed, head))
    q, k, v = (random.normal(size=(n, dim)) for _ in range(3))
    kind, _, spread = family.partition("-")
    if kind == "gaussian":
        return float(spread) * q, float(spread) * k, v
    if kind in RADII:
        radius = RADII[kind]
        k, v = map(np.asarray, instances.draw(kind, n, dim, dim, radius, config.seed * config.num_heads + head))
        towards = k[random.integers(n, size=n)]
        if kind == "outliers":
            # Those opposite to the cap are few, so they are asked for on purpose.
            rare = np.argsort(k @ k.mean(0))[: n // 100]
            towards = np.where((np.arange(n) % 2 == 0)[:, None], towards, k[random.choice(rare, n)])
        q = towards + 0.1 * q / np.sqrt(dim)
        # The scale of attention is undone: logits are up to the radius.
        return radius * np.sqrt(dim) * q / np.linalg.norm(q, axis=1, keepdims=True), k, v
    if kind == "local":
        turns = 2 * np.pi * np.arange(n)[:, None] / n
        k = np.concatenate([np.cos(turns), np.sin(turns), 0.1 * k[:, 2:]], axis=1)
        # Near 0 the cosine falls as a square: a Gaussian of weights, of 8 tokens to either side and some more.
        sharpness = (n / (2 * np.pi * 8)) ** 2
        return np.concatenate([sharpness * np.sqrt(dim) * k[:, :2], 0.1 * q[:, 2:]], axis=1), k, v
    # A key on a separate axis, with nine tenths of the weight of n others.
    chosen = random.integers(n) if kind == "needle" else 0
    q, k = 0.5 * q, 0.5 * k
    q[:, 0], k[:, 0] = np.sqrt(dim), 0.0
    k[chosen] = 0.0
    k[chosen, 0] = np.log(9 * n)
    if kind == "sink":
        v[chosen] = 0.0
    return q, k, v


def equal_size(tensors: Tensors, name: str, tokens: int, *, is_causal: bool) -> tuple[int | None, bool]:
    """The greatest even size at which a method holds, or costs, no more than a number of tokens, and whether 2 does."""
    method = METHODS[name]
    shapes = Tensors(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tensors))  # pyright: ignore[reportArgumentType]
    length, head_dim, value_dim = shapes.key.shape[1], shapes.key.shape[-1], shapes.value.shape[-1]
    allowed = tokens * (head_dim + value_dim) * 4

    def fits(size: int) -> bool:
        held = held_bytes(shapes, name, {method.size: size} if method.size else {}, is_causal=is_causal)
        if held is not None:
            return held <= allowed
        products = method.cost(length, length, head_dim, value_dim, size)
        return products <= METHODS["exact"].cost(length, tokens, head_dim, value_dim, 0)

    if method.size is None:
        return None, fits(0)
    low, high = 1, length // 4
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(2 * middle) else (low, middle - 1)
    return 2 * low, fits(2 * low)


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Relative error, size and bytes of every method in every family."""
    records: list[Record] = []

    @functools.cache
    def program(name: str, size: int | None) -> Any:
        arm = method_arm(Problem(first, config.is_causal), name, size)
        return jax.jit(lambda *arguments: arm.function(*arguments)[0]), arm.held_bytes

    drawn = {family: draw(config, family) for family in config.families}
    first = next(iter(drawn.values()))
    sizes = {
        name: equal_size(first, name, config.tokens, is_causal=config.is_causal)
        for name in default_methods(config.is_causal)
    }
    rng = jax.random.key(config.seed)
    for family, tensors in drawn.items():
        with in_float32():
            exact = program("exact", None)[0](*tensors, rng)
        errors = {}
        for name, (size, fits) in sizes.items():
            function, held = program(name, size)
            errors[name] = float(output_error(function(*tensors, rng), exact).relative)
            sizes_of: Record = {"size": size, "held_bytes": held, "fits": fits}
            records.append({"family": family, "method": name, "error": errors[name], **sizes_of})
        console.print(f"{family}: " + "  ".join(f"{name} {error:.2g}" for name, error in errors.items()))
    return records


def mean_errors(records: Frame) -> Frame:
    """Error by method, a row for each, and family, mean over seeds and configurations."""
    found = records.groupby(["method", "family"], sort=False)["error"].mean().unstack()
    return found.loc[list(dict.fromkeys(records["method"])), list(dict.fromkeys(records["family"]))]


def losses(errors: Frame) -> dict[str, dict[str, list[str]]]:
    """For every method and each of `TO_BEAT` the families on which its error is no smaller."""
    return {
        str(name): {
            baseline: [family for family in errors if errors.loc[name, family] >= errors.loc[baseline, family]]
            for baseline in TO_BEAT
        }
        for name in errors.index
        if name not in TO_BEAT
    }


def loss_rows(records: Frame) -> list[list[str]]:
    """A row for each method with the families on which it does not beat each of `TO_BEAT`.

    * stands after those that take more than they may in some family.
    """
    errors = mean_errors(records)
    over = set(records[~records["fits"].astype(bool)]["method"])

    def listed(families: Sequence[str]) -> str:
        return "all" if len(families) == errors.shape[1] else ", ".join(families) or "none"

    return [
        [f"`{name}`{' *' if name in over else ''}", *(listed(lost[b]) for b in TO_BEAT)]
        for name, lost in losses(errors).items()
    ]


def table(records: Frame) -> Iterable[str]:
    """Errors with the baselines that are not beaten, and the families on which each method loses."""
    errors = mean_errors(records)
    over = set(records[~records["fits"].astype(bool)]["method"])
    held = {(row["configuration"], row["method"]): (row["size"], row["held_bytes"]) for _, row in records.iterrows()}
    names = list(dict.fromkeys(records["configuration"]))
    rows = []
    for name, by_family in errors.iterrows():
        row = [f"`{name}`{' *' if name in over else ''}"]
        for family, error in by_family.items():
            lost = [label for to_beat, label in TO_BEAT.items() if error >= errors.loc[to_beat, family]]
            unbeaten = f" ({', '.join(lost)})" if lost and name not in TO_BEAT else ""
            row.append("" if math.isnan(error) else f"{error:.2g}{unbeaten}")
        for of in names:
            size, num_bytes = held.get((of, name), (math.nan, math.nan))
            shown = "" if size is None or math.isnan(size) else f"{size:g}"
            row.append(", ".join(filter(None, (shown, in_kib(num_bytes)))))
        rows.append(row)
    yield (
        "Relative error at equal cache bytes, or at equal matrix products for a method without a cache; in brackets "
        "the baselines that it does not beat there; * takes more somewhere at its smallest size"
    )
    yield markdown(["", *map(str, errors), *(f"size and cache, `{name}`" for name in names)], rows)
    yield markdown(["", *(f"no better than {label} on" for label in TO_BEAT.values())], loss_rows(records))


def figure(records: Frame) -> Figure:
    """The factor by which each method beats, or loses to, the better of the baselines."""
    errors = mean_errors(records)
    factors = errors.drop(index=list(TO_BEAT)) / errors.loc[list(TO_BEAT)].min()
    drawn = Figure(figsize=(1.1 * factors.shape[1] + 2.5, 0.3 * factors.shape[0] + 1.6))
    axes = drawn.subplots()
    image = axes.imshow(np.log10(factors), cmap="RdBu_r", vmin=-1.5, vmax=1.5, aspect="auto")
    for (row, column), factor in np.ndenumerate(factors.to_numpy()):
        if np.isfinite(factor):
            dark = abs(np.log10(max(factor, 1e-9))) > 1
            axes.text(column, row, f"{factor:.2g}", ha="center", va="center", color="w" if dark else "k", fontsize=8)
    axes.set_xticks(range(factors.shape[1]), list(factors), rotation=30, ha="right")
    axes.set_yticks(range(factors.shape[0]), list(factors.index))
    axes.set_title("error over that of the better of mean(V) and local", fontsize=10)
    bar = drawn.colorbar(image, ax=axes, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["a tenth", "the same", "ten times"])
    return drawn
