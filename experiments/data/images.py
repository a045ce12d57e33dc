"""Images: scikit-learn's digits, and scenes composed of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.config import ConfigError, Count, Share
from experiments.data.dataset import Dataset


def digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8 x 8 grey, split 8 : 1 : 1."""
    parts = _digit_parts()
    return _labelled(parts, 10, "sklearn.datasets.load_digits")


def masked_digits(share: Share = 0.25, count: Count = 1) -> Dataset:
    """Images of ``count`` `digits`, 64 tokens of 17 grey levels each; a share is hidden and asked for, each at random.

    The pixels of all images are in one random order, in which neighbours in the image are far apart: in raster order a
    window of tokens holds most of what tells a pixel.
    """
    if not 0 < share < 1:
        raise ConfigError(f"data 'masked_digits' needs a share between 0 and 1, got {share}")
    order = np.random.default_rng(0).permutation(64 * count)
    levels = {
        split: np.rint(16 * pixels).astype(np.int32).reshape(-1, 64) for split, (pixels, _) in _digit_parts().items()
    }

    def draw(random: np.random.Generator, batch: int, split: str) -> dict[str, np.ndarray]:
        chosen = random.integers(0, len(levels[split]), (batch, count))
        told = levels[split][chosen].reshape(batch, -1)[:, order]
        hidden = random.random(told.shape) < share
        return {"tokens": np.where(hidden, 17, told).astype(np.int32), "targets": np.where(hidden, told, -1)}

    commonest = np.array([np.bincount(pixel).argmax() for pixel in levels["train"].T])
    oracles = {"the commonest level of each pixel": float(np.mean(levels["test"] == commonest))}
    return Dataset("sequence", draw, num_classes=17, vocabulary=18, oracles=oracles)


def marked_digits(colours: Count = 4) -> Dataset:
    """Digits of different colours on a 32 x 32 canvas; the label is the digit whose colour a mark elsewhere repeats.

    Each digit fills a cell of a 4 x 4 grid, and the mark of 4 x 4 pixels is in the middle of a cell without a digit. A
    scene's digits come from its split's digits alone.
    """
    if not 2 <= colours <= 7:
        raise ConfigError(f"data 'marked_digits' needs 2 to 7 colours, got {colours}")
    parts = _digit_parts()
    # The corners of the cube of colours, without black.
    palette = (np.arange(1, 8)[:, None] >> np.arange(3) & 1).astype(np.float32)

    def draw(random: np.random.Generator, batch: int, split: str) -> dict[str, np.ndarray]:
        glyphs, classes = parts[split]
        chosen = random.integers(0, len(glyphs), (batch, colours))
        marked = random.integers(0, colours, batch)
        scenes = np.zeros((batch, 32, 32, 3), np.float32)
        for scene, own, which in zip(scenes, chosen, marked, strict=True):
            rows, columns = np.divmod(random.choice(16, colours + 1, replace=False), 4) * np.array(8)
            colour = palette[random.choice(7, colours, replace=False)]
            for i in range(colours):
                scene[rows[i] : rows[i] + 8, columns[i] : columns[i] + 8] = glyphs[own[i]] * colour[i]
            scene[rows[-1] + 2 : rows[-1] + 6, columns[-1] + 2 : columns[-1] + 6] = colour[which]
        return {"image": scenes, "label": classes[chosen[np.arange(batch), marked]].astype(np.int32)}

    # The digit that is asked for, or another that is by chance the same.
    oracles = {"one of the digits at random": 1 / colours + (1 - 1 / colours) / 10}
    source = {"source": "scenes of sklearn.datasets.load_digits"}
    return Dataset("image", draw, num_classes=10, image_shape=(32, 32, 3), provenance=source, oracles=oracles)


def _digit_parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = (bunch["images"] / 16).astype(np.float32)[..., None]
    labels = bunch["target"].astype(np.int32)
    order = np.random.default_rng(0).permutation(len(pixels))
    tenth = len(order) // 10
    pieces = {"valid": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    return {split: (pixels[index], labels[index]) for split, index in pieces.items()}


def _labelled(parts: Mapping[str, tuple[np.ndarray, np.ndarray]], num_classes: int, source: str) -> Dataset:
    def draw(random: np.random.Generator, batch: int, split: str) -> dict[str, np.ndarray]:
        pixels, labels = parts[split]
        chosen = random.integers(0, len(pixels), batch)
        return {"image": pixels[chosen], "label": labels[chosen]}

    shape = parts["train"][0].shape[1:]
    provenance = {"source": source, "images": {split: len(labels) for split, (_, labels) in parts.items()}}
    return Dataset("image", draw, num_classes=num_classes, image_shape=shape, provenance=provenance)
