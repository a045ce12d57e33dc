"""What is measured to choose a method, and what to check the choice."""

import dataclasses

from approx_attention.core import InputError
from approx_attention.evaluation.arms import MOST_SEEDS, check_range


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How `plan` and `plan_model` measure methods, and check what they have chosen on what chose nothing.

    Attributes:
        held_out: the share that is held out for the check: of the heads by `plan`, of each head's queries by
            `plan_model`.
        confidence: of the bound of the error that a choice rests on, at least 0.5.
        num_seeds: random projections or samples of random methods, to choose and then to check; at least 2, because
            one has no spread.
        seed: of the split, and of the first random projection of the check.
        rounds: how often each setting is timed, in turn with the others.

    Raises:
        InputError: one of them out of range.

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
        """The seeds by which a choice is made, of which none checks it."""
        return range(self.seed + self.num_seeds, self.seed + 2 * self.num_seeds)

    @property
    def checking(self) -> range:
        """The seeds that check it."""
        return range(self.seed, self.seed + self.num_seeds)


STANDARD = Measurement()
