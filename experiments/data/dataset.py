"""What every data set offers to the training loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Batches of examples, drawn at random from a split.

    Attributes:
        kind: what a batch holds, and so which model reads it.
            ``sequence``: ``tokens [B, T]`` and ``targets [B, T]``, -1 where nothing is asked;
            ``classify``: ``tokens [B, T]``, ``lengths [B]`` and ``label [B]``;
            ``image``: ``image [B, H, W, C]`` in [0, 1] and ``label [B]``.
        draw: ``(random, batch, split) -> batch``.
        num_classes: how many targets or labels there are.
        vocabulary: how many tokens there are.
        is_causal: a position's target must be told from the tokens up to it.
        image_shape: height, width and channels.
        provenance: where the data come from, with a checksum if they are read.
    """

    kind: Literal["sequence", "classify", "image"]
    draw: Callable[[np.random.Generator, int, str], dict[str, np.ndarray]]
    num_classes: int
    vocabulary: int = 0
    is_causal: bool = False
    image_shape: tuple[int, int, int] = (0, 0, 0)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
