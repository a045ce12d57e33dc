"""Models trained with one method each: their score, and how close their attention is to exact attention.

Module of several studies, which differ in data, model and methods.
"""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.evaluation import Tensors, held_bytes, light_grid, method_styles
from experiments import data
from experiments.data import Dataset
from experiments.fidelity import attention_errors
from experiments.models import AttentionConfig
from experiments.results import Frame, Record
from experiments.show import code, having, in_kib, markdown, parts, spread
from experiments.training import TrainingConfig, evaluate, fit

Config = TrainingConfig


def run(config: TrainingConfig, directory: pathlib.Path, console: Console) -> list[Record]:
    """Trains, or goes on from a checkpoint, and evaluates.

    ``attention_error`` is that of the method on the queries, keys and values of the trained model, and
    ``mean_value_error`` that of the mean of the values there: a score can be good while the attention approximates
    nothing.
    """
    model, dataset, seconds = fit(config, directory, console)
    example = data.held_out(dataset, "valid", 1, 1)[0]
    errors = attention_errors(model, example, {"method": None, "mean_value": AttentionConfig("mean_value")})
    valid, test = (evaluate(config, model, dataset, split) for split in ("valid", "test"))
    score: Record = {
        "bits": test["bits"],
        "accuracy": test["accuracy"],
        "valid_bits": valid["bits"],
        "attention_error": errors["method"]["mean"],
        "mean_value_error": errors["mean_value"]["mean"],
        "held_bytes": bytes_held(config, dataset, config.attention),
        "training_seconds": round(seconds, 1),
    }
    return [score, *by_position(test), *oracles(dataset)]


def by_position(scores: dict[str, Any]) -> Iterator[Record]:
    """Bits by position in the sequence, where targets have one."""
    for positions, bits in scores.get("by_position", {}).items():
        yield {"positions": positions, "position_bits": bits}


def oracles(dataset: Dataset) -> Iterator[Record]:
    """What is reached on these data without understanding them."""
    for name, accuracy in dataset.oracles.items():
        yield {"oracle": name, "oracle_accuracy": accuracy}


def bytes_held(config: TrainingConfig, dataset: Dataset, attention: AttentionConfig) -> int | None:
    """Cache bytes per key head and sequence at the length of the task; None for images."""
    if dataset.kind == "image":
        return None
    import jax
    import jax.numpy as jnp

    length = data.held_out(dataset, "train", 1, 1)[0]["tokens"].shape[1]
    model = config.model
    query, key = (
        jax.ShapeDtypeStruct((1, length, heads, model.head_dim), jnp.float32)
        for heads in (model.num_heads, model.num_kv_heads)
    )
    return held_bytes(Tensors(query, key, key), attention.method, attention.arguments(), is_causal=dataset.is_causal)  # pyright: ignore[reportArgumentType]


def _has_positions(records: Frame) -> bool:
    return "positions" in records and bool(records["positions"].notna().any())


def table_of_scores(records: Frame) -> Iterable[list[str]]:
    """A row for each configuration."""
    for name, own in parts(records):
        scores = having(own, "bits", "attention_error")
        last = (
            list(having(own, "position_bits").groupby("seed")["position_bits"].last()) if _has_positions(own) else None
        )
        yield [
            code(name),
            spread(list(scores["bits"])),
            spread(list(scores["accuracy"])),
            "" if last is None else spread(last),
            spread(list(scores["attention_error"])),
            spread(list(scores["mean_value_error"])),
            in_kib(scores["held_bytes"].iloc[0]) if "held_bytes" in scores else "",
            f"{scores['training_seconds'].mean():.0f} s",
        ]


# Errors beyond which their axis is logarithmic above 1.
LARGE = 3.0
HEADER = "trained with|test bits|accuracy|bits, last positions|attention error|error of mean(V)|cache|training"


def table(records: Frame) -> Iterable[str]:
    """Scores, and below them those of oracles."""
    rows = list(table_of_scores(records))
    if "oracle" in records:
        known = having(records, "oracle").drop_duplicates("oracle")
        rows += [
            [f"oracle: {name.replace('_', ' ')}", "", f"{accuracy:.3f}", *[""] * 5]
            for name, accuracy in zip(known["oracle"], known["oracle_accuracy"], strict=True)
        ]
    yield markdown(HEADER, rows)


def figure(records: Frame) -> Figure:
    """Bits by position, and the score against the error of the attention."""
    positions = list(dict.fromkeys(records["positions"].dropna())) if _has_positions(records) else []
    # Configurations may differ in length, and so in what is the first position with a target.
    positions.sort(key=lambda octave: int(octave.split("-")[0]))
    drawn = Figure(figsize=(10, 4.2))
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1) if len(positions) > 1 else (0.01, 1))
    for name, style in method_styles(dict.fromkeys(records["configuration"])).items():
        own = records[records["configuration"] == name]
        scores = having(own, "bits", "attention_error")
        right.plot(scores["attention_error"], scores["bits"], linestyle="", label=name, **style)
        if positions:
            means = having(own, "position_bits").groupby("positions", sort=False)["position_bits"].mean()
            left.plot([positions.index(octave) for octave in means.index], means, **style)
    left.set(xlabel="position in the sequence", ylabel="test bits per token")
    left.set_xticks(range(len(positions)), positions, rotation=30)
    right.set(xlabel="relative error of the attention, on the model's tensors", ylabel="test bits per token")
    if records["attention_error"].max() > LARGE:
        right.set_xscale("symlog", linthresh=1)
    for axes in (left, right):
        light_grid(axes)
    left.set_visible(len(positions) > 1)
    # An image or a whole text has one label, and no positions.
    if not positions:
        right.set_ylabel("test bits per example")
    drawn.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return drawn
