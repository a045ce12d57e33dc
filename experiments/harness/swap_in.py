"""A model trained with exact attention, evaluated with every method in its place and without further training."""

import dataclasses
import pathlib
from typing import Any

from rich.console import Console

from experiments import data
from experiments.config import Seeded, SeveralBy
from experiments.fidelity import attention_errors
from experiments.harness.quality import bytes_held
from experiments.models import AttentionConfig, use_attention
from experiments.training import TrainingConfig, evaluate, fit


@dataclasses.dataclass(frozen=True)
class SwapInConfig(Seeded):
    """What is trained, and the methods that then take attention's place, by the name they are reported under."""

    training: TrainingConfig
    methods: SeveralBy[AttentionConfig]

    def __post_init__(self) -> None:
        if self.training.seed != 0:
            raise ValueError(f"the seed is a key next to 'training', not in it, where it is {self.training.seed}")
        if self.training.attention.method != "exact" or "exact" in self.methods:
            raise ValueError("what is trained is 'exact', and the other methods take its place: name no other to train")


def run(config: SwapInConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Score and attention error of each method in the trained model."""
    training = dataclasses.replace(config.training, seed=config.seed)
    model, dataset, seconds = fit(training, directory, console)
    example = data.held_out(dataset, "valid", 1, 1)[0]
    methods = {"exact": training.attention, **config.methods}
    errors = attention_errors(model, example, methods)
    result: dict[str, Any] = {
        "methods": {},
        "training_seconds": round(seconds, 1),
        "data": dict(dataset.provenance),
        "oracles": dict(dataset.oracles),
    }
    for name, attention in methods.items():
        use_attention(model, attention)
        result["methods"][name] = {
            **evaluate(training, model, dataset, "test"),
            "attention_error": errors[name],
            "held_bytes": bytes_held(training, dataset, attention),
        }
    use_attention(model, training.attention)
    return result
