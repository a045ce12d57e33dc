"""How far each method is from softmax attention without any training, on smoothed sequences and on captured tensors."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from approx_attention import METHODS, attention
from approx_attention.core import in_float32
from approx_attention.evaluation import Tensors, held_bytes, load_sample, output_error
from experiments.config import ConfigError, Count, NonNegative, Seeded, SeveralBy, Share
from experiments.models import AttentionConfig
from experiments.results import Frame, Record
from experiments.show import curves, in_kib, parts, pivot, spread


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Tensors, and the methods by the name they are reported under.

    Attributes:
        source: ``smoothed`` noise, or the ``sample`` that ships with the package.
        smoothing: width of the Gaussian filter along the sequence, in tokens; 0 for none.
        spread: standard deviation of the entries of q and k.
        shared: the part of their variance that q and k have in common.
    """

    methods: SeveralBy[AttentionConfig]
    source: Literal["smoothed", "sample"] = "smoothed"
    length: Count = 784
    head_dim: Count = 64
    smoothing: NonNegative = 0.0
    spread: NonNegative = 1.0
    shared: Share = 0.5
    is_causal: bool = False


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Relative Frobenius error, FLOPs of the products per head, and bytes held of each method."""
    if any(method.projections for method in config.methods.values()):
        raise ConfigError("this study trains nothing: give 'linformer' no projections")
    tensors = load_sample() if config.source == "sample" else smoothed(config)
    with in_float32():
        exact = attention(*tensors, method="exact", is_causal=config.is_causal)
    length, head_dim = tensors.query.shape[1], tensors.query.shape[3]
    records: list[Record] = []
    for name, method in config.methods.items():
        entry = METHODS[method.method]
        rng = jax.random.key(config.seed) if entry.capabilities.needs_key else None
        out = attention(*tensors, method=method.method, rng=rng, is_causal=config.is_causal, **method.arguments())
        size = method.settings.get(entry.size or "", 0)
        records.append(
            {
                "method": name,
                "error": float(output_error(out, exact).relative),
                "flops": entry.cost(length, length, head_dim, head_dim, size),
                "held_bytes": held_bytes(tensors, method.method, method.arguments(), is_causal=config.is_causal),
            }
        )
    return records


def table(records: Frame) -> Iterable[str]:
    """Errors by configuration; configurations with the same methods share a table."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, own in parts(records):
        kinds.setdefault(tuple(dict.fromkeys(own["method"])), []).append(name)
    more = {
        "MFLOP a head": lambda _, own: f"{own['flops'].iloc[0] / 1e6:.3g}",
        "cache": lambda _, own: in_kib(own["held_bytes"].iloc[0]),
    }
    for together in kinds.values():
        shown = records[records["configuration"].isin(together)]
        yield pivot(shown, "method", "configuration", "error", cell=spread, head="relative error", more=more)


# Errors of the methods, the configurations side by side.
figure = functools.partial(
    curves,
    x="configuration",
    y="error",
    by="method",
    panel=None,
    labels=("", "relative error to softmax attention"),
    scales=("linear", "log"),
    ticks=lambda name: name.replace("-spread", "\nspread").replace("-", " "),
    size=(10.0, 4.2),
)


def smoothed(config: Config) -> Tensors:
    """Gaussian noise, filtered along the sequence; q and k share part of their variance, and v is on its own."""
    from scipy.ndimage import gaussian_filter1d

    random = np.random.default_rng(config.seed)

    def draw() -> np.ndarray:
        x = random.normal(size=(config.length, config.head_dim))
        if config.smoothing:
            x = gaussian_filter1d(x, config.smoothing, axis=0)
        return x / x.std()

    common, own, v = np.sqrt(config.shared) * draw(), np.sqrt(1 - config.shared), draw()
    q, k = (config.spread * (common + own * draw()) for _ in "qk")
    return Tensors(*(jnp.asarray(x, jnp.float32)[None, :, None, :] for x in (q, k, v)))
