"""Spectra of the attention of a model, layer by layer, trained and as it was initialised."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.evaluation import light_grid, method_styles, spectrum
from approx_attention.nnx import capture_attention
from experiments import data
from experiments.config import ConfigError, Count, Share
from experiments.results import Frame, Record
from experiments.show import having, pivot, spread
from experiments.training import TrainsExact, build_model, fit, predict

# What the spectra are of.
OF = {"weights": "P", "centred": "P - 1/n"}


@dataclasses.dataclass(frozen=True)
class Config(TrainsExact):
    """A model trained with exact attention, and the share of the singular values that is looked at.

    Attributes:
        share: of the number of tokens: what the largest singular values up to there add up to.
    """

    share: Share = 0.25
    examples: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training.model.num_layers < 2:
            raise ValueError(f"training.model.num_layers must be at least 2, got {self.training.model.num_layers}")


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Cumulative spectra of every layer, the mean over heads and examples, of P and of P less the uniform weights.

    ``share`` is what the largest singular values, ``config.share`` of them, add up to, and ``rise`` its difference
    between the last and the first layer of the trained model.
    """
    training = config.seeded_training
    model, dataset, _ = fit(training, directory, console)
    if dataset.is_causal:
        raise ConfigError(f"data {training.data.name!r} are causal; the spectra are of bidirectional attention")
    batch = data.held_out(dataset, "valid", config.examples, 1)[0]
    records: list[Record] = []
    for name, of in (("trained", model), ("initial", build_model(training, dataset))):
        for layer, tensors in enumerate(_captured(of, batch).values()):
            for kind, curve in _cumulative(tensors).items():
                at = max(1, round(config.share * len(curve))) - 1
                rounded = [round(float(x), 5) for x in curve]
                records.append({"model": name, "layer": layer, "of": kind, "share": float(curve[at]), "curve": rounded})
    for kind in OF:
        trained = [r["share"] for r in records if (r.get("model"), r["of"]) == ("trained", kind)]
        records.append({"of": kind, "rise": trained[-1] - trained[0]})  # pyright: ignore[reportOperatorIssue]
    return records


def table(records: Frame) -> Iterable[str]:
    """The share of the largest singular values, by layer."""
    shares = having(records, "share")
    named = shares.assign(of=shares["of"].map(OF), layer=[f"layer {layer:g}" for layer in shares["layer"]])
    yield "Share of the sum of singular values that the largest of them make, mean over heads"
    yield pivot(named, ["model", "of"], "layer", "share", cell=spread, head=["model", "of"], quoted=False)


def figure(records: Frame) -> Figure:
    """Cumulative spectra of the layers, trained and as they were initialised."""
    curves = having(records, "curve")
    drawn = Figure(figsize=(9, 4.2))
    for axes, (of, title) in zip(drawn.subplots(1, 2, sharey=True), OF.items(), strict=True):
        shown = curves[curves["of"] == of]
        for name, line in (("trained", "-"), ("initial", ":")):
            layers = shown[shown["model"] == name].groupby("layer", sort=True)["curve"]
            styles = method_styles([f"layer {layer:g}" for layer, _ in layers])
            for layer, own in layers:
                curve = np.mean(list(own), axis=0)
                look, ranks = styles[f"layer {layer:g}"], range(1, len(curve) + 1)
                axes.plot(ranks, curve, color=look["color"], linestyle=line, label=f"layer {layer:g}, {name}")
        axes.set(title=f"singular values of {title}", xlabel="number of singular values")
        light_grid(axes)
    drawn.supylabel("share of their sum")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn


def _captured(model: nnx.Module, batch: dict[str, Any]) -> dict[str, Any]:
    return capture_attention(model, lambda model: predict(model, {name: jnp.asarray(x) for name, x in batch.items()}))


@jax.jit
def _spectra(query: Any, key: Any) -> Any:
    group = query.shape[2] // key.shape[2]
    key = jnp.repeat(key, group, axis=2)
    return jax.vmap(jax.vmap(spectrum, in_axes=1), in_axes=0)(query, key)


def _cumulative(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    found = _spectra(*(jnp.asarray(tensors[name], jnp.float32) for name in "qk"))
    return {kind: np.asarray(getattr(found, kind)).mean((0, 1)) for kind in ("weights", "centred")}
