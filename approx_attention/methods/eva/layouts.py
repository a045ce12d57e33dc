"""Windows of queries and chunks of keys along a sequence."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from approx_attention.core import Segments, check_count, check_flag, count_real

# The default chunk is the largest divisor of the window up to this: the chunk of EvaByte.
DEFAULT_CHUNK = 16


class Sizes(NamedTuple):
    """The arguments of `eva` that decide the layout."""

    window_size: int
    chunk_size: int | None
    num_chunks: int | None
    is_causal: bool
    exclude_local: bool
    overlap: int
    spatial_shape: tuple[int, int] | None

    def checked(self) -> "Sizes":
        """The sizes as Python integers and booleans; raises for any other value."""
        return self._replace(
            window_size=check_count("window_size", self.window_size),
            chunk_size=None if self.chunk_size is None else check_count("chunk_size", self.chunk_size),
            num_chunks=None if self.num_chunks is None else check_count("num_chunks", self.num_chunks),
            exclude_local=check_flag("exclude_local", self.exclude_local),
            overlap=check_count("overlap", self.overlap, least=0),
        )

    @property
    def sides(self) -> tuple[int, int]:
        """The numbers of tokens that a window sees to its left and to its right."""
        return self.overlap, 0 if self.is_causal else self.overlap

    @property
    def chunk_overlap(self) -> int:
        """The overlap of chunks: that of windows, as in the authors' code; causal chunks do not overlap."""
        return 0 if self.exclude_local or self.is_causal else self.overlap


class Parts(NamedTuple):
    """Groups of keys, and the number of groups with real keys: None without a mask, where all groups have some."""

    segments: Segments
    used: Array | None = None


class Layout(NamedTuple):
    """The windows and chunks; known when tracing, except for the parts that depend on the number of real tokens.

    Attributes:
        window: queries per window.
        chunk: positions per chunk.
        chunks: the chunks of all keys.
        siblings: the windows of a chunk that contains several; they represent the rest of a query's own chunk.
        order: the order of an image's tokens in which every window is contiguous, or None.
        within: the places of a window in that order, if it is not row by row.
    """

    window: int
    chunk: int | Array
    chunks: Parts
    siblings: Parts | None = None
    order: np.ndarray | None = None
    within: np.ndarray | None = None


def sequence_layout(sizes: Sizes, num_keys: int, kv_mask: Array | None) -> Layout:
    """The layout of a sequence; the real keys, counted by ``kv_mask``, come first."""
    window, overlap = sizes.window_size, 0 if sizes.is_causal else sizes.overlap
    most = sizes.num_chunks if sizes.chunk_size is None else None
    if most is not None:
        chunk = _chunk_of(-(-num_keys // most), window, overlap, sizes.exclude_local)
    else:
        chunk = sizes.chunk_size or largest_divisor(window, DEFAULT_CHUNK)
    if sizes.exclude_local and window % chunk and chunk % window:
        raise ValueError(f"chunk_size must divide window_size = {window} or be a multiple of it, got {chunk}")
    if sizes.exclude_local and overlap and (overlap % chunk or chunk > window):
        raise ValueError(f"overlap must be a multiple of the chunk size {chunk} within a window, got {overlap}")
    has_siblings = sizes.exclude_local and chunk > window
    if kv_mask is None:
        siblings = Parts(runs(num_keys, window)) if has_siblings else None
        return Layout(window, chunk, Parts(runs(num_keys, chunk, sizes.chunk_overlap)), siblings)
    # The chunk size follows from the number of real keys, so that padding changes nothing; the number of chunks is
    # static.
    count, size, room = count_real(kv_mask), chunk, -(-num_keys // chunk)
    if most is not None:
        size = _chunk_of(-(-jnp.maximum(count, 1) // most), window, overlap, sizes.exclude_local)
        room = min(most, num_keys)
    chunks = _real_runs(count, num_keys, room, size, chunk, sizes.chunk_overlap)
    siblings = _real_runs(count, num_keys, -(-num_keys // window), window, window) if has_siblings else None
    return Layout(window, size, chunks, siblings)


def _chunk_of(least: Any, window: int, overlap: int, exclude_local: bool) -> Any:
    """The chunk of ``least`` tokens or more: a divisor of window and overlap, or a multiple of the window."""
    if not exclude_local:
        return least
    multiple = -(-least // window) * window
    sizes = [size for size in range(1, window + 1) if window % size == 0 and overlap % size == 0]
    if isinstance(least, int):
        return next((size for size in sizes if size >= least), multiple)
    divisor = jnp.min(jnp.asarray(sizes, jnp.int32), where=jnp.asarray(sizes, jnp.int32) >= least, initial=window)
    return jnp.where(least <= window, divisor, multiple)


def runs(num_tokens: int, length: int, overlap: int = 0) -> Segments:
    """Runs of ``length`` tokens, the last of the rest, and ``overlap`` more to either side."""
    first = np.arange(0, num_tokens, length)[:, None]
    member = first + np.arange(-overlap, length + overlap)
    return Segments(np.clip(member, 0, num_tokens - 1), (member >= 0) & (member < num_tokens))


def _real_runs(count: Array, num_tokens: int, room: int, length: Array | int, longest: int, overlap: int = 0) -> Parts:
    """`runs` of the first ``count`` tokens, padded to ``room`` runs."""
    first = jnp.arange(room, dtype=jnp.int32)[:, None] * length
    member = first + np.arange(-overlap, longest + overlap, dtype=np.int32)[None, :]
    inside = (member >= 0) & (member < jnp.minimum(count, first + length + overlap)) & (first < count)
    return Parts(Segments(jnp.clip(member, 0, num_tokens - 1), inside), -(-count // length))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``."""
    return max(divisor for divisor in range(1, max(1, min(number, limit)) + 1) if number % divisor == 0)
