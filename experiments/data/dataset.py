"""What every data set offers to the training loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

SPLITS = ("train", "valid", "test")
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Batches of examples, drawn at random from a split.

    Attributes:
        kind: what a batch holds, and so which model reads it.
            ``sequence``: ``tokens [B, T]`` and ``targets [B, T]``, -1 where nothing is asked;
            ``image``: ``image [B, H, W, C]`` in [0, 1] and ``label [B]``.
        draw: ``(random, batch, split) -> batch``.
        num_classes: how many targets or labels there are.
        vocabulary: how many tokens there are.
        is_causal: a position's target must be told from the tokens up to it.
        image_shape: height, width and channels.
        provenance: where the data come from, with a checksum if they are read.
        oracles: accuracies on held-out examples without understanding, to be told with every score.
        context: the number of first tokens about which the others ask; 0 where there is none.
    """

    kind: Literal["sequence", "image"]
    draw: Callable[[np.random.Generator, int, str], Batch]
    num_classes: int
    vocabulary: int = 0
    is_causal: bool = False
    image_shape: tuple[int, int, int] = (0, 0, 0)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    oracles: Mapping[str, float] = dataclasses.field(default_factory=dict)
    context: int = 0


# A split's examples are told from another's by the seed alone: every draw is folded with the split.
_SPLIT_SEED = {split: index for index, split in enumerate(SPLITS)}


def generated(draw: Callable[[np.random.Generator, int], Batch]) -> Callable[[np.random.Generator, int, str], Batch]:
    """Fresh examples for every batch, from a stream of the split's own."""

    def of_split(random: np.random.Generator, batch: int, split: str) -> Batch:
        return draw(np.random.default_rng([_SPLIT_SEED[split], *random.integers(0, 2**31, 4)]), batch)

    return of_split
