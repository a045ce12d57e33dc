"""The tensors that a comparison is made on, read from the user's file or from the sample shipped with the package."""

import importlib.resources
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from approx_attention.checks import InputError, did_you_mean


class Tensors(NamedTuple):
    """Query ``[B, T, N, D]``, key ``[B, S, K, D]`` and value ``[B, S, K, Dv]`` in float32."""

    query: Array
    key: Array
    value: Array


def load_tensors(path: str | os.PathLike[str], names: tuple[str, str, str] = ("q", "k", "v")) -> Tensors:
    """Reads q, k and v, each ``[T, D]``, ``[T, N, D]`` or ``[B, T, N, D]``, from an .npz or .safetensors file.

    Args:
        path: the file. Nothing in it is unpickled.
        names: the names of the three arrays in it.

    Returns:
        The `Tensors`.

    Raises:
        InputError: the file cannot be read, an array is missing or unfit, or holds a number that is not finite.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} is {'a directory' if path.is_dir() else 'not there'}; give an .npz or .safetensors file"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise InputError(f"{path} must end in .npz or .safetensors")
    arrays = readers[path.suffix](path, names)
    for name, x in zip(names, arrays, strict=True):
        if not 2 <= x.ndim <= 4:
            raise InputError(f"{name!r} in {path} must be [T, D], [T, N, D] or [B, T, N, D], got shape {list(x.shape)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"{name!r} in {path} must hold floating-point numbers, got dtype {x.dtype}")
        if 0 in x.shape:
            raise InputError(f"{name!r} in {path} is empty, of shape {list(x.shape)}")
    if len({x.ndim for x in arrays}) > 1:
        raise InputError(
            f"{', '.join(names)} in {path} must have one number of axes, got {[list(x.shape) for x in arrays]}"
        )
    with np.errstate(over="ignore"):
        query, key, value = (_with_all_axes(np.asarray(x, np.float32)) for x in arrays)
    _check_shapes(path, names, query, key, value)
    for name, x in zip(names, (query, key, value), strict=True):
        bad = np.argwhere(~np.isfinite(x))
        if len(bad):
            where = ", ".join(map(str, bad[0][-arrays[0].ndim :]))
            number = x[tuple(bad[0])]
            raise InputError(
                f"{name!r} in {path} has {len(bad)} numbers that are not finite in float32, "
                f"the first {number} at [{where}]"
            )
    return Tensors(*(jnp.asarray(x) for x in (query, key, value)))


def load_sample() -> Tensors:
    """The tensors that ship with the package; see sample.txt beside them for where they come from."""
    with importlib.resources.as_file(importlib.resources.files("approx_attention") / "sample.npz") as path:
        return load_tensors(path)


def _read_npz(path: pathlib.Path, names: Sequence[str]) -> list[np.ndarray]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file):
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                _require_names(path, names, archive.files)
                arrays = [archive[name] for name in names]
        for name, x in zip(names, arrays, strict=True):
            if not isinstance(x, np.ndarray):
                raise InputError(f"{name!r} in {path} is not an array that numpy saved")
        return arrays
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InputError(f"{path} is not a whole .npz archive: {error}") from error
    except ValueError as error:
        if "pickle" in str(error):
            raise InputError(f"{path} holds a pickled object, which is never loaded; save plain arrays") from error
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_safetensors(path: pathlib.Path, names: Sequence[str]) -> list[np.ndarray]:
    try:
        import safetensors
    except ImportError as error:
        raise InputError("reading .safetensors needs the package safetensors: pip install safetensors") from error
    try:
        with safetensors.safe_open(path, framework="flax") as archive:
            _require_names(path, names, archive.keys())
            tensors = [archive.get_tensor(name) for name in names]
        # numpy has no bfloat16
        return [np.asarray(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x) for x in tensors]
    except InputError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole .safetensors file: {error}") from error


def _require_names(path: pathlib.Path, names: Iterable[str], present: Iterable[str]) -> None:
    present = list(present)
    for name in names:
        if name not in present:
            holds = f"it holds {', '.join(map(repr, present[:12]))}" if present else "it holds nothing"
            raise InputError(
                f"{path} has no array {name!r}{did_you_mean(name, present)} ({holds}; name yours with --q, --k, --v)"
            )


def _with_all_axes(x: np.ndarray) -> np.ndarray:
    return x[None, :, None] if x.ndim == 2 else x[None] if x.ndim == 3 else x


def _check_shapes(
    path: pathlib.Path, names: Sequence[str], query: np.ndarray, key: np.ndarray, value: np.ndarray
) -> None:
    q, k, v = names
    shapes = f"; in {path} they are {list(query.shape)}, {list(key.shape)} and {list(value.shape)} as [B, T, N, D]"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise InputError(f"{q!r}, {k!r} and {v!r} must have one batch size{shapes}")
    if key.shape[1:3] != value.shape[1:3]:
        raise InputError(f"{k!r} and {v!r} must have the same tokens and heads{shapes}")
    if query.shape[3] != key.shape[3]:
        raise InputError(f"{q!r} and {k!r} must have one head dimension{shapes}")
    if query.shape[2] % key.shape[2]:
        raise InputError(f"the heads of {k!r} must divide those of {q!r}{shapes}")
