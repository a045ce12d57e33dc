"""Data without download: generated, shipped with Python or scikit-learn, or read from a path of the user's."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from approx_attention.core import did_you_mean, unknown
from experiments.config import STRICT, ConfigError, checked
from experiments.data import images, retrieval, synthetic, text
from experiments.data.dataset import SPLITS, Dataset

__all__ = ["DataConfig", "Dataset", "load"]

# A loader takes its settings as keyword arguments and gives the data.
DATASETS: dict[str, Callable[..., Dataset]] = {
    "python_text": text.python_text,
    "masked_text": text.masked_text,
    "dictionary": text.dictionary,
    "byte_file": text.byte_file,
    "digits": images.digits,
    "masked_digits": images.masked_digits,
    "marked_digits": images.marked_digits,
    "copying": synthetic.copying,
    "segments": synthetic.segments,
    "retrieval": retrieval.retrieval,
    "match_xor": synthetic.match_xor,
    "composition": synthetic.composition,
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set by name, and the settings of its loader, such as ``length`` or ``path``."""

    name: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """The settings as the loader takes them.

        Raises:
            ConfigError: there is no data set of that name, or it lacks such a setting or does not take such a value.
        """
        if self.name not in DATASETS:
            raise ConfigError(unknown("data", self.name, DATASETS))
        parameters = inspect.signature(DATASETS[self.name]).parameters
        for name in self.settings:
            if name not in parameters:
                raise ConfigError(f"data {self.name!r} has no setting {name!r}{did_you_mean(name, parameters)}")
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in self.settings]
        if missing:
            raise ConfigError(f"data {self.name!r} needs the setting {missing[0]!r}")
        return {
            name: checked(parameters[name].annotation, value, f"data {self.name!r}: {name!r}")
            for name, value in self.settings.items()
        }


def load(config: DataConfig) -> Dataset:
    """The data set that a configuration names.

    Raises:
        ConfigError: there is none of that name, it lacks such a setting, or its path holds something else.
    """
    return DATASETS[config.name](**config.arguments())


def held_out(data: Dataset, split: str, batch: int, count: int) -> list[dict[str, np.ndarray]]:
    """The same ``count`` batches of a split for every model and seed."""
    random = np.random.default_rng([7, SPLITS.index(split)])
    return [data.draw(random, batch, split) for _ in range(count)]
