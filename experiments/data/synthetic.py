"""Generated tasks: nested lists, connected paths, associative recall, copying, and matching pairs and triples."""

from collections.abc import Callable

import numpy as np

from experiments.config import ConfigError
from experiments.data.dataset import SPLITS, Dataset

Batch = dict[str, np.ndarray]

# A split's examples are told from another's by the seed alone: every draw is folded with the split.
_SPLIT_SEED = {split: index for index, split in enumerate(SPLITS)}


def _generated(draw: Callable[[np.random.Generator, int], Batch]) -> Callable[[np.random.Generator, int, str], Batch]:
    """Fresh examples for every batch, from a stream of the split's own."""

    def of_split(random: np.random.Generator, batch: int, split: str) -> Batch:
        return draw(np.random.default_rng([_SPLIT_SEED[split], *random.integers(0, 2**31, 4)]), batch)

    return of_split


LISTOPS_TOKENS = (*"0123456789", "MIN", "MAX", "MED", "SM", "]", "pad")


def listops(least_length: int = 20, greatest_length: int = 128, max_depth: int = 6, max_arguments: int = 5) -> Dataset:
    """Nested expressions in MIN, MAX, MED and SM (sum modulo 10); the label is the value (Nangia and Bowman 2018).

    Trees are drawn as in the Long Range Arena: with probability 1/4 an operator of 2 to ``max_arguments`` children,
    else a digit, and only lengths strictly between the two given are kept. A score below that of an oracle which
    reads the first operator only (about 26 % at the default lengths) is no evidence of long-range reasoning.
    """
    if not 0 < least_length < greatest_length:
        raise ConfigError(
            f"data 'listops' needs 0 < least_length < greatest_length, got {least_length}, {greatest_length}"
        )
    operators = {
        10: min,
        11: max,
        12: lambda values: int(np.median(values)),
        13: lambda values: sum(values) % 10,
    }
    closing, pad = LISTOPS_TOKENS.index("]"), LISTOPS_TOKENS.index("pad")

    def grow(random: np.random.Generator, depth: int) -> tuple[list[int], int]:
        if depth >= max_depth or random.random() > 0.25:
            digit = int(random.integers(10))
            return [digit], digit
        children = [grow(random, depth + 1) for _ in range(random.integers(2, max_arguments + 1))]
        operator = int(random.integers(10, 14))
        tokens = [operator, *(token for child, _ in children for token in child), closing]
        return tokens, operators[operator]([value for _, value in children])

    def draw(random: np.random.Generator, batch: int) -> Batch:
        tokens = np.full((batch, greatest_length), pad, np.int32)
        lengths, labels = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        for i in range(batch):
            expression, value = grow(random, 1)
            while not least_length < len(expression) < greatest_length:
                expression, value = grow(random, 1)
            tokens[i, : len(expression)], lengths[i], labels[i] = expression, len(expression), value
        return {"tokens": tokens, "lengths": lengths, "label": labels}

    return Dataset("classify", _generated(draw), num_classes=10, vocabulary=len(LISTOPS_TOKENS))


def pathfinder(size: int = 32, dashes: int = 6, distractors: int = 5, distractor_dashes: int = 2) -> Dataset:
    """Two dashed curves among distractors; the label is whether the two marked ends lie on one of them.

    The task of Linsley et al. (2018) from a simplified generator of our own: each curve turns smoothly and keeps its
    distance from what is drawn. The image is read pixel by pixel, row by row, as 256 grey levels.
    """
    if size < 24 or dashes < 2:
        raise ConfigError(f"data 'pathfinder' needs size >= 24 and dashes >= 2, got {size} and {dashes}")
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).astype(np.float32)

    def walk(random: np.random.Generator, count: int, drawn: np.ndarray) -> np.ndarray | None:
        """Centre and orientation of each dash, ``[count, 3]``, or None where there is no room."""
        position, angle = random.uniform(3, size - 3, 2), random.uniform(0, 2 * np.pi)
        steps: list[np.ndarray] = []
        for _ in range(count):
            for _ in range(10):
                turned = angle + random.normal(0, 0.35)
                onward = position + 4.0 * np.array([np.sin(turned), np.cos(turned)]) if steps else position
                others = np.concatenate([drawn, *(s[None, :2] for s in steps[:-1])])
                if np.all((onward > 2) & (onward < size - 3)) and np.all(np.linalg.norm(others - onward, axis=1) > 3.5):
                    break
            else:
                return None
            position, angle = onward, turned
            steps.append(np.array([*position, angle]))
        return np.stack(steps)

    def paint(image: np.ndarray, curve: np.ndarray) -> None:
        centre, direction = curve[:, None, None, :2], np.stack([np.sin(curve[:, 2]), np.cos(curve[:, 2])], -1)
        offset = grid - centre
        along = np.clip((offset * direction[:, None, None]).sum(-1), -1.0, 1.0)
        distance = np.linalg.norm(offset - along[..., None] * direction[:, None, None], axis=-1).min(0)
        np.maximum(image, 0.75 * np.clip(1.2 - distance, 0, 1), out=image)

    def draw_one(random: np.random.Generator) -> tuple[np.ndarray, int]:
        while True:
            curves: list[np.ndarray] = []
            for count in [dashes, dashes] + [distractor_dashes] * distractors:
                drawn = np.concatenate([np.zeros((0, 2)), *(curve[:, :2] for curve in curves)])
                attempts = (walk(random, count, drawn) for _ in range(20))
                curve = next((curve for curve in attempts if curve is not None), None)
                if curve is not None:
                    curves.append(curve)
                elif len(curves) < 2:
                    break
            if len(curves) >= 2:
                break
        image = np.zeros((size, size), np.float32)
        for curve in curves:
            paint(image, curve)
        label = int(random.integers(2))
        for end in (curves[0][0, :2], curves[0][-1, :2] if label else curves[1][-1, :2]):
            np.maximum(image, np.clip(2.2 - np.linalg.norm(grid - end, axis=-1), 0, 1), out=image)
        return image, label

    def draw(random: np.random.Generator, batch: int) -> Batch:
        pairs = [draw_one(random) for _ in range(batch)]
        tokens = np.stack([np.round(255 * image).astype(np.int32).reshape(-1) for image, _ in pairs])
        lengths = np.full(batch, size * size, np.int32)
        return {"tokens": tokens, "lengths": lengths, "label": np.asarray([label for _, label in pairs], np.int32)}

    return Dataset("classify", _generated(draw), num_classes=2, vocabulary=256)


def recall(length: int = 256, pairs: int = 16, vocabulary: int = 512, power: float = 0.01) -> Dataset:
    """Multi-query associative recall (Arora et al. 2023): keys with their values, then the keys again, asking for them.

    Keys come from the lower half of the vocabulary and values from the upper; a key is asked for once, after a gap
    drawn from a power law, and every other place holds the filler 0.
    """
    if vocabulary < 2 * pairs + 2 or length < 4 * pairs:
        raise ConfigError(
            f"data 'recall' needs vocabulary >= 2 pairs + 2 and length >= 4 pairs, got {vocabulary}, {length}, {pairs}"
        )
    half = vocabulary // 2
    places = (length - 2 * pairs) // 2
    weights = power * np.arange(1, places + 1) ** (power - 1.0)
    weights /= weights.sum()

    def draw(random: np.random.Generator, batch: int) -> Batch:
        tokens = np.zeros((batch, length), np.int32)
        targets = np.full((batch, length), -1, np.int32)
        for i in range(batch):
            keys = 1 + random.choice(half - 1, pairs, replace=False)
            values = half + random.choice(vocabulary - half, pairs, replace=False)
            tokens[i, 0 : 2 * pairs : 2], tokens[i, 1 : 2 * pairs : 2] = keys, values
            asked = 2 * pairs + 2 * random.choice(places, pairs, replace=False, p=weights)
            tokens[i, asked], targets[i, asked] = keys, values
        return {"tokens": tokens, "targets": targets}

    return Dataset("sequence", _generated(draw), num_classes=vocabulary, vocabulary=vocabulary, is_causal=True)


def copying(length: int = 64, vocabulary: int = 16) -> Dataset:
    """Random tokens, a separator, and the same tokens again, which must be told one after the other."""
    if length < 2 or vocabulary < 2:
        raise ConfigError(f"data 'copying' needs length >= 2 and vocabulary >= 2, got {length} and {vocabulary}")

    def draw(random: np.random.Generator, batch: int) -> Batch:
        word = random.integers(1, vocabulary, (batch, length)).astype(np.int32)
        line = np.concatenate([word, np.zeros((batch, 1), np.int32), word], 1)
        targets = line[:, 1:].copy()
        targets[:, :length] = -1
        return {"tokens": line[:, :-1], "targets": targets}

    return Dataset("sequence", _generated(draw), num_classes=vocabulary, vocabulary=vocabulary, is_causal=True)


def match(order: int = 2, length: int = 16, modulus: int | None = None) -> Dataset:
    """Match2 and Match3 (Sanford et al. 2023): does some token, or pair, sum with this one to 0 modulo ``modulus``?

    Places may repeat and include the token itself. By default the modulus is such that about half of the answers are
    yes: 1.44 length for pairs and 0.72 length^2 for triples.
    """
    if modulus is None:
        modulus = max(2, round(1.44 * length if order == 2 else 0.72 * length**2))
    if order not in (2, 3) or length < 1 or modulus < 2:
        raise ConfigError(
            f"data 'match' needs order 2 or 3, length >= 1 and modulus >= 2, got {order}, {length}, {modulus}"
        )

    def draw(random: np.random.Generator, batch: int) -> Batch:
        tokens = random.integers(0, modulus, (batch, length)).astype(np.int32)
        sums = tokens[:, None, :] if order == 2 else tokens[:, :, None] + tokens[:, None, :]
        completes = (tokens[:, :, None] + sums.reshape(batch, 1, -1)) % modulus == 0
        return {"tokens": tokens, "targets": completes.any(-1).astype(np.int32)}

    return Dataset("sequence", _generated(draw), num_classes=2, vocabulary=modulus)
