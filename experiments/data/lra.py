"""Tasks of the Long Range Arena that need no download: nested lists, and marked ends of curves among others."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import pydantic

from approx_attention.core import unknown
from experiments.config import ConfigError, Count, Seed, Whole
from experiments.data import cache as storage
from experiments.data.dataset import Batch, Dataset, generated

LISTOPS_TOKENS = (*"0123456789", "MIN", "MAX", "MED", "SM", "]", "pad")

# How many examples the oracles of data without end are fitted on, and again how many they are scored on.
ORACLE_ITEMS = 4000


def listops(
    least_length: Count = 20,
    greatest_length: Count = 128,
    max_depth: Annotated[Count, pydantic.Field(le=100)] = 6,
    max_arguments: Annotated[Count, pydantic.Field(le=100)] = 5,
    items: Whole | None = None,
    held_out_items: Whole = 2000,
    seed: Seed = 0,
    cache: str | None = None,
) -> Dataset:
    """Nested expressions in MIN, MAX, MED and SM (sum modulo 10); the label is the value (Nangia and Bowman 2018).

    Trees are drawn as in the Long Range Arena: with probability 1/4 an operator of 2 to ``max_arguments`` children,
    else a digit, and only lengths strictly between the two given are kept. LRA's own are 500, 2000, 10 and 10, with
    96000 ``items``.

    A score below that of the oracle that reads the first operator only is no evidence of long-range reasoning, so
    the data carry its accuracy and that of the commonest label, on examples which they were not fitted on.

    Args:
        least_length: expressions have more tokens.
        greatest_length: expressions have fewer tokens, and are padded to so many.
        max_depth: where trees end.
        max_arguments: of an operator.
        items: how many different expressions the training split has; None draws fresh ones for every batch.
        held_out_items: how many others the validation and the test split have each, if ``items`` is given.
        seed: of finite data.
        cache: folder for finite data and for what the oracles are fitted on; .cache/data of the repository by default.
    """
    if not 0 < least_length < greatest_length:
        raise ConfigError(
            f"data 'listops' needs 0 < least_length < greatest_length, got {least_length}, {greatest_length}"
        )
    if max_arguments < 2 or _longest(max_depth, max_arguments) <= least_length:
        raise ConfigError(
            f"data 'listops': with max_depth {max_depth} and max_arguments {max_arguments} no expression is longer "
            f"than {least_length}"
        )
    pad = LISTOPS_TOKENS.index("pad")

    def draw(random: np.random.Generator, batch: int) -> Batch:
        uniforms = _uniforms(random)
        tokens = np.full((batch, greatest_length), pad, np.int32)
        lengths, labels = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        for i in range(batch):
            expression: list[int] = []
            value = None
            while value is None or not least_length < len(expression) < greatest_length:
                expression = []
                value = _grow(expression, uniforms, 1, max_depth, max_arguments, greatest_length)
            tokens[i, : len(expression)], lengths[i], labels[i] = expression, len(expression), value
        return {"tokens": tokens, "lengths": lengths, "label": labels}

    rule = {
        "least_length": least_length,
        "greatest_length": greatest_length,
        "max_depth": max_depth,
        "max_arguments": max_arguments,
    }
    sizes: dict[str, Any] = {"num_classes": 10, "vocabulary": len(LISTOPS_TOKENS)}
    if items is None:
        counts = {"train": ORACLE_ITEMS, "test": ORACLE_ITEMS}
        sample = storage.finite("listops", rule, draw, counts, seed, cache)
        return Dataset("classify", generated(draw), oracles=oracles(sample["train"], sample["test"]), **sizes)
    counts = {"train": items, "valid": held_out_items, "test": held_out_items}
    parts = storage.finite("listops", rule, draw, counts, seed, cache)
    return storage.dataset(parts, oracles=oracles(parts["train"], parts["test"]), **sizes)


def oracles(fitted: Batch, scored: Batch) -> dict[str, float]:
    """Accuracies, on the second set, of the first set's commonest label, of all and of those with that first token."""
    commonest = np.bincount(fitted["label"]).argmax()
    by_token = np.full(len(LISTOPS_TOKENS), commonest)
    for token in np.unique(fitted["tokens"][:, 0]):
        by_token[token] = np.bincount(fitted["label"][fitted["tokens"][:, 0] == token]).argmax()
    return {
        "majority_class": float((scored["label"] == commonest).mean()),
        "first_operator": float((scored["label"] == by_token[scored["tokens"][:, 0]]).mean()),
    }


_OPERATORS = (min, max, lambda values: int(statistics.median(values)), lambda values: sum(values) % 10)


def _grow(
    tokens: list[int], uniforms: Iterator[float], depth: int, max_depth: int, max_arguments: int, limit: int
) -> int | None:
    """Appends the tokens of a tree and returns its value, or None as soon as there are too many tokens."""
    if depth >= max_depth or next(uniforms) > 0.25:
        digit = int(10 * next(uniforms))
        tokens.append(digit)
        return digit
    which = int(4 * next(uniforms))
    tokens.append(10 + which)
    values = []
    for _ in range(2 + int((max_arguments - 1) * next(uniforms))):
        value = _grow(tokens, uniforms, depth + 1, max_depth, max_arguments, limit)
        if value is None or len(tokens) > limit:
            return None
        values.append(value)
    tokens.append(LISTOPS_TOKENS.index("]"))
    return _OPERATORS[which](values)


def _uniforms(random: np.random.Generator) -> Iterator[float]:
    # Drawn in blocks: a number at a time costs more than the rest of the tree.
    return itertools.chain.from_iterable(random.random(4096).tolist() for _ in itertools.count())


def _longest(max_depth: int, max_arguments: int) -> int:
    length = 1
    for _ in range(max_depth - 1):
        length = 2 + max_arguments * length
    return length


@dataclasses.dataclass(frozen=True)
class SnakeRules:
    """How the curves of an image are drawn, in pixels.

    Attributes:
        padding: width of the border that stays empty.
        margins: what may be the distance that a dash keeps, one of them for each image.
        length: of a dash.
        thickness: of a dash.
        marker_radius: of the discs at the two marked ends.
        seed_distance: between the first dashes of the two long curves; their first lies twice as far from the edges.
        continuity: how straight curves are.
        contrasts: of the dashes of the long curves, and of those of the distractors.
        distractor_dashes: of all distractors together.
    """

    padding: int
    margins: tuple[int, ...]
    length: int
    thickness: float
    marker_radius: float
    seed_distance: int
    continuity: float
    contrasts: tuple[float, float]
    distractor_dashes: int


SNAKE_RULES: Mapping[int, SnakeRules] = {
    32: SnakeRules(1, (1,), 2, 0.5, 1.5, 7, 1.0, (1.5, 2.0), 20),
    64: SnakeRules(1, (1,), 5, 1.0, 2.5, 12, 1.8, (0.8, 0.8), 22),
    128: SnakeRules(1, (2, 3), 5, 1.5, 3.0, 20, 1.8, (0.9, 0.9), 35),
    256: SnakeRules(22, (3,), 5, 2.0, 5.0, 27, 1.8, (1.0, 1.0), 30),
}
CONTOUR_LENGTHS: Mapping[str, int] = {"easy": 6, "intermediate": 9, "hard": 14}


def pathfinder(
    size: Count = 32,
    level: str = "hard",
    items: Whole | None = None,
    held_out_items: Whole = 2000,
    seed: Seed = 0,
    cache: str | None = None,
) -> Dataset:
    """Two dashed curves among shorter ones; the label is whether the two marked ends lie on one of them.

    The images of Linsley et al. (2018) by the rule of their generator, with the settings of the Long Range Arena:
    ``size`` 32 is its Pathfinder, at level ``hard``, and 128 its Path-X. They are read pixel by pixel, row by row,
    as 256 grey levels.

    At size 32 the mean intensity is .079 at level hard and .051 at easy, with 16 % and 9.8 % of the pixels above .05.
    That is what the published generator gives when it is run beside this one (.079, .050, 16 %, 9.7 %); other samples
    of it were reported at .073, .045, 14 % and 8.5 %, which neither reaches. There as here, dashes of the two curves
    that are drawn in the same turn are not tested against each other, and rims may overlap: in a quarter of the hard
    images the curves share a pixel, and in some of a thousand both end at the same, where no label is right.

    Args:
        size: height and width: 32, 64, 128 or 256.
        level: ``easy``, ``intermediate`` or ``hard``: 6, 9 or 14 dashes in each of the two curves.
        items: how many different images the training split has; None draws fresh ones for every batch. LRA has 160000,
            and 20000 to validate and to test.
        held_out_items: how many others the validation and the test split have each, if ``items`` is given.
        seed: of finite data.
        cache: folder for finite data; .cache/data of the repository by default.
    """
    if size not in SNAKE_RULES:
        raise ConfigError(f"data 'pathfinder': size must be one of {', '.join(map(str, SNAKE_RULES))}, got {size}")
    if level not in CONTOUR_LENGTHS:
        raise ConfigError(f"data 'pathfinder': {unknown('level', level, CONTOUR_LENGTHS)}")

    def draw(random: np.random.Generator, batch: int) -> Batch:
        scenes = [draw_snakes(random, size, CONTOUR_LENGTHS[level]) for _ in range(batch)]
        tokens = np.stack([scene.image.astype(np.int32).reshape(-1) for scene in scenes])
        lengths = np.full(batch, size * size, np.int32)
        return {"tokens": tokens, "lengths": lengths, "label": np.asarray([scene.label for scene in scenes], np.int32)}

    if items is None:
        return Dataset("classify", generated(draw), num_classes=2, vocabulary=256)
    counts = {"train": items, "valid": held_out_items, "test": held_out_items}
    parts = storage.finite("pathfinder", {"size": size, "level": level}, draw, counts, seed, cache)
    return storage.dataset(parts, num_classes=2, vocabulary=256)


@dataclasses.dataclass(frozen=True)
class Dash:
    """A stroke of the rule's length from ``start`` (row, column) at an angle; ``tail`` and ``head`` are its ends.

    The first dash of a curve is drawn from its tail and every other from its head, which lies on a pixel.
    """

    start: tuple[int, int]
    angle: float
    tail: tuple[float, float]
    head: tuple[float, float]


Curve = tuple[Dash, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image in 8 bits with what was drawn: the long curves, the distractors, and the marked points."""

    image: np.ndarray
    label: int
    curves: tuple[Curve, Curve]
    distractors: tuple[Curve, ...]
    markers: tuple[tuple[float, float], tuple[float, float]]


def draw_snakes(random: np.random.Generator, size: int, contour_length: int) -> Scene:
    """One image: two curves of ``contour_length`` dashes, distractors of a third of it, and markers."""
    rules = SNAKE_RULES[size]
    label = int(random.integers(2))
    pen = _pen(size, rules.margins[random.integers(len(rules.margins))])
    mask, curves = pen.pair(random, contour_length)
    each = contour_length // 3
    distractors: list[Curve] = []
    for _ in range(rules.distractor_dashes // each):
        for _ in range(_DISTRACTOR_TRIALS):
            snake = pen.distractor(random, mask, each)
            if snake is not None:
                distractors.append(snake)
                break
    image = np.zeros_like(mask)
    for contrast, snakes in zip(rules.contrasts, (curves, distractors), strict=True):
        for dash in itertools.chain.from_iterable(snakes):
            pen.stamp(image, dash.start, contrast * pen.stroke(dash.angle)[0])
    origin = int(random.integers(2))
    markers = curves[origin][0].tail, curves[origin if label else 1 - origin][-1].head
    for point in markers:
        pen.stamp(image, (int(point[0]), int(point[1])), pen.disc)
    image = image[pen.inside]
    levels = np.round(255 * image / image.max()).astype(np.uint8)
    return Scene(levels, label, curves, tuple(distractors), markers)


# Upstream's retrials, and the scale at which it draws before it reduces the strokes.
_DASH_TRIALS, _DISTRACTOR_TRIALS, _ANTIALIAS = 3, 5, 2


class _Pen:
    """Strokes of one size and margin, each drawn once and then stamped, on arrays with a blocked rim around the image.

    A mask is 1 where a dash or its margin lies, and between 0 and 1 at the rims. As upstream, the newest dash of a
    curve enters it with the next one.
    """

    def __init__(self, size: int, margin: int):
        self.rules, self.size, self.margin = SNAKE_RULES[size], size, margin
        length = self.rules.length
        self.radius = length + int(np.ceil(self.rules.thickness)) + margin
        # No stamp and no step reaches further out.
        self.rim = length + 3 * margin + 4
        self.inside = (slice(self.rim, self.rim + size),) * 2
        self.width = size + 2 * self.rim
        self.strokes: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self.turns: dict[float, np.ndarray] = {}
        self.first_places: dict[float, np.ndarray] = {}
        reach = length + margin
        around = np.arange(0, 2 * np.pi, 1 / reach)
        self.steps = np.unique(np.floor(reach * np.stack([np.sin(around), np.cos(around)], 1)).astype(int), axis=0)
        self.angles = np.arctan2(self.steps[:, 0], self.steps[:, 1])
        self.near = _flat(self.steps, self.width)[:, None] + _flat(_disc(margin), self.width)
        self.disc = _reduced(_marker(self.rules.marker_radius), 2 * int(np.ceil(self.rules.marker_radius + 3)) + 1)

    def stamp(self, canvas: np.ndarray, at: tuple[int, int], stamp: np.ndarray) -> None:
        window = self._window(canvas, at, len(stamp) // 2)
        np.maximum(window, stamp, out=window)

    def _window(self, canvas: np.ndarray, at: tuple[int, int], radius: int) -> np.ndarray:
        row, column = at[0] + self.rim - radius, at[1] + self.rim - radius
        return canvas[row : row + 2 * radius + 1, column : column + 2 * radius + 1]

    def stroke(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """A dash from the centre at an angle, and the mask of it with its margin."""
        if angle not in self.strokes:
            self.strokes[angle] = _stroke(self.rules, self.margin, self.radius, angle)
        return self.strokes[angle]

    def empty(self) -> np.ndarray:
        mask = np.ones((self.width, self.width), np.float32)
        edge = self.rim + self.rules.padding
        mask[edge:-edge, edge:-edge] = 0
        return mask

    def pair(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, tuple[Curve, Curve]]:
        """The mask after two curves of ``count`` dashes that grow in turn, and their dashes; anew until it succeeds."""
        while True:
            seeds = self._seeds(random)
            if seeds is None:
                continue
            mask, snakes = self.empty(), [_Snake(self, seed) for seed in seeds]
            grown = (snake.extend(random, mask) for _ in range(count - 1) for snake in snakes)
            if all(grown):
                self.stamp(mask, snakes[1].dashes[-1].start, self.stroke(snakes[1].dashes[-1].angle)[1])
                return mask, (tuple(snakes[0].dashes), tuple(snakes[1].dashes))

    def distractor(self, random: np.random.Generator, mask: np.ndarray, count: int) -> Curve | None:
        """A curve in what is free, which then enters the mask; None where it found no room."""
        blocked = mask > 0.3
        if 1 - blocked[self.inside].mean() < 0.01:
            return None
        blocked[: self.rim + 1] = blocked[-self.rim - 1 :] = True
        blocked[:, : self.rim + 1] = blocked[:, -self.rim - 1 :] = True
        for _ in range(_DASH_TRIALS):
            angle = _random_angle(random)
            places = self._places(blocked, angle)
            if len(places) == 0:
                return None
            seed = self._seed(places[random.integers(len(places))], angle)
            if seed is not None:
                break
        else:
            return None
        snake, draft = _Snake(self, seed), mask.copy()
        if not all(snake.extend(random, draft) for _ in range(count - 1)):
            return None
        last = snake.dashes[-1]
        self.stamp(draft, last.start, self.stroke(last.angle)[1])
        mask[:] = draft
        return tuple(snake.dashes)

    def _seeds(self, random: np.random.Generator) -> tuple[Dash, Dash] | None:
        for _ in range(_DASH_TRIALS):
            angle = _random_angle(random)
            if angle not in self.first_places:
                blocked = np.ones((self.width, self.width), bool)
                edge = self.rim + 2 * self.rules.seed_distance
                blocked[edge:-edge, edge:-edge] = False
                self.first_places[angle] = self._places(blocked, angle)
            places = self.first_places[angle]
            if len(places) == 0:
                return None
            first = self._seed(places[random.integers(len(places))], angle)
            if first is not None:
                break
        else:
            return None
        for _ in range(_DASH_TRIALS):
            angle, towards = _random_angle(random), _random_angle(random)
            offset = self.rules.seed_distance * np.array([np.sin(towards), np.cos(towards)])
            second = self._seed(np.round(np.array(first.start) + offset).astype(int), angle)
            if second is not None:
                return first, second
        return None

    def _places(self, blocked: np.ndarray, angle: float) -> np.ndarray:
        """The pixels ``[n, 2]`` from which a dash at this angle, with its margin, meets nothing blocked.

        As upstream, whose statistics, and those of LRA's images, hang on it: the dash is sought a pixel further down
        and to the right than it is drawn, without what then lies out of reach; and an angle is given up where it
        leaves pixels at the border of the image nothing to look at. So at size 32 the first dash of all points up and
        to the left, and most distractors find no place.
        """
        offsets = np.argwhere(self.stroke(angle)[1] >= 1) - self.radius + 1
        offsets = offsets[np.abs(offsets).max(1) <= self.rules.length + self.margin]
        if not all((offsets * signs >= 0).all(1).any() for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1))):
            return np.zeros((0, 2), int)
        hit = np.zeros((self.size, self.size), bool)
        for row, column in offsets + self.rim:
            hit |= blocked[row : row + self.size, column : column + self.size]
        return np.argwhere(~hit)

    def _seed(self, tail: np.ndarray, angle: float) -> Dash | None:
        """A first dash, or None where its head, or the pivot behind its tail, is not in the image."""
        start = int(tail[0]), int(tail[1])
        head = _moved(start, angle, self.rules.length)
        pivot = _moved(head, angle + np.pi, self.rules.length + self.margin)
        if min(*head, *pivot) < 0 or max(*head, *pivot) >= self.size:
            return None
        return Dash(start, angle, start, head)


class _Snake:
    """A curve that grows: a dash ends on a circle around a pivot, which lies a margin beyond the last one's head."""

    def __init__(self, pen: _Pen, seed: Dash):
        self.pen, self.dashes, self.angle = pen, [seed], seed.angle
        self.pivot = _moved((int(seed.head[0]), int(seed.head[1])), seed.angle + np.pi, pen.rules.length + pen.margin)

    def extend(self, random: np.random.Generator, mask: np.ndarray) -> bool:
        """Adds a dash, and the one before it to the mask; False where the way is blocked."""
        pen, rules = self.pen, self.pen.rules
        pivot = _moved(self.pivot, self.angle, rules.length + 2 * pen.margin)
        if self.angle not in pen.turns:
            apart = np.abs(pen.angles - self.angle)
            turn = np.minimum(np.minimum(apart, 2 * np.pi - apart) * rules.continuity, np.pi / 2)
            pen.turns[self.angle] = np.cos(turn) ** 2
        centre = (pivot[0] + pen.rim) * pen.width + pivot[1] + pen.rim
        chances = ((1 - mask.ravel()[pen.near + centre].max(1)) * pen.turns[self.angle]).cumsum()
        if chances[-1] < 1e-4:
            return False
        for _ in range(_DASH_TRIALS):
            which = int(chances.searchsorted(random.random() * chances[-1], "right"))
            angle = float(pen.angles[which])
            head = pivot[0] + int(pen.steps[which, 0]), pivot[1] + int(pen.steps[which, 1])
            backwards = angle + np.pi if angle < 0 else angle - np.pi
            if (pen._window(mask, head, pen.radius) + pen.stroke(backwards)[1]).max() < 1.8:
                break
        else:
            return False
        last = self.dashes[-1]
        pen.stamp(mask, last.start, pen.stroke(last.angle)[1])
        tail = head[0] - rules.length * np.sin(angle), head[1] - rules.length * np.cos(angle)
        self.dashes.append(Dash(head, backwards, tail, head))
        self.pivot, self.angle = pivot, angle
        return True


_pen = functools.lru_cache(_Pen)


def _random_angle(random: np.random.Generator) -> float:
    return float(np.deg2rad(random.integers(-180, 180)))


def _moved(point: tuple[int, int], angle: float, distance: float) -> tuple[int, int]:
    # Up to whole pixels, as upstream; the circle around a pivot is rounded down.
    return int(np.ceil(point[0] + distance * np.sin(angle))), int(np.ceil(point[1] + distance * np.cos(angle)))


def _disc(radius: int) -> np.ndarray:
    """The offsets ``[n, 2]`` within a radius."""
    grid = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1).T
    return grid[(grid**2).sum(1) <= radius**2]


def _flat(offsets: np.ndarray, width: int) -> np.ndarray:
    return offsets[:, 0] * width + offsets[:, 1]


def _stroke(rules: SnakeRules, margin: int, radius: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image, ImageDraw
    from scipy import ndimage

    centre = radius * _ANTIALIAS
    large = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    row, column = _moved((centre, centre), angle, rules.length * _ANTIALIAS)
    width = round(rules.thickness * _ANTIALIAS)
    ImageDraw.Draw(large).line([(centre, centre), (column, row)], fill=255, width=width)
    line = np.asarray(large)
    reach = margin * _ANTIALIAS
    structure = np.zeros((2 * reach + 1,) * 2, bool)
    structure[tuple((_disc(reach) + reach).T)] = True
    grown = ndimage.binary_dilation(line > 0, structure)
    return _reduced(line, 2 * radius + 1), _reduced(np.where(grown, 255, 0).astype(np.uint8), 2 * radius + 1)


def _marker(radius: float) -> np.ndarray:
    # The centre is the first of the pixels that the reduced one stands for, as upstream.
    half = int(np.ceil(radius + 3)) * _ANTIALIAS
    grid = np.mgrid[-half : half + _ANTIALIAS, -half : half + _ANTIALIAS]
    return np.where((grid**2).sum(0) <= (radius * _ANTIALIAS) ** 2, 255, 0).astype(np.uint8)


def _reduced(image: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    small = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32) / 255
