"""Certified decoding of the shipped sample: what is promised, what is true, and how often all tokens are read."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import HeadsDecoder, attention
from approx_attention.core import in_float32
from approx_attention.evaluation import load_sample
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import curves, having, pivot


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """What is decoded after a prompt of exact attention.

    Attributes:
        prompt: tokens of the prompt.
        length: tokens in all.
        sizes: numbers of clusters, in addition to the tokens that are kept exactly.
        tolerances: largest errors that are accepted, in units of the largest value so far.
        norms: factors on the queries of the sample: 1 for those of the trained model.
        block_size: tokens per block; one to two blocks are exact.
    """

    sizes: Several[Count]
    tolerances: Several[NonNegative]
    norms: Several[Positive]
    prompt: Count = 1024
    length: Count = 2048
    block_size: Count = 64


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Promised and measured error, share of exact steps and of bytes, by layer, norm, size and tolerance."""
    sample = load_sample()
    q, k, v = (jnp.asarray(x, jnp.float32)[:, : config.length] for x in (sample.query, sample.key, sample.value))
    largest = np.maximum.accumulate(np.linalg.norm(v, axis=-1), axis=1)[:, config.prompt :]
    decoders = {size: jax.jit(functools.partial(_decoded, config, size)) for size in config.sizes}
    records: list[Record] = []
    worst = -math.inf
    for norm in config.norms:
        with in_float32():
            truth = attention(norm * q, k, v, method="exact", is_causal=True)[:, config.prompt :]
        for size, decode in decoders.items():
            for tolerance in config.tolerances:
                out, certificate = decode(jnp.float32(tolerance), jax.random.key(config.seed), (norm * q, k, v))
                errors = np.linalg.norm(np.asarray(out - truth), axis=-1).max(axis=2) / largest[..., 0]
                for layer, error in enumerate(errors):
                    share = float(certificate.exact_steps[layer, 0] / certificate.steps[layer, 0])
                    measured = float(error.max())
                    records.append(
                        {
                            "layer": layer,
                            "norm": norm,
                            "size": size,
                            "tolerance": tolerance,
                            "promised": float(certificate.promised[layer, 0]),
                            "measured": measured,
                            "mean_error": float(error.mean()),
                            "exact_steps": share,
                            "bytes": _bytes(config, size, q.shape[-1], v.shape[-1], share),
                        }
                    )
                    worst = max(worst, measured - max(tolerance, 1e-5))
            console.print(f"norm {norm:g}, {size} clusters")
    # Above 0 if a promise was not kept.
    return [*records, {"over_tolerance": worst}]


def table(records: Frame) -> Iterable[str]:
    """Exact steps and bytes read by tolerance; at the last one, which no bound exceeds, bounds and errors."""
    steps = having(records, "tolerance")
    last = steps["tolerance"].max()

    def bounds(_: Any, own: Frame) -> str:
        end = own[own["tolerance"] == last].iloc[0]
        return f"{end['promised']:.2g}, {end['measured']:.2g}"

    both = [
        f"{100 * share:.3g} %, {read:.2g} x" for share, read in zip(steps["exact_steps"], steps["bytes"], strict=True)
    ]
    yield (
        "Steps that read all tokens, and bytes read against exact decoding, by tolerance; at the largest tolerance, "
        "which no bound exceeds, the largest bound and the largest error"
    )
    yield pivot(
        steps.assign(both=both)[steps["tolerance"] < last],
        ["layer", "norm", "size"],
        "tolerance",
        "both",
        cell=lambda cells: str(cells[0]),
        head=["layer", "norm", "clusters"],
        more={"promised, measured": lambda key, own: bounds(key, _at(steps, key))},
        quoted=False,
    )


def _at(steps: Frame, key: Any) -> Frame:
    layer, norm, size = key
    return steps[(steps["layer"] == layer) & (steps["norm"] == norm) & (steps["size"] == size)]


def figure(records: Frame) -> Figure:
    """The share of exact steps by tolerance, a panel for each layer."""
    steps = having(records, "tolerance")
    named = [
        f"queries times {norm:g}, {size:g} clusters" for norm, size in zip(steps["norm"], steps["size"], strict=True)
    ]
    return curves(
        steps.assign(named=named, percent=100 * steps["exact_steps"]),
        x="tolerance",
        y="percent",
        by="named",
        panel="layer",
        labels=("tolerance, in units of the largest value", "steps that read all tokens, %"),
        scales=("log", "linear"),
        titles=lambda layer: f"layer {layer:g}",
    )


def _decoded(config: Config, size: int, tolerance: Array, key: Array, tokens: Any) -> tuple[Array, Any]:
    """Outputs ``[B, T, N, Dv]`` after the prompt, and the certificate."""
    q, k, v = tokens
    decoder = HeadsDecoder(
        "coreset",
        num_kv_heads=k.shape[2],
        head_dim=k.shape[3],
        value_dim=v.shape[3],
        max_length=config.length,
        certify=tolerance,
        coreset_size=size,
        block_size=config.block_size,
    )
    _, cache = decoder.extend(decoder.init(q.shape[0], key), *(x[:, : config.prompt] for x in tokens))

    def step(cache: Any, token: Any) -> tuple[Any, Array]:
        out, cache = decoder.extend(cache, *(x[:, None] for x in token))
        return cache, out[:, 0]

    rest = [jnp.moveaxis(x[:, config.prompt :], 1, 0) for x in tokens]
    cache, out = lax.scan(step, cache, tuple(rest))
    return jnp.moveaxis(out, 0, 1), cache.heads.certificate


def _bytes(config: Config, size: int, head_dim: int, value_dim: int, share: float) -> float:
    """Bytes read per step as a share of those of exact decoding, the mean over the steps."""
    sinks, row = 4, head_dim + value_dim
    lengths = np.arange(config.prompt, config.length) + 1
    # A cluster has a mass and three radii; a recent token stands in the room of two blocks.
    always = (sinks + size) * (row + 4) + 2 * config.block_size * (row + 1)
    return float((always + share * lengths.mean() * (row + 1)) / (lengths.mean() * row))
