"""Text as bytes: Python's own library, or any file such as enwik8."""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Mapping

import numpy as np

from experiments.config import ConfigError, Count, Share
from experiments.data.dataset import SPLITS, Dataset


def python_text(length: Count = 1024) -> Dataset:
    """The sources of Python's standard library, without its tests and without repeated files.

    Split 8 : 1 : 1 by a hash of a file's path, so a file is never in two splits. The text depends on the Python
    version; the checksum in the provenance says which it was.
    """
    return _language(_python_sources(), length, f"standard library of Python {platform.python_version()}")


def _python_sources() -> dict[str, bytes]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    seen = set()
    paths: list[pathlib.Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - left_out)
        paths += [pathlib.Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(paths):
        name = path.relative_to(root)
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not content:
            continue
        seen.add(digest)
        tenth = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:8], "big") % 10
        parts["valid" if tenth == 0 else "test" if tenth == 1 else "train"].append(content)
    return {split: b"\n".join(contents) for split, contents in parts.items()}


def dictionary(length: Count = 512, lines: Count = 12, uses: Count = 20, gap: Count = 96) -> Dataset:
    """Documents with a header of lines ``name=value`` and, among Python sources, uses ``name:value`` of those names.

    Names have 3 random letters and values 4, and the bytes of the values of uses are asked for: 0 bits for a model that
    recalls, 4.7 each for one that does not. A value lies at least ``gap`` bytes after the last time that it was told,
    so that no narrower window sees it.
    """
    line, use = len("abc=wxyz\n"), len(" abc:wxyz ")
    free = length + 1 - lines * line - uses * use
    if free < 0 or lines * line < gap + line or lines * use < gap + line + use:
        raise ConfigError(
            f"data 'dictionary' needs lines of {line} bytes that reach beyond the gap and room for uses of {use}, got "
            f"length {length}, {lines} lines, {uses} uses and a gap of {gap}"
        )
    texts = {split: np.frombuffer(text, np.uint8) for split, text in _python_sources().items()}
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)

    def document(random: np.random.Generator, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        names = letters[np.stack(np.unravel_index(random.choice(26**3, lines, replace=False), (26, 26, 26)), 1)]
        values = random.choice(letters, (lines, 4))
        pieces = [np.concatenate([names[i], *_bytes("="), values[i], *_bytes("\n")]) for i in range(lines)]
        # Where the last byte of each value stands.
        told = np.arange(1, lines + 1) * line - 2
        start = random.integers(0, len(text) - free)
        place, asked = lines * line, np.zeros(length + 1, bool)
        for stretch in np.split(text[start : start + free], np.sort(random.integers(0, free + 1, uses))):
            pieces.append(stretch)
            place += len(stretch)
            if len(pieces) == lines + 2 * uses + 1:
                break
            i = random.choice(np.flatnonzero(place + 5 - told > gap))
            pieces.append(np.concatenate([*_bytes(" "), names[i], *_bytes(":"), values[i], *_bytes(" ")]))
            asked[place + 5 : place + 9] = True
            told[i], place = place + 8, place + use
        return np.concatenate(pieces), asked

    def draw(random: np.random.Generator, batch: int, split: str) -> dict[str, np.ndarray]:
        told, asked = (np.stack(x) for x in zip(*(document(random, texts[split]) for _ in range(batch)), strict=True))
        told = told.astype(np.int32)
        return {"tokens": told[:, :-1], "targets": np.where(asked, told, -1)[:, 1:]}

    oracles = {"a letter at random": 1 / 26}
    return Dataset("sequence", draw, num_classes=256, vocabulary=256, is_causal=True, oracles=oracles)


def _bytes(text: str) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8)]


def masked_text(length: Count = 256, share: Share = 0.15) -> Dataset:
    """The bytes of `python_text`, of which a share is hidden and asked for, each at random.

    Of those asked for, 8 of 10 become a separate token, one a random byte, and one stays (Devlin et al. 2019).
    """
    if not 0 < share < 1:
        raise ConfigError(f"data 'masked_text' needs a share between 0 and 1, got {share}")
    whole = python_text(length)

    def draw(random: np.random.Generator, batch: int, split: str) -> dict[str, np.ndarray]:
        tokens = whole.draw(random, batch, split)["tokens"]
        asked = random.random(tokens.shape) < share
        fate = random.random(tokens.shape)
        seen = np.where(fate < 0.8, 256, np.where(fate < 0.9, random.integers(0, 256, tokens.shape), tokens))
        targets = np.where(asked, tokens, -1).astype(np.int32)
        return {"tokens": np.where(asked, seen, tokens).astype(np.int32), "targets": targets}

    return dataclasses.replace(whole, draw=draw, vocabulary=257, is_causal=False)


def byte_file(path: str, length: Count = 1024) -> Dataset:
    """Any file as bytes, such as enwik8: the first 90 % to train, then 5 % and 5 %."""
    try:
        content = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"data 'byte_file': {path} cannot be read: {error.strerror}") from None
    first, second = len(content) * 90 // 100, len(content) * 95 // 100
    parts = content[:first], content[first:second], content[second:]
    return _language(dict(zip(SPLITS, parts, strict=True)), length, pathlib.Path(path).name)


def _language(texts: Mapping[str, bytes], length: Count, source: str) -> Dataset:
    """Random windows of a split, whose targets are the next bytes."""
    arrays = {split: np.frombuffer(text, np.uint8) for split, text in texts.items()}
    for split, array in arrays.items():
        if len(array) <= length:
            raise ConfigError(f"the {split} split of {source} has {len(array)} bytes, too few for a length of {length}")

    def draw(random: np.random.Generator, batch: int, split: str) -> dict[str, np.ndarray]:
        array = arrays[split]
        starts = random.integers(0, len(array) - length, batch)
        windows = np.stack([array[start : start + length + 1] for start in starts]).astype(np.int32)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}

    checksum = hashlib.sha256()
    for split in SPLITS:
        checksum.update(texts[split])
    provenance = {
        "source": source,
        "bytes": {split: len(array) for split, array in arrays.items()},
        "sha256": checksum.hexdigest(),
    }
    return Dataset("sequence", draw, num_classes=256, vocabulary=256, is_causal=True, provenance=provenance)
