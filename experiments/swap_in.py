"""A model trained with exact attention, evaluated with every method in its place and without further training.

Module of several studies, which differ in data, model and methods.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.evaluation import method_styles
from experiments import data
from experiments.config import SeveralBy
from experiments.fidelity import attention_errors
from experiments.models import AttentionConfig, use_attention
from experiments.results import Frame, Record
from experiments.show import code, having, in_kib, markdown, parts, spread
from experiments.trained import bytes_held, oracles
from experiments.training import TrainingConfig, TrainsExact, evaluate, fit, score_program, step_program


@dataclasses.dataclass(frozen=True)
class Config(TrainsExact):
    """What is trained, and the methods that then take attention's place, by the name they are reported under."""

    methods: SeveralBy[AttentionConfig]

    def __post_init__(self) -> None:
        super().__post_init__()
        if "exact" in self.methods:
            raise ValueError("methods must not include 'exact': it is the method that is trained and then replaced")

    def trains(self) -> list[TrainingConfig]:
        """What is checked before anything runs."""
        return [dataclasses.replace(self.training, attention=own) for own in self.methods.values()]


def programs(config: Config) -> dict[str, Any]:
    """What an accelerator must have room for: the training, and an evaluation with each method."""
    scores = zip(config.methods, config.trains(), strict=True)
    return {
        "train step": functools.partial(step_program, config.training),
        **{f"score, {name}": functools.partial(score_program, own) for name, own in scores},
    }


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Score and attention error of each method in the trained model."""
    training = config.seeded_training
    model, dataset, seconds = fit(training, directory, console)
    example = data.held_out(dataset, "valid", 1, 1)[0]
    methods = {"exact": training.attention, **config.methods}
    errors = attention_errors(model, example, methods)
    records: list[Record] = [{"training_seconds": round(seconds, 1)}, *oracles(dataset)]
    for name, attention in methods.items():
        use_attention(model, attention)
        scores = evaluate(training, model, dataset, "test")
        records.append(
            {
                "method": name,
                "bits": scores["bits"],
                "accuracy": scores["accuracy"],
                "attention_error": errors[name]["mean"],
                "held_bytes": bytes_held(training, dataset, attention),
            }
        )
    use_attention(model, training.attention)
    return records


def _lost(records: Frame) -> Frame:
    """The scores with a column for the bits lost against exact attention with the same seed."""
    scores = having(records, "method", "bits")
    exact = scores[scores["method"] == "exact"].set_index("seed")["bits"]
    return scores.assign(lost=scores["bits"] - scores["seed"].map(exact))


def table(records: Frame) -> Iterable[str]:
    """Score, loss and error of each method."""
    rows = [
        [
            code(name),
            *(spread(list(own[figure])) for figure in ("bits", "accuracy", "lost", "attention_error")),
            in_kib(own["held_bytes"].iloc[0]) if "held_bytes" in own else "",
        ]
        for name, own in parts(_lost(records), "method")
    ]
    yield markdown("evaluated with|test bits|accuracy|bits lost against exact|attention error|cache", rows)


def figure(records: Frame) -> Figure:
    """Bits lost against the error of the attention."""
    drawn = Figure(figsize=(7, 4.4))
    axes = drawn.subplots()
    scores = _lost(records)
    others = scores[scores["method"] != "exact"]
    styles = method_styles(dict.fromkeys(scores["method"]))
    for name, own in parts(others, "method"):
        axes.plot(own["attention_error"], own["lost"], linestyle="", label=name, **styles[name])
    axes.set(
        xscale="log",
        xlabel="relative error of the attention",
        ylabel="test bits lost against exact attention,\nwithout further training",
    )
    if others["lost"].min() > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=1e-2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(True, which="both", color="0.9")
    drawn.legend(loc="outside lower center", ncols=4)
    return drawn
