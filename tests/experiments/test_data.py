"""The data of the experiments: generated, and read from users' files."""

import re

import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.data import DataConfig, load, text

pytestmark = pytest.mark.usefixtures("models")


GENERATED = [
    "digits",
    "segments",
    "copying",
    "retrieval",
    "match_xor",
    "composition",
]


@pytest.mark.parametrize("name", GENERATED)
def test_data_is_a_function_of_the_generator_and_the_split(name):
    dataset = load(DataConfig(name))
    first, again, other = (dataset.draw(np.random.default_rng(0), 4, split) for split in ("train", "train", "test"))
    for field in first:
        np.testing.assert_array_equal(first[field], again[field])
    assert any(not np.array_equal(first[field], other[field]) for field in first)
    targets = first.get("targets", first.get("label"))
    assert -1 <= targets.min() <= targets.max() < dataset.num_classes


def test_segments_tell_their_pair_and_queries_ask_for_each_key_once():
    pairs, width, values, spellings = 5, 3, 7, 2
    settings = {"pairs": pairs, "width": width, "values": values, "spellings": spellings}
    batch = load(DataConfig("segments", settings)).draw(np.random.default_rng(0), 16, "train")
    lengths = set()
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        told = tokens[:-pairs]
        told = told[np.flatnonzero(told)[0] : np.flatnonzero(told)[-1] + 1]
        key, value = np.divmod((told - 1) // spellings, values)
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        assert len(starts) == pairs
        assert len(told) == pairs * width
        lengths |= set(np.diff(starts, append=len(told)))
        asked = tokens[-pairs:] - 1 - pairs * values * spellings
        assert sorted(asked) == list(range(pairs))
        known = dict(zip(key, value, strict=True))
        assert [known[key] for key in asked] == list(targets[-pairs:])
        assert all(known[k] == v for k, v in zip(key, value, strict=True))
        assert np.all(targets[:-pairs] == -1)
    assert lengths == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("task", ["needle", "needles", "key_value", "variables"])
def test_questions_are_answered_by_following_the_statements_of_the_context(task):
    settings = {"task": task, "length": 24, "questions": 3, "names": 12, "values": 5, "noise": 4, "needles": 3}
    dataset = load(DataConfig("retrieval", settings | {"chains": 3, "hops": 3}))
    batch = dataset.draw(np.random.default_rng(0), 8, "train")
    first_name, first_value = 1 + 4, 1 + 4 + 12
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        context, questions = tokens[: dataset.context].reshape(-1, 2), tokens[dataset.context :].reshape(-1, 3)
        stated: dict[int, int] = {}
        for name, source in context:
            if name >= first_name:
                assert name not in stated
                assert source >= first_value or source in stated  # a name refers to a value or to a name stated before
                stated[name] = source
        assert len(stated) == {"needle": 1, "needles": 3, "key_value": 12, "variables": 9}[task]
        for mark, name, answer in questions:
            hops = 0
            while name < first_value:
                name, hops = stated[name], hops + 1
            assert (mark, name, hops) == (0, answer, 3 if task == "variables" else 1)
        assert len(set(questions[:, 1])) == (1 if task == "needle" else 3)
        np.testing.assert_array_equal(targets[targets >= 0], questions[:, 2])
        np.testing.assert_array_equal(tokens[np.flatnonzero(targets >= 0) + 1], questions[:, 2])


def test_bits_match_in_triples_and_in_pairs():
    triples, pairs = (
        load(DataConfig("match_xor", {"order": order, "length": 7, "bits": 3})).draw(
            np.random.default_rng(0), 40, "train"
        )
        for order in (3, 2)
    )
    places = range(7)
    for tokens, targets in zip(triples["tokens"], triples["targets"], strict=True):
        for i in places:
            others = [tokens[j] ^ tokens[k] for j in places for k in places if len({i, j, k}) == 3]
            assert targets[i] == (tokens[i] in others)
    for tokens, targets in zip(pairs["tokens"], pairs["targets"], strict=True):
        assert [7 - x in tokens for x in tokens] == targets.astype(bool).tolist()
    for batch in (triples, pairs):
        assert 0 < batch["targets"].mean() < 1


def test_masked_digits_hide_a_quarter_of_the_pixels_and_ask_for_their_levels():
    dataset = load(DataConfig("masked_digits", {"share": 0.25}))
    batch = dataset.draw(np.random.default_rng(0), 200, "test")
    hidden = batch["tokens"] == 17
    np.testing.assert_array_equal(hidden, batch["targets"] >= 0)
    assert abs(hidden.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / hidden.size)
    levels = np.where(hidden, batch["targets"], batch["tokens"])
    assert set(np.unique(levels)) == set(range(17))
    pixels = load(DataConfig("digits")).draw(np.random.default_rng(1), 4000, "test")["image"]
    known = {image.tobytes() for image in np.rint(16 * pixels).astype(np.int32)}
    # The pixels are in one other order for all examples.
    images = levels.astype(np.int32)[:, np.argsort(np.random.default_rng(0).permutation(64))]
    assert all(image.tobytes() in known for image in images)
    assert not any(image.tobytes() in known for image in levels.astype(np.int32))
    (share,) = dataset.oracles.values()
    assert 0.3 < share < 0.6  # two fifths of the pixels are blank at the edges


def test_masked_digits_of_several_digits_mix_their_pixels():
    batch = load(DataConfig("masked_digits", {"count": 3})).draw(np.random.default_rng(0), 100, "test")
    levels = np.where(batch["tokens"] == 17, batch["targets"], batch["tokens"]).astype(np.int32)
    pixels = load(DataConfig("digits")).draw(np.random.default_rng(1), 4000, "test")["image"]
    known = {image.tobytes() for image in np.rint(16 * pixels).astype(np.int32)}
    order = np.random.default_rng(0).permutation(3 * 64)
    digits = levels[:, np.argsort(order)].reshape(-1, 64)
    assert all(digit.tobytes() in known for digit in digits)
    # The digits of an image are drawn one by one, and each part of it holds pixels of all.
    assert np.mean([len({x.tobytes() for x in digits[i : i + 3]}) for i in range(0, 300, 3)]) > 2.9
    assert all(set(part // 64) == {0, 1, 2} for part in np.split(order, 8))


def test_dictionary_documents_ask_for_values_that_no_window_sees():
    gap = 50
    settings = {"length": 220, "lines": 8, "uses": 9, "gap": gap}
    batch = load(DataConfig("dictionary", settings)).draw(np.random.default_rng(0), 40, "test")
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        document = bytes(tokens.astype(np.uint8))
        header = dict(line.split(b"=") for line in document[:72].splitlines())
        assert len(header) == 8
        told = {name: document.index(name + b"=") + 7 for name in header}
        starts = np.flatnonzero((targets >= 0) & (np.roll(targets, 1) < 0))
        assert len(starts) == 9
        for start in starts:  # the target at a position is the next byte
            name, colon, value = document[start - 3 : start], document[start : start + 1], targets[start : start + 4]
            assert colon == b":"
            assert header[name] == bytes(value.astype(np.uint8))
            assert start + 1 - told[name] > gap
            told[name] = start + 4
        np.testing.assert_array_equal(targets[:-1][targets[:-1] >= 0], tokens[1:][targets[:-1] >= 0])
    with pytest.raises(ConfigError, match="room for uses"):
        load(DataConfig("dictionary", {"length": 128}))


def test_marks_repeat_the_colour_of_the_digit_that_is_the_label():
    batch = load(DataConfig("marked_digits")).draw(np.random.default_rng(0), 100, "train")
    digits = load(DataConfig("digits")).draw(np.random.default_rng(1), 20_000, "train")
    known = {image.tobytes(): label for image, label in zip(digits["image"][..., 0], digits["label"], strict=True)}
    middle = np.pad(np.ones((4, 4), bool), 2)
    for scene, label in zip(batch["image"], batch["label"], strict=True):
        cells = scene.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, 8, 8, 3)
        colours = cells.max((1, 2)) > 0
        drawn = np.flatnonzero(colours.any(-1))
        (mark,) = (i for i in drawn if np.array_equal(cells[i], middle[..., None] * colours[i]))
        digit_cells = [i for i in drawn if i != mark]
        assert len(digit_cells) == 4
        # Each cell is a grey image times its colour.
        assert all(np.array_equal(cells[i], cells[i].max(-1)[..., None] * colours[i]) for i in digit_cells)
        (asked,) = (i for i in digit_cells if np.array_equal(colours[i], colours[mark]))
        assert known[cells[asked].max(-1).tobytes()] == label


def test_compositions_follow_two_permutations_whose_first_tells_nothing_of_the_result():
    bits = 3
    size = 2**bits
    batch = load(DataConfig("composition", {"bits": bits})).draw(np.random.default_rng(0), 400, "train")
    assert np.all(batch["targets"][:, : 2 * size] == -1)
    counts = np.zeros((size, size))
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        kinds, second, first = tokens >> 2 * bits, (tokens >> bits) % size, tokens % size
        maps = [dict(zip(first[kinds == kind], second[kinds == kind], strict=True)) for kind in (1, 2)]
        assert all(sorted(some) == sorted(some.values()) == list(range(size)) for some in maps)
        asked = first[kinds == 3]
        assert [maps[1][maps[0][x]] for x in asked] == targets[2 * size :].tolist()
        counts[[maps[0][x] for x in asked], targets[2 * size :]] += 1
    # Each cell counts about 400 / size; a chi-squared with (size - 1)^2 degrees of freedom is 49 +- 10.
    assert ((counts - 400 / size) ** 2 / (400 / size)).sum() < 100


def test_a_missing_path_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"'byte_file'.*/nowhere") as error:
        load(DataConfig("byte_file", {"path": "/nowhere"}))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="needs the setting 'path'"):
        load(DataConfig("byte_file"))


def test_python_text_is_split_by_file_without_repeats(tmp_path, monkeypatch):
    for number in range(40):
        (tmp_path / f"module{number}.py").write_text(f"value = {number:04d}  # {'x' * 40}\n")
    (tmp_path / "again.py").write_text((tmp_path / "module0.py").read_text())
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("y" * 1000)
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    dataset = load(DataConfig("python_text", {"length": 16}))
    held = dataset.provenance["bytes"]
    # Each file occurs once, with a newline between the files of a split.
    assert sum(held.values()) == 40 * len((tmp_path / "module0.py").read_bytes()) + 40 - 3
    assert all(held.values())
    seen = {}
    for split in ("train", "valid", "test"):
        windows = dataset.draw(np.random.default_rng(0), 400, split)
        np.testing.assert_array_equal(windows["tokens"][:, 1:], windows["targets"][:, :-1])
        lines = b"|".join(bytes(row) for row in windows["tokens"].astype(np.uint8))
        seen[split] = set(re.findall(rb"value = (\d{4})", lines))
        assert seen[split]
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["valid"]


def test_a_file_of_the_user_is_read(tmp_path):
    (tmp_path / "enwik8").write_bytes(bytes(range(200)) * 10)
    settings = {"path": str(tmp_path / "enwik8"), "length": 8}
    batch = load(DataConfig("byte_file", settings)).draw(np.random.default_rng(0), 2, "test")
    np.testing.assert_array_equal((batch["tokens"] + 1) % 200, batch["targets"])
    with pytest.raises(ConfigError, match="too few for a length of 4096"):
        load(DataConfig("byte_file", {**settings, "length": 4096}))
