"""Few tokens, few bits: what a budget of bytes is best spent on."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import WeightedKV, attend, fold_scale, quantize, summarize_coreset
from approx_attention.core import quantized_bytes
from approx_attention.coresets import algorithm_of
from approx_attention.decoding import token_budget
from approx_attention.evaluation import load_sample, method_styles, output_error, sup_error
from experiments.config import Count, NonNegative, Seeded, Several, Share
from experiments.coresets import instances
from experiments.coresets.least_size import padded
from experiments.results import Frame, Record
from experiments.show import curves, having, in_kib, parts, pivot, significant, whole

# Keys and values as they are, in half as many bits, and rounded by `quantize`.
FORMATS = ("float32", "bfloat16", "8 bits", "4 bits")


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Tokens, the algorithms that choose among them, and budgets of bytes.

    Attributes:
        tokens: an instance of `experiments.coresets.instances`, whose errors are the greatest over all queries of norm
            up to ``radius``; or a head of the sample, whose errors are relative to the outputs of its last 256 queries.
        shares: budgets, as shares of the bytes of all tokens in float32.
    """

    algorithms: Several[str]
    shares: Several[Share]
    tokens: Literal["clustered", "sphere", "low_rank", "outliers", "sharp_head", "diffuse_head"] = "clustered"
    radius: NonNegative = 4.0
    num_keys: Count = 4096
    head_dim: Count = 32
    value_dim: Count = 32

    def __post_init__(self) -> None:
        for name in self.algorithms:
            algorithm_of(name)


def _head(number: int, num_keys: int) -> tuple[Array, Array, Array]:
    """The last queries of a head of the sample, and the keys and values before them."""
    query, key, value = (x[number].astype(jnp.float32) for x in load_sample())
    q, k = fold_scale(query[-256:, 0], key[:-256, 0])
    return q, k[-num_keys:], value[:-256, 0][-num_keys:]


def num_tokens(num_bytes: int, head_dim: int, value_dim: int, form: str) -> int:
    """The number of tokens that fit."""
    if form in FORMATS[:2]:
        return num_bytes // bytes_of(1, head_dim, value_dim, form)
    return token_budget(num_bytes, head_dim, value_dim, bits=int(form.split()[0]))


def bytes_of(count: int, head_dim: int, value_dim: int, form: str) -> int:
    """The bytes of that many tokens, with a mass in float32."""
    if form in FORMATS[:2]:
        return count * ((head_dim + value_dim) * jnp.dtype(form).itemsize + 4)
    return quantized_bytes(count, head_dim, value_dim, bits=int(form.split()[0]))


def stored(tokens: WeightedKV, form: str) -> WeightedKV:
    """Tokens as they come back from that form."""
    if form == "float32":
        return tokens
    if form == "bfloat16":
        k, value_sum = (x.astype(jnp.bfloat16).astype(x.dtype) for x in (tokens.k, tokens.value_sum))
        return dataclasses.replace(tokens, k=k, value_sum=value_sum)
    return quantize(tokens, bits=int(form.split()[0])).dequantized()


@functools.partial(jax.jit, static_argnames=("size", "algorithm"))
def _chosen(k: Array, v: Array, key: Array, radius: float | None, *, size: int, algorithm: Any) -> WeightedKV:
    return summarize_coreset(k, v, key, coreset_size=size, algorithm=algorithm, query_radius=radius)


@functools.partial(jax.jit, static_argnames=("form", "room"))
def _stored(tokens: WeightedKV, form: str, room: int) -> WeightedKV:
    return padded(stored(tokens, form), room)


@jax.jit
def _search(k: Array, v: Array, summary: WeightedKV, radius: float) -> Array:
    # A sixth of the usual search, for six times as many summaries.
    return sup_error(k, v, summary, radius, num_random=512, num_keys=256, num_starts=8, num_steps=30).error


@jax.jit
def _on_queries(q: Array, k: Array, v: Array, summary: WeightedKV) -> Array:
    return output_error(attend(q, summary).out, attend(q, WeightedKV.of_tokens(k, v)).out).relative


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The error of each algorithm in each format, and the number of tokens, by budget."""
    heads = {"sharp_head": 0, "diffuse_head": 1}
    if config.tokens in heads:
        q, k, v = _head(heads[config.tokens], config.num_keys)
        radius, error = None, functools.partial(_on_queries, q, k, v)
    else:
        sizes = config.num_keys, config.head_dim, config.value_dim
        k, v = instances.draw(config.tokens, *sizes, config.radius, config.seed)
        radius, error = config.radius, functools.partial(_search, k, v, radius=config.radius)
    count, dims = k.shape[0], (k.shape[1], v.shape[1])
    room = count + 128
    every_token = WeightedKV.of_tokens(k, v)
    every_byte = bytes_of(count, *dims, "float32")
    records: list[Record] = [{"bytes": every_byte}]
    best: dict[str, dict[float, float]] = {}
    for form in FORMATS:
        alone = float(error(summary=_stored(every_token, form, room)))
        share_of_all = bytes_of(count, *dims, form) / every_byte
        records.append({"form": form, "all_tokens_error": alone, "all_tokens_share": share_of_all})
        for name in config.algorithms:
            for share in config.shares:
                size = min(count, num_tokens(math.floor(share * every_byte), *dims, form))
                found = alone
                if size < count:
                    key = jax.random.key(config.seed)
                    small = _chosen(k, v, key, radius, size=size, algorithm=algorithm_of(name))
                    found = float(error(summary=_stored(small, form, room)))
                records.append({"algorithm": name, "form": form, "share": share, "tokens": size, "error": found})
                by = best.setdefault(form, {})
                by[share] = min(found, by.get(share, math.inf))
            console.print(f"{name}, {form}: {best[form]}")
    for form in FORMATS[1:]:
        # What few bits are worth at the same bytes: below 1 where they win.
        ratios = {share: best[form][share] / max(best["float32"][share], 1e-12) for share in config.shares}
        records += [{"form": form, "share": share, "ratio": ratio} for share, ratio in ratios.items()]
        mean = float(np.exp(np.mean(np.log([max(x, 1e-12) for x in ratios.values()]))))
        records.append({"form": form, "mean_ratio": mean})
    return records


def table(records: Frame) -> Iterable[str]:
    """Errors by budget, algorithm and format, by configuration."""
    for name, own in parts(records):
        alone = having(own, "all_tokens_error").groupby("form")

        def all_tokens(key: Any, _: Frame, alone: Any = alone) -> str:
            return significant(list(alone.get_group(key[1])["all_tokens_error"]))

        def share(key: Any, _: Frame, alone: Any = alone) -> str:
            return f"{alone.get_group(key[1])['all_tokens_share'].iloc[0]:.3f}"

        errors, of = having(own, "algorithm", "error"), having(own, "bytes")["bytes"].iloc[0]
        yield f"`{name}`: error by the share of {in_kib(of)}, the bytes of all tokens in float32"
        more = {"all tokens": all_tokens, "their share": share}
        yield pivot(errors, ["algorithm", "form"], "share", "error", head=["", "in"], more=more)
        yield pivot(
            errors.drop_duplicates(["form", "share"]), "form", "share", "tokens", cell=whole, head="number of tokens"
        )


def figure(records: Frame) -> Figure:
    """The best error of any algorithm by budget, a line for each format; rings for all tokens."""
    errors = having(records, "algorithm", "error")
    best = errors.groupby(["configuration", "seed", "form", "share"], sort=False)["error"].min().reset_index()
    alone = having(records, "all_tokens_error")
    styles = method_styles(list(FORMATS))

    def rings(axes: Any, name: Any, _: Frame) -> None:
        for form, own in parts(alone[alone["configuration"] == name], "form"):
            if form != FORMATS[0]:
                error = max(own["all_tokens_error"].mean(), 1e-5)
                look = {"color": styles[form]["color"], "markersize": 11, "fillstyle": "none"}
                axes.plot(own["all_tokens_share"].iloc[0], error, "o", **look)

    return curves(
        best,
        x="share",
        y="error",
        by="form",
        labels=("share of the bytes of all tokens in float32", "error (rings: all tokens)"),
        ticks=lambda share: f"1/{1 / share:.0f}",
        least=1e-5,
        columns=4,
        each=rings,
    )
