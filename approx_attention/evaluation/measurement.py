"""The settings of the measurements that choose methods and check the choice."""

import dataclasses

from approx_attention.core import InputError
from approx_attention.evaluation.arms import MOST_SEEDS, check_range


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The shares, seeds and rounds with which `plan` and `plan_model` measure methods and check their choice.

    Attributes:
        held_out: the share that is held out for the check: of the heads in `plan`, of the queries of each head in
            `plan_model`.
        confidence: confidence of the error bound on which a choice is based, at least 0.5.
        num_seeds: number of seeds of random methods, to choose and again to check; at least 2, to estimate a spread.
        seed: seed of the split, and first seed of the check.
        rounds: number of timed calls of each setting, interleaved with the others.

    Raises:
        InputError: one of them is out of range.

    Example:
        >>> from approx_attention.evaluation import Measurement
        >>> Measurement(num_seeds=2, seed=7).choosing
        range(9, 11)
    """

    held_out: float = 0.5
    confidence: float = 0.95
    num_seeds: int = 3
    seed: int = 0
    rounds: int = 5

    def __post_init__(self) -> None:
        if not (isinstance(self.confidence, int | float) and 0.5 <= self.confidence < 1):
            raise InputError(f"confidence must be at least 0.5 and below 1, got {self.confidence}")
        check_range("num_seeds", self.num_seeds, 2, MOST_SEEDS)
        check_range("rounds", self.rounds, 1, MOST_SEEDS)
        check_range("seed", self.seed, 0, 2**31 - 1)

    @property
    def choosing(self) -> range:
        """The seeds of the choice, all different from those of the check."""
        return range(self.seed + self.num_seeds, self.seed + 2 * self.num_seeds)

    @property
    def checking(self) -> range:
        """The seeds of the check."""
        return range(self.seed, self.seed + self.num_seeds)


STANDARD = Measurement()
