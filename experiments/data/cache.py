"""Finite sets of generated examples, drawn once and kept on disk; what is read back is checked first.

`joblib.Memory` does not do this: it cannot hash the closures that draw, keeps no checksum, does not notice when a
function that the generator calls has changed, and unpickles what it finds.
"""

import hashlib
import json
import pathlib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from approx_attention.evaluation import write_atomically
from experiments.config import ConfigError
from experiments.data.dataset import Batch, Dataset

FOLDER = pathlib.Path(__file__).parents[2] / ".cache" / "data"

# Each block of examples has a seed of its own, so the first of them can be drawn again to check a file.
_BLOCK = 16


def finite(
    name: str,
    rule: Mapping[str, Any],
    draw: Callable[[np.random.Generator, int], Batch],
    counts: Mapping[str, int],
    seed: int,
    folder: str | None = None,
) -> dict[str, Batch]:
    """Examples for each split, all of them different, from a file if there is one that holds them.

    A file is used only if its checksum holds, it names these settings, and its first examples are those that ``draw``
    gives now; else it is written anew, with a warning.

    Args:
        name: the file's name begins with it.
        rule: the settings that the examples depend on.
        draw: draws a number of examples from a random generator.
        counts: the number of examples of each split.
        seed: of all splits together.
        folder: where the file is.

    Raises:
        ConfigError: a count is below one, there are too few different examples, or the folder cannot be written.
    """
    if min(counts.values()) < 1:
        raise ConfigError(f"data {name!r} needs at least one item in every split, got {dict(counts)}")
    settings = json.dumps({"name": name, "rule": dict(rule), "counts": dict(counts), "seed": seed}, sort_keys=True)
    place = pathlib.Path(folder).expanduser() if folder else FOLDER
    path = place / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npz"
    total = sum(counts.values())
    arrays = None
    if path.exists():
        try:
            arrays = _read(path, settings)
            _check_start(arrays, _distinct(name, draw, seed, min(total, _BLOCK)))
        except _Unfit as error:
            warnings.warn(f"{path} is not used and written anew: {error}", stacklevel=3)
            arrays = None
    if arrays is None:
        try:
            place.mkdir(parents=True, exist_ok=True)
            arrays = _distinct(name, draw, seed, total)
            content: dict[str, Any] = {
                **arrays,
                "settings": np.array(settings),
                "sha256": np.array(_checksum(arrays, settings)),
            }
            write_atomically(path, lambda file: np.savez_compressed(file, **content))
        except OSError as error:
            raise ConfigError(f"data {name!r}: the cache {place} cannot be written: {error.strerror}") from None
    parts, start = {}, 0
    # Held-out splits come first: more items to train on leave them as they are.
    for split in sorted(counts, key="train".__eq__):
        parts[split] = {field: array[start : start + counts[split]] for field, array in arrays.items()}
        start += counts[split]
    return parts


def dataset(parts: Mapping[str, Batch], **fields: Any) -> Dataset:
    """Data to classify, drawn from finite splits with replacement."""

    def draw(random: np.random.Generator, batch: int, split: str) -> Batch:
        chosen = random.integers(0, len(parts[split]["label"]), batch)
        return {field: array[chosen].astype(np.int32) for field, array in parts[split].items()}

    checksums = {split: _checksum(part, split) for split, part in parts.items()}
    provenance = {
        "source": "generated",
        "items": {split: len(part["label"]) for split, part in parts.items()},
        "sha256": checksums,
    }
    return Dataset("classify", draw, provenance=provenance, **fields)


class _Unfit(Exception):
    """Why a file cannot be used."""


def _distinct(name: str, draw: Callable[[np.random.Generator, int], Batch], seed: int, total: int) -> Batch:
    """The first ``total`` different examples of a seed; tokens are bytes."""
    seen: set[bytes] = set()
    kept: list[Batch] = []
    block = in_vain = 0
    while len(seen) < total:
        batch = draw(np.random.default_rng([seed, block]), _BLOCK)
        tokens = batch["tokens"] = batch["tokens"].astype(np.uint8)
        new = []
        for i in range(len(tokens)):
            key = tokens[i].tobytes()
            if key not in seen and len(seen) < total:
                seen.add(key)
                new.append(i)
        in_vain = 0 if new else in_vain + 1
        if in_vain > 100:
            raise ConfigError(f"data {name!r} has too few different items: {len(seen)} were found of {total}")
        kept.append({field: array[new] for field, array in batch.items()})
        block += 1
    return {field: np.concatenate([part[field] for part in kept]) for field in kept[0]}


def _read(path: pathlib.Path, settings: str) -> Batch:
    try:
        # Opened here, for np.load leaves a file open that is no archive.
        with path.open("rb") as raw, np.load(raw) as file:
            arrays = {name: file[name] for name in file.files}
        checksum, held = str(arrays.pop("sha256")), str(arrays.pop("settings"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _Unfit(f"it cannot be read ({error})") from None
    if held != settings:
        raise _Unfit("it was made with other settings")
    if checksum != _checksum(arrays, settings):
        raise _Unfit("its checksum is wrong")
    return arrays


def _check_start(arrays: Batch, start: Batch) -> None:
    for field, expected in start.items():
        if field not in arrays or not np.array_equal(arrays[field][: len(expected)], expected):
            raise _Unfit("the generator draws other examples now")


def _checksum(arrays: Batch, settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
