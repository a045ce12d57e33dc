"""Tasks of the Long Range Arena: labels by an independent reading, the rule's statistics, and the cache on disk."""

import itertools
import json
import warnings

import numpy as np
import pytest
from rich.console import Console

from experiments.config import ConfigError
from experiments.data import DataConfig, cache, load, lra
from experiments.harness import quality
from experiments.models import ModelConfig
from experiments.tables import tables
from experiments.training import OptimizerConfig, TrainingConfig

SMALL = {"least_length": 5, "greatest_length": 40, "max_depth": 4, "max_arguments": 3}
LEVELS = lra.CONTOUR_LENGTHS


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "data")


def listops(tmp_path, **settings):
    return load(DataConfig("listops", {**SMALL, "cache": str(tmp_path), **settings}))


def words_of(tokens, length):
    return [lra.LISTOPS_TOKENS[token] for token in tokens[:length]]


def evaluate(words):
    """The value of an expression by a stack of open brackets, or None for more or fewer than one expression."""
    stack = [[]]
    for word in words:
        if word in ("MIN", "MAX", "MED", "SM"):
            stack.append([word])
        elif word == "]":
            operator, *arguments = stack.pop()
            ordered, count = sorted(arguments), len(arguments)
            assert 2 <= count <= 3
            value = {
                "MIN": ordered[0],
                "MAX": ordered[-1],
                "MED": (ordered[(count - 1) // 2] + ordered[count // 2]) // 2,
                "SM": sum(arguments) % 10,
            }[operator]
            stack[-1].append(value)
        else:
            stack[-1].append(int(word))
    (result,) = stack
    return result[0] if len(result) == 1 else None


@pytest.mark.parametrize("settings", [{}, {"items": 50, "held_out_items": 20}])
def test_listops_labels_are_the_values(tmp_path, settings):
    dataset = listops(tmp_path, **settings)
    for split in ("train", "valid", "test"):
        batch = dataset.draw(np.random.default_rng(1), 100, split)
        for tokens, length, label in zip(batch["tokens"], batch["lengths"], batch["label"], strict=True):
            assert 5 < length < 40
            assert (tokens[length:] == lra.LISTOPS_TOKENS.index("pad")).all()
            assert evaluate(words_of(tokens, length)) == label
        assert batch["tokens"].dtype == np.int32


def test_listops_has_no_expression_twice(tmp_path):
    # Short enough that drawing them freely would repeat many.
    settings = {"least_length": 3, "greatest_length": 6, "max_depth": 2, "items": 300, "held_out_items": 100}
    listops(tmp_path, **settings)
    (path,) = tmp_path.glob("listops-*.npz")
    with np.load(path) as file:
        tokens = file["tokens"]
    assert tokens.shape == (500, 6)
    assert len(np.unique(tokens, axis=0)) == 500
    with pytest.raises(ConfigError, match="too few different items: 43.. were found of 5100"):
        listops(tmp_path, **{**settings, "items": 4900})


@pytest.mark.slow
def test_listops_oracles_are_scored_on_others_than_they_are_fitted_on():
    fitted = {"tokens": np.array([[10], [10], [11], [13]]), "label": np.array([2, 2, 9, 2])}
    scored = {"tokens": np.array([[10], [11], [11], [12]]), "label": np.array([2, 9, 2, 2])}
    assert lra.oracles(fitted, scored) == {"majority_class": 0.75, "first_operator": 0.75}


def test_listops_oracles_of_short_expressions():
    # Others of the same rule, fitted and scored on the same 4000: .124 and .257.
    oracles = load(DataConfig("listops")).oracles
    assert oracles["majority_class"] == pytest.approx(0.12, abs=0.025)
    assert oracles["first_operator"] == pytest.approx(0.245, abs=0.03)
    # Without end or finite, by one rule.
    finite = load(DataConfig("listops", {"items": 4000, "held_out_items": 4000})).oracles
    assert finite["first_operator"] == pytest.approx(oracles["first_operator"], abs=0.04)


@pytest.mark.slow
def test_listops_oracles_of_the_arena():
    settings = {"least_length": 500, "greatest_length": 2000, "max_depth": 10, "max_arguments": 10}
    dataset = load(DataConfig("listops", {**settings, "items": 8000, "held_out_items": 8000}))
    assert dataset.oracles["majority_class"] == pytest.approx(0.167, abs=0.02)
    assert dataset.oracles["first_operator"] == pytest.approx(0.364, abs=0.02)


def test_the_report_prints_oracles_beside_scores():
    def run(arm, oracles):
        error = {"method": {"mean": 0.1}, "mean_value": {"mean": 0.5}}
        result = {"test": {"bits": 3.0, "accuracy": 0.2}, "attention_error": error, "held_bytes": 10}
        return {"arm": arm, "result": {**result, "training_seconds": 1.0, **oracles}}

    oracles = {"oracles": {"first_operator": 0.364}}
    (table,) = tables("quality", [run("exact", oracles), run("favor", oracles)])
    assert [line.split("|")[3].strip() for line in table.splitlines() if "oracle: first operator" in line] == ["0.364"]
    (table,) = tables("quality", [run("exact", {})])
    assert "oracle" not in table


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("listops", {"max_depth": 1}, "no expression is longer than 20"),
        ("listops", {"items": 0}, "at least one item"),
        ("pathfinder", {"size": 48}, "size must be one of 32, 64, 128, 256, got 48"),
        ("pathfinder", {"level": "hrad"}, "did you mean 'hard'"),
    ],
)
def test_unfit_settings_are_one_clear_line(name, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(DataConfig(name, settings))
    assert "\n" not in str(error.value)


def test_an_unwritable_cache_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        load(DataConfig("listops", {"cache": str(tmp_path / "file" / "below")}))


@pytest.fixture(scope="module")
def scenes():
    random = np.random.default_rng(0)
    return {level: [lra.draw_snakes(random, 32, LEVELS[level]) for _ in range(150)] for level in ("easy", "hard")}


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_pathfinder_curves_follow_the_rule(size):
    rules = lra.SNAKE_RULES[size]
    random = np.random.default_rng(1)
    for _ in range(2):
        scene = lra.draw_snakes(random, size, 6)
        assert [len(curve) for curve in scene.curves] == [6, 6]
        assert len(scene.distractors) <= rules.distractor_dashes // 2
        assert all(len(curve) == 2 for curve in scene.distractors)
        first, second = (np.array(curve[0].tail) for curve in scene.curves)
        assert abs(np.linalg.norm(first - second) - rules.seed_distance) < 1
        for curve in (*scene.curves, *scene.distractors):
            for before, after in itertools.pairwise(curve):
                # The gap is a margin on either side of a pivot, up to the rounding of that and of the ends.
                gap = np.linalg.norm(np.array(after.tail) - np.array(before.head))
                assert gap < 2 * max(rules.margins) + 3.5
                directions = [np.subtract(dash.head, dash.tail) for dash in (before, after)]
                turn = directions[0] @ directions[1] / np.prod([np.linalg.norm(d) for d in directions])
                # The pivot's own rounding turns the first dash a little.
                assert np.arccos(np.clip(turn, -1, 1)) < np.pi / 2 / rules.continuity + 0.5


def test_pathfinder_labels_say_whether_the_marked_ends_share_a_curve(scenes):
    undecided = 0
    for scene in scenes["easy"] + scenes["hard"]:
        first, last = scene.markers
        for row, column in scene.markers:
            assert scene.image[row - 1 : row + 2, column - 1 : column + 2].max() > 100
        # By following each curve from the marked start, dash by dash.
        (start,) = [curve for curve in scene.curves if curve[0].tail == first]
        (other,) = [curve for curve in scene.curves if curve is not start]
        assert last in (start[-1].head, other[-1].head)
        if start[-1].head == other[-1].head:
            undecided += 1
        else:
            assert scene.label == (start[-1].head == last)
    assert undecided < 10


def test_pathfinder_images_show_what_was_drawn(scenes):
    grid = np.mgrid[0:32, 0:32].transpose(1, 2, 0)
    for scene in scenes["easy"][:30]:
        distance = np.full((32, 32), np.inf)
        for dash in (dash for curve in (*scene.curves, *scene.distractors) for dash in curve):
            along = np.linspace(0, 1, 20)[:, None]
            points = (1 - along) * np.array(dash.tail) + along * np.array(dash.head)
            distance = np.minimum(distance, np.linalg.norm(grid[:, :, None] - points, axis=-1).min(-1))
        for marker in scene.markers:
            distance = np.minimum(distance, np.maximum(np.linalg.norm(grid - marker, axis=-1) - 1.5, 0))
        assert (scene.image[distance > 2.5] < 30).all()
        assert scene.image[distance < 0.3].min() > 30
        assert scene.image.max() == 255


def test_pathfinder_labels_are_balanced_and_say_nothing_by_brightness(scenes):
    together = scenes["easy"] + scenes["hard"]
    assert np.mean([scene.label for scene in together]) == pytest.approx(0.5, abs=0.1)
    means = [np.mean([s.image.mean() for s in scenes["hard"] if s.label == label]) for label in (0, 1)]
    assert means[0] == pytest.approx(means[1], rel=0.06)


# Mean intensity and share of pixels above .05: first of the published generator run with these settings (80 easy
# images, 40 hard), then as they were reported of other samples of it.
@pytest.mark.parametrize(
    ("level", "measured", "reported"),
    [("easy", (0.0503, 0.0973), (0.045, 0.085)), ("hard", (0.0793, 0.1585), (0.073, 0.14))],
)
def test_pathfinder_statistics_are_those_of_the_published_generator(scenes, level, measured, reported):
    images = np.stack([scene.image for scene in scenes[level]]) / 255
    found = images.mean(), (images > 0.05).mean()
    np.testing.assert_allclose(found, measured, rtol=0.05)
    np.testing.assert_allclose(found, reported, rtol=0.2)


@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_finite_data_are_a_function_of_the_seed_and_their_splits_are_disjoint(tmp_path, name):
    rule = SMALL if name == "listops" else {"level": "easy"}

    def parts(folder, seed):
        settings = {**rule, "items": 40, "held_out_items": 20, "seed": seed, "cache": str(tmp_path / folder)}
        dataset = load(DataConfig(name, settings))
        assert dataset.provenance["items"] == {"train": 40, "valid": 20, "test": 20}
        drawn = {}
        for split in ("train", "valid", "test"):
            batch = dataset.draw(np.random.default_rng(0), 400, split)
            drawn[split] = {row.tobytes() for row in batch["tokens"]}
        return drawn, dataset.provenance["sha256"]

    (first, checksum), (again, same), (kept, cached) = parts("a", 0), parts("b", 0), parts("a", 0)
    other, different = parts("a", 1)
    assert first == again == kept != other
    assert checksum == same == cached != different
    assert {split: len(rows) for split, rows in first.items()} == {"train": 40, "valid": 20, "test": 20}
    assert not first["train"] & first["valid"]
    assert not first["train"] & first["test"]
    assert not first["valid"] & first["test"]


def test_held_out_items_do_not_depend_on_how_many_there_are_to_train_on(tmp_path):
    few, many = (listops(tmp_path, items=items, held_out_items=20).provenance["sha256"] for items in (10, 60))
    assert few["test"] == many["test"]
    assert few["train"] != many["train"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def altered(path):
    with np.load(path) as file:
        arrays = dict(file)
    arrays["label"][-1] ^= 1
    np.savez_compressed(path, **arrays)


def stale(path):
    """As another version of the generator would have left it: consistent, but with other examples."""
    with np.load(path) as file:
        arrays = dict(file)
    settings = str(arrays.pop("settings"))
    del arrays["sha256"]
    arrays["label"][0] ^= 1
    np.savez_compressed(path, **arrays, settings=settings, sha256=cache._checksum(arrays, settings))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_text("no archive"), "cannot be read"),
        (altered, "its checksum is wrong"),
        (stale, "draws other examples now"),
        (lambda path: np.savez(path, tokens=np.zeros(3)), "cannot be read"),
    ],
)
def test_damaged_caches_are_written_anew(tmp_path, harm, message):
    before = listops(tmp_path, items=50, held_out_items=20).provenance
    (path,) = tmp_path.glob("listops-*.npz")
    harm(path)
    with pytest.warns(UserWarning, match=message):
        after = listops(tmp_path, items=50, held_out_items=20).provenance
    assert before == after
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listops(tmp_path, items=50, held_out_items=20)
    assert [entry.name for entry in tmp_path.glob("*listops*")] == [path.name]
    json.dumps(after)


@pytest.mark.usefixtures("models")
def test_results_carry_the_oracles(tmp_path):
    model = ModelConfig(num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, hidden_dim=8)
    steps = OptimizerConfig(steps=1, batch=2, evaluation_batches=1)
    config = TrainingConfig(DataConfig("listops", {**SMALL, "items": 50, "held_out_items": 20}), steps, model)
    result = quality.run(config, tmp_path / "run", Console())
    assert result["oracles"].keys() == {"majority_class", "first_operator"}
    assert result["data"]["items"] == {"train": 50, "valid": 20, "test": 20}
