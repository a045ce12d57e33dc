"""The tensors that a comparison is made on, read from the user's file or from the sample shipped with the package."""

import contextlib
import fnmatch
import importlib.resources
import json
import math
import os
import pathlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from approx_attention.core import InputError, did_you_mean
from approx_attention.evaluation.atomic import write_atomically
from approx_attention.evaluation.real_tokens import key_mask, query_mask

# What may stand between the name of a layer and that of its array.
SEPARATORS = "./_"
# A byte that zip has deflated is at most this many.
_LARGEST_DEFLATION = 1032
_SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    **{f"{sign}{8 * size}": np.dtype(f"{sign.lower()}{size}") for sign in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.bool_,
}


class Tensors(NamedTuple):
    """Query ``[B, T, N, D]``, key ``[B, S, K, D]`` and value ``[B, S, K, Dv]`` in float32."""

    query: Array
    key: Array
    value: Array


class Layer(NamedTuple):
    """The tensors of a layer, and how its model attends to them, where the file says so.

    Attributes:
        tensors: query, key and value.
        kv_mask: which keys ``[B, S]`` are real, if some are padding.
        is_causal: whether query t sees keys j <= t only; None where the file does not say.
        scale: factor of the logits, if it is another than ``1/sqrt(D)``.
    """

    tensors: Tensors
    kv_mask: np.ndarray | None
    is_causal: bool | None = None
    scale: float | None = None


def load_tensors(path: str | os.PathLike[str], names: tuple[str, str, str] = ("q", "k", "v")) -> Tensors:
    """Read q, k and v, each ``[T, D]``, ``[T, N, D]`` or ``[B, T, N, D]``, from an .npz or .safetensors file.

    Args:
        path: the file. Nothing in it is unpickled, and nothing larger than the file or the memory allocated.
        names: the names of the three arrays in it.

    Returns:
        The `Tensors`.

    Raises:
        InputError: the file cannot be read, an array is missing or unfit, or holds a number that is not finite.
    """
    return load_layers(path, names)[""].tensors


def load_layers(
    path: str | os.PathLike[str],
    names: tuple[str, str, str] = ("q", "k", "v"),
    *,
    layers: str | None = None,
    lengths: str | None = None,
    mask: str | None = None,
) -> dict[str, Layer]:
    """Read q, k and v of one layer or several, with the lengths or the mask that say what is padding.

    The arrays of a layer are named after it: ``layer0.q``, ``layer0/q`` or ``layer0_q``, at any depth. What
    `nnx.capture_attention` has written of a layer in addition (``is_causal``, ``scale``, ``mask``) is read too.

    Args:
        path: the file, as for `load_tensors`.
        names: the names of the three arrays in it, or in each layer.
        layers: a pattern of the layers' names in which ``*``, ``?`` and ``[...]`` are as in a shell.
        lengths: name of the integers ``[B]`` of real tokens, in each layer or for all.
        mask: name of the boolean array ``[B, S]`` that is true where a key is real, in each layer or for all.

    Returns:
        A `Layer` by name, in the order of the numbers in the names; without ``layers`` one, called "".

    Raises:
        InputError: the file cannot be read, no layer fits the pattern, an array is missing or unfit, or holds a number
            that is not finite and no padding.
    """
    path = pathlib.Path(path)
    archive = _open(path)
    prefixes = {"": ""} if layers is None else _prefixes(path, archive.names, layers, names)
    return {layer: _layer(path, archive, prefix, names, lengths, mask) for layer, prefix in prefixes.items()}


def save_layers(path: str | os.PathLike[str], layers: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write the arrays of layers, ``q``, ``k``, ``v`` and others, to an .npz file that `load_layers` reads.

    Args:
        path: the file; it is whole or absent.
        layers: arrays by their names, by the name of the layer; "" for one without a name.

    Raises:
        InputError: the name of the file does not end in .npz, or its directory is not there.
    """
    path = pathlib.Path(path)
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise InputError(f"{path} must end in .npz and lie in a directory that is there")
    arrays: dict[str, Any] = {
        f"{layer}.{name}" if layer else name: x for layer, own in layers.items() for name, x in own.items()
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def load_sample() -> Tensors:
    """The tensors that ship with the package; see data/sample.txt for where they come from."""
    with importlib.resources.as_file(importlib.resources.files("approx_attention") / "data" / "sample.npz") as path:
        return load_tensors(path)


def sample_layers() -> dict[str, Layer]:
    """The sample as the two layers of which it has a sequence each: the one with the least entropy, and the most."""
    sample = load_sample()
    return {
        name: Layer(Tensors(*(x[i : i + 1] for x in sample)), None, True) for i, name in enumerate(("sharp", "flat"))
    }


def _prefixes(path: pathlib.Path, present: Sequence[str], pattern: str, names: Sequence[str]) -> dict[str, str]:
    """What the names of arrays begin with, by layer."""
    found: dict[str, str] = {}
    partial: dict[str, str] = {}
    for separator in SEPARATORS:
        for name in names:
            for array in present:
                layer = array.removesuffix(separator + name)
                if layer not in ("", array):
                    missing = [x for own in names if (x := layer + separator + own) not in present]
                    if not missing:
                        found.setdefault(layer, layer + separator)
                    elif len(missing) < len(names) - 1:
                        partial[layer] = missing[0]
    chosen = [layer for layer in found if _fits(layer, pattern)]
    for layer, missing in partial.items():
        # Others than q, k and v may end like them, as layer0.rope_q and layer0.rope_k do.
        if _fits(layer, pattern) and layer not in found and not any(map(layer.startswith, found.values())):
            raise InputError(f"{path} has no array {missing!r}, without which {layer!r} is no layer")
    if not chosen:
        has = f"its layers are {_listed(sorted(found, key=_by_number))}" if found else _holds(present)
        raise InputError(f"{path} has no layer {pattern!r} with arrays such as {'layer0.' + names[0]!r} ({has})")
    return {layer: found[layer] for layer in sorted(chosen, key=_by_number)}


def _fits(layer: str, pattern: str) -> bool:
    return layer == pattern or fnmatch.fnmatchcase(layer, pattern)


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """Sort layer2 before layer10."""
    parts = re.split(r"(\d+)", name)
    return [(0, len(part.lstrip("0")), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _layer(
    path: pathlib.Path,
    archive: "_Archive",
    prefix: str,
    names: Sequence[str],
    lengths: str | None,
    mask: str | None,
) -> Layer:
    names = [prefix + name for name in names]
    advice = "name yours with --q, --k, --v" if archive.names else "save arrays in it"
    if not prefix and any(name.endswith(separator + names[0]) for name in archive.names for separator in SEPARATORS):
        advice += ", or several layers with --layers"
    for name in names:
        _require(path, name, archive.names, advice)
    arrays = [archive.read(name) for name in names]
    for name, x in zip(names, arrays, strict=True):
        if not 2 <= x.ndim <= 4:
            raise InputError(f"{name!r} in {path} must be [T, D], [T, N, D] or [B, T, N, D], got shape {list(x.shape)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            unnamed = (
                "; numpy files do not name bfloat16 and float8, .safetensors files do" if x.dtype.kind == "V" else ""
            )
            raise InputError(f"{name!r} in {path} must hold floating-point numbers, got dtype {x.dtype}{unnamed}")
        if 0 in x.shape:
            raise InputError(f"{name!r} in {path} is empty, of shape {list(x.shape)}")
    if len({x.ndim for x in arrays}) > 1:
        raise InputError(
            f"{', '.join(names)} in {path} must have one number of axes, got {[list(x.shape) for x in arrays]}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        query, key, value = (_with_all_axes(np.asarray(x, np.float32)) for x in arrays)
    _check_shapes(path, names, query, key, value)
    is_captured = prefix + "is_causal" in archive.names
    if is_captured and lengths is None and mask is None and prefix + "mask" in archive.names:
        mask = "mask"
    kv_mask = _padding(path, archive, prefix, key.shape, lengths, mask)
    real = (query_mask(kv_mask, query.shape[1]), kv_mask, kv_mask)
    for name, x, rows in zip(names, (query, key, value), real, strict=True):
        bad = np.argwhere(~np.isfinite(x) if rows is None else ~np.isfinite(x) & rows[:, :, None, None])
        if len(bad):
            where = ", ".join(map(str, bad[0][-arrays[0].ndim :] if arrays[0].ndim > 2 else bad[0][[1, 3]]))
            number = x[tuple(bad[0])]
            raise InputError(
                f"{name!r} in {path} has {len(bad)} numbers that are not finite in float32, "
                f"the first {number} at [{where}]"
            )
    is_causal = bool(_one(path, archive, prefix + "is_causal", "b")) if is_captured else None
    scale = (
        float(_one(path, archive, prefix + "scale", "f")) if is_captured and prefix + "scale" in archive.names else None
    )
    return Layer(Tensors(*(jnp.asarray(x) for x in (query, key, value))), kv_mask, is_causal, scale)


def _one(path: pathlib.Path, archive: "_Archive", name: str, kind: str) -> Any:
    """A boolean or a positive number."""
    x = archive.read(name)
    if x.shape or x.dtype.kind != kind or (kind == "f" and not 0 < float(x) < math.inf):
        wanted = {"b": "true or false", "f": "a positive number"}[kind]
        raise InputError(f"{name!r} in {path} must be {wanted}, got shape {list(x.shape)} of {x.dtype}")
    return x


def _padding(
    path: pathlib.Path,
    archive: "_Archive",
    prefix: str,
    key_shape: Sequence[int],
    lengths: str | None,
    mask: str | None,
) -> np.ndarray | None:
    given = {}
    for argument, name in (("lengths", lengths), ("mask", mask)):
        if name is not None:
            own = prefix + name if prefix + name in archive.names else name
            _require(path, own, archive.names, f"name yours with --{argument}")
            given[argument] = (own, archive.read(own))
    try:
        return key_mask(key_shape, **{argument: x for argument, (_, x) in given.items()})
    except InputError as error:
        shown = " and ".join(repr(own) for own, _ in given.values())
        raise InputError(f"{shown} in {path}: {error}") from None


def _require(path: pathlib.Path, name: str, present: Sequence[str], advice: str) -> None:
    if name not in present:
        raise InputError(f"{path} has no array {name!r}{did_you_mean(name, present)} ({_holds(present)}; {advice})")


def _holds(present: Sequence[str]) -> str:
    return f"it holds {_listed(present)}" if present else "it holds nothing"


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


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


# Files may be damaged, or made to harm: what a header declares is held against the file before anything is allocated.


class _Archive(Protocol):
    names: list[str]

    def read(self, name: str) -> np.ndarray:
        """The array of that name."""
        ...


def _open(path: pathlib.Path) -> _Archive:
    kinds = {".npz": _Npz, ".safetensors": _Safetensors}
    try:
        if not path.is_file():
            state = "a directory" if path.is_dir() else "no regular file" if path.exists() else "not there"
            raise InputError(f"{path} is {state}; give an .npz or .safetensors file")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")
        if path.suffix not in kinds:
            raise InputError(f"{path} must end in .npz or .safetensors")
        return kinds[path.suffix](path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[None]:
    """What a damaged file raises, in one line."""
    try:
        yield
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except MemoryError:
        raise InputError(f"{path} takes more memory than there is") from None
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
        *(ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError, SyntaxError),
    ) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(f"{path} is not a whole {path.suffix} file: {said}") from error


class _Npz:
    def __init__(self, path: pathlib.Path):
        self.path = path
        with _whole(path), zipfile.ZipFile(path) as archive:
            # As numpy.load names them; the last of a name counts.
            self.members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        self.names = list(self.members)

    def read(self, name: str) -> np.ndarray:
        member = self.members[name]
        with _whole(self.path), zipfile.ZipFile(self.path) as archive:
            packed = min(member.compress_size, self.path.stat().st_size)
            most = packed * (_LARGEST_DEFLATION if member.compress_type == zipfile.ZIP_DEFLATED else 1)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name!r} is compressed in a way that numpy does not use")
            if member.file_size > most:
                raise ValueError(f"{name!r} declares {member.file_size} bytes, which {packed} cannot hold")
            _check_room(self.path, name, member.file_size)
            with archive.open(member) as file:
                return self._array(name, member.file_size, file)

    def _array(self, name: str, num_bytes: int, file: Any) -> np.ndarray:
        try:
            version = np.lib.format.read_magic(file)
        except ValueError:
            raise InputError(f"{name!r} in {self.path} is not an array that numpy saved") from None
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise InputError(f"{name!r} in {self.path} has fields, or a format of numpy that is not known")
        try:
            shape, is_fortran, dtype = readers[version](file)
        except Exception as error:  # a tokenizer and a parser are behind it
            raise ValueError(f"the header of {name!r} is damaged ({type(error).__name__})") from error
        if dtype.hasobject:
            raise InputError(f"{self.path} holds a pickled object, which is never loaded; save plain arrays")
        declared = _num_bytes(shape, dtype)
        if declared > num_bytes:
            raise ValueError(f"{name!r} declares shape {list(shape)} of {dtype}, {declared} bytes, and has {num_bytes}")
        data = file.read(declared)
        if len(data) < declared:
            raise ValueError(f"{name!r} ends early")
        file.read()  # to the end, where the checksum is tested
        return np.ndarray(shape, dtype, data, order="F" if is_fortran else "C")


class _Safetensors:
    """Eight bytes of length, a JSON header with dtype, shape and place of each array, and the arrays."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        with _whole(path), path.open("rb") as file:
            size = path.stat().st_size
            self.header = _safetensors_header(file, size)
        self.names = list(self.header)

    def read(self, name: str) -> np.ndarray:
        with _whole(self.path):
            dtype_name, shape, start, num_bytes = self.header[name]
            if dtype_name not in _SAFETENSORS_DTYPES:
                readable = ", ".join(_SAFETENSORS_DTYPES)
                raise InputError(f"{name!r} in {self.path} is of dtype {dtype_name}; those read are {readable}")
            dtype = np.dtype(_SAFETENSORS_DTYPES[dtype_name])
            if _num_bytes(shape, dtype) != num_bytes:
                raise ValueError(f"{name!r} declares shape {shape} of {dtype_name}, and has {num_bytes} bytes")
            _check_room(self.path, name, 4 * math.prod(shape))
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(num_bytes)
            return np.ndarray(shape, dtype, data)


def _safetensors_header(file: BinaryIO, size: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Name, dtype, shape, place and number of bytes of each array; they lie one after another to the end."""
    (length,) = struct.unpack("<Q", file.read(8))
    begin = 8 + length
    if begin > size:
        raise ValueError(f"its header is said to have {length} bytes")
    try:
        entries = json.loads(file.read(length))
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    entries.pop("__metadata__", None)
    header = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (first, last) = entry["shape"], entry["data_offsets"]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, first, last)):
            raise ValueError(f"{name!r} has shape {shape} and offsets {[first, last]}")
        if first != end or last < first or begin + last > size:
            raise ValueError(f"{name!r} is said to be at bytes {first} to {last}, after {end} of {size - begin}")
        end = last
        header[name] = str(entry["dtype"]), tuple(shape), begin + first, last - first
    if begin + end != size:
        raise ValueError(f"it has {size - begin} bytes for arrays, and they take {end}")
    return header


def _num_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    if any(n < 0 for n in shape):
        raise ValueError(f"shape {list(shape)} has a negative axis")
    return math.prod(map(int, shape)) * dtype.itemsize


def _check_room(path: pathlib.Path, name: str, num_bytes: int) -> None:
    """One line in place of a machine that runs out of memory."""
    room = _memory()
    if room is not None and num_bytes > room:
        raise InputError(
            f"{name!r} in {path} takes {num_bytes / 2**30:.3g} GiB, more than the {room / 2**30:.3g} GiB of memory left"
        )


def _memory() -> int | None:
    """Bytes of memory that are free, where the system tells."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
