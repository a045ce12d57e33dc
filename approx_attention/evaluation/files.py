"""The tensors of a comparison, read from a file or from the sample shipped with the package."""

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

# Separators between the name of a layer and that of its array.
SEPARATORS = "./_"
# The largest number of bytes that one deflated byte can expand to.
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
    """The tensors of an attention layer in float32.

    Attributes:
        query: ``[B, T, N, D]``.
        key: ``[B, S, K, D]``, where K divides N.
        value: ``[B, S, K, Dv]``.
    """

    query: Array
    key: Array
    value: Array


class Layer(NamedTuple):
    """The tensors of a layer, and its attention options, if the file contains them.

    Attributes:
        tensors: query, key and value.
        kv_mask: mask of real keys ``[B, S]``, if some are padding.
        is_causal: whether query t sees keys j <= t only; None if the file does not say.
        scale: factor of the logits, if it is not ``1/sqrt(D)``.
    """

    tensors: Tensors
    kv_mask: np.ndarray | None
    is_causal: bool | None = None
    scale: float | None = None


def load_tensors(path: str | os.PathLike[str], names: tuple[str, str, str] = ("q", "k", "v")) -> Tensors:
    """Read q, k and v, each ``[T, D]``, ``[T, N, D]`` or ``[B, T, N, D]``, from an .npz or .safetensors file.

    Args:
        path: the file. It is never unpickled, and allocations are limited by the size of the file and the free memory.
        names: the names of the three arrays.

    Returns:
        The `Tensors`.

    Raises:
        InputError: the file cannot be read, or an array is missing, has a wrong shape or dtype, or is not finite.
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
    """Read q, k and v of one or several layers, with the lengths or the mask of real tokens.

    The arrays of a layer are named after it: ``layer0.q``, ``layer0/q`` or ``layer0_q``, at any depth. The options
    written by `nnx.capture_attention` (``is_causal``, ``scale``, ``mask``) are read too.

    Args:
        path: the file, as for `load_tensors`.
        names: the names of the three arrays, in the file or in each layer.
        layers: a pattern of layer names with the wildcards ``*``, ``?`` and ``[...]`` of a shell.
        lengths: name of an integer array ``[B]``, the numbers of real tokens, in each layer or for all.
        mask: name of the boolean array ``[B, S]`` that is true where a key is real, in each layer or for all.

    Returns:
        The `Layer` of each name, in the order of the numbers in the names; without ``layers`` one layer called "".

    Raises:
        InputError: the file cannot be read, no layer matches the pattern, or an array is missing, has a wrong shape or
            dtype, or is not finite outside of padding.
    """
    path = pathlib.Path(path)
    archive = _open(path)
    prefixes = {"": ""} if layers is None else _prefixes(path, archive.names, layers, names)
    return {layer: _layer(path, archive, prefix, names, lengths, mask) for layer, prefix in prefixes.items()}


def save_layers(path: str | os.PathLike[str], layers: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write the arrays of layers, ``q``, ``k``, ``v`` and others, to an .npz file for `load_layers`.

    Args:
        path: the file, written atomically.
        layers: for the name of each layer its arrays by name; "" for a layer without a name.

    Raises:
        InputError: the file name does not end in .npz, or its directory does not exist.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> from approx_attention.evaluation import load_layers, save_layers
        >>> layer = {name: np.ones((1, 16, 2, 8), np.float32) for name in ("q", "k", "v")}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = os.path.join(directory, "layers.npz")
        ...     save_layers(path, {"layer0": layer, "layer1": layer})
        ...     layers = load_layers(path, layers="layer*")
        >>> list(layers), layers["layer0"].tensors.query.shape
        (['layer0', 'layer1'], (1, 16, 2, 8))
    """
    path = pathlib.Path(path)
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise InputError(f"{path} must end in .npz and be in an existing directory")
    arrays: dict[str, Any] = {
        f"{layer}.{name}" if layer else name: x for layer, own in layers.items() for name, x in own.items()
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def load_sample() -> Tensors:
    """Load the sample tensors of the package; data/sample.txt describes their origin.

    Returns:
        The `Tensors` of two sequences, one from each of two layers of a small trained language model. Attention is
        causal.

    Example:
        >>> from approx_attention.evaluation import load_sample
        >>> query, key, value = load_sample()
        >>> query.ndim, key.shape == value.shape
        (4, True)
    """
    with importlib.resources.as_file(importlib.resources.files("approx_attention") / "data" / "sample.npz") as path:
        return load_tensors(path)


def sample_layers() -> dict[str, Layer]:
    """Load the sample as two layers of one sequence each: those with the smallest and the largest entropy."""
    sample = load_sample()
    return {
        name: Layer(Tensors(*(x[i : i + 1] for x in sample)), None, True) for i, name in enumerate(("sharp", "flat"))
    }


def _prefixes(path: pathlib.Path, present: Sequence[str], pattern: str, names: Sequence[str]) -> dict[str, str]:
    """The prefixes of array names, by layer."""
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
        # Names of other arrays may end like those of q, k and v, for example layer0.rope_q.
        if _fits(layer, pattern) and layer not in found and not any(map(layer.startswith, found.values())):
            raise InputError(f"{path} has no array {missing!r}, which layer {layer!r} needs")
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
            raise InputError(f"{name!r} in {path} must be floating point, got dtype {x.dtype}{unnamed}")
        if 0 in x.shape:
            raise InputError(f"{name!r} in {path} is empty, of shape {list(x.shape)}")
    if len({x.ndim for x in arrays}) > 1:
        raise InputError(
            f"{', '.join(names)} in {path} must have the same number of axes, got {[list(x.shape) for x in arrays]}"
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
    return f"it contains {_listed(present)}" if present else "it is empty"


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
        raise InputError(f"{q!r}, {k!r} and {v!r} must have the same batch size{shapes}")
    if key.shape[1:3] != value.shape[1:3]:
        raise InputError(f"{k!r} and {v!r} must have the same tokens and heads{shapes}")
    if query.shape[3] != key.shape[3]:
        raise InputError(f"{q!r} and {k!r} must have the same head dimension{shapes}")
    if query.shape[2] % key.shape[2]:
        raise InputError(f"the heads of {k!r} must divide those of {q!r}{shapes}")


# Files may be damaged or malicious: headers are checked against the file before anything is allocated.


class _Archive(Protocol):
    names: list[str]

    def read(self, name: str) -> np.ndarray:
        """The array with this name."""
        ...


def _open(path: pathlib.Path) -> _Archive:
    kinds = {".npz": _Npz, ".safetensors": _Safetensors}
    try:
        if not path.is_file():
            state = "is a directory" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
            raise InputError(f"{path} {state}; give an .npz or .safetensors file")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")
        if path.suffix not in kinds:
            raise InputError(f"{path} must end in .npz or .safetensors")
        return kinds[path.suffix](path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[None]:
    """Turn the exceptions of damaged files into one-line errors."""
    try:
        yield
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except MemoryError:
        raise InputError(f"{path} needs more memory than available") from None
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
            # Named as by numpy.load; the last array of a name counts.
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
        except Exception as error:  # numpy's tokenizer and parser raise many types
            raise ValueError(f"the header of {name!r} is damaged ({type(error).__name__})") from error
        if dtype.hasobject:
            raise InputError(f"{self.path} contains a pickled object, which is not supported; save plain arrays")
        declared = _num_bytes(shape, dtype)
        if declared > num_bytes:
            raise ValueError(f"{name!r} declares shape {list(shape)} of {dtype}, {declared} bytes, but has {num_bytes}")
        data = file.read(declared)
        if len(data) < declared:
            raise ValueError(f"{name!r} ends early")
        file.read()  # to the end, where the checksum is verified
        return np.ndarray(shape, dtype, data, order="F" if is_fortran else "C")


class _Safetensors:
    """A safetensors file: eight bytes of length, a JSON header with dtype, shape and offsets, and the arrays."""

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
                raise InputError(f"{name!r} in {self.path} has dtype {dtype_name}; supported are {readable}")
            dtype = np.dtype(_SAFETENSORS_DTYPES[dtype_name])
            if _num_bytes(shape, dtype) != num_bytes:
                raise ValueError(f"{name!r} declares shape {shape} of {dtype_name}, but has {num_bytes} bytes")
            _check_room(self.path, name, 4 * math.prod(shape))
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(num_bytes)
            return np.ndarray(shape, dtype, data)


def _safetensors_header(file: BinaryIO, size: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Dtype, shape, offset and number of bytes of each array by name; arrays are contiguous up to the end."""
    (length,) = struct.unpack("<Q", file.read(8))
    begin = 8 + length
    if begin > size:
        raise ValueError(f"its header claims a length of {length} bytes")
    try:
        entries = json.loads(file.read(length))
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    entries.pop("__metadata__", None)
    header = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (first, last) = entry["shape"], entry["data_offsets"]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, first, last)):
            raise ValueError(f"{name!r} has shape {shape} and offsets {[first, last]}")
        if first != end or last < first or begin + last > size:
            raise ValueError(f"{name!r} claims bytes {first} to {last}, after {end} of {size - begin}")
        end = last
        header[name] = str(entry["dtype"]), tuple(shape), begin + first, last - first
    if begin + end != size:
        raise ValueError(f"it has {size - begin} bytes for arrays, but they need {end}")
    return header


def _num_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    if any(n < 0 for n in shape):
        raise ValueError(f"shape {list(shape)} has a negative axis")
    return math.prod(map(int, shape)) * dtype.itemsize


def _check_room(path: pathlib.Path, name: str, num_bytes: int) -> None:
    """Raise before the machine runs out of memory."""
    room = _memory()
    if room is not None and num_bytes > room:
        raise InputError(
            f"{name!r} in {path} needs {num_bytes / 2**30:.3g} GiB, more than the {room / 2**30:.3g} GiB of free memory"
        )


def _memory() -> int | None:
    """The bytes of free memory, if the system reports them."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
