"""Windows of queries and chunks of keys, as EVA lays them out: along a sequence, or over an image."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from approx_attention.core import Segments, as_pair, check_count, count_real

# The default chunk is the largest divisor of the window up to this.
DEFAULT_CHUNK = 16


class Layout(NamedTuple):
    """Which tokens stand together; known when tracing, but for what depends on the number of real tokens.

    Attributes:
        window: queries per window.
        chunk: positions per chunk.
        chunks: the chunks of all keys.
        siblings: where a chunk holds several windows, those windows, to stand for the rest of a query's own chunk.
        order: the order of an image's tokens in which every window is a run, or None.
        within: the places of a window in that order, if it is not row by row.
        used: how many chunks hold real tokens, where a mask tells.
        used_siblings: the same of siblings.
    """

    window: int
    chunk: int | Array
    chunks: Segments
    siblings: Segments | None
    order: np.ndarray | None
    within: np.ndarray | None = None
    used: Array | None = None
    used_siblings: Array | None = None


def layout_of(
    num_queries: int,
    num_keys: int,
    window: int,
    chunk: int | None,
    num_chunks: int | None,
    overlap: int,
    exclude_local: bool,
    spatial_shape: tuple[int, int] | None,
    kv_mask: Array | None = None,
) -> Layout:
    """The layout of keys of which ``kv_mask`` says how many are real: they stand first."""
    if chunk is not None:
        chunk = check_count("chunk_size", chunk)
    if num_chunks is not None:
        num_chunks = check_count("num_chunks", num_chunks)
    if spatial_shape is not None:
        return _image_layout(num_queries, num_keys, window, chunk, num_chunks, overlap, exclude_local, spatial_shape)
    most = num_chunks if chunk is None else None
    if most is not None:
        chunk = _chunk_of(-(-num_keys // most), window, overlap, exclude_local)
    chunk = chunk or largest_divisor(window, DEFAULT_CHUNK)
    if exclude_local and window % chunk and chunk % window:
        raise ValueError(f"chunk_size must divide window_size = {window} or be a multiple of it, got {chunk}")
    if exclude_local and overlap and (overlap % chunk or chunk > window):
        raise ValueError(f"overlap must be a multiple of the chunk size {chunk} within a window, got {overlap}")
    overlap_of_chunks = 0 if exclude_local else overlap
    has_siblings = exclude_local and chunk > window
    if kv_mask is None:
        siblings = _runs(num_keys, window) if has_siblings else None
        return Layout(window, chunk, _runs(num_keys, chunk, overlap_of_chunks), siblings, None)
    count, size, room = count_real(kv_mask), chunk, -(-num_keys // chunk)
    if most is not None:
        size = _chunk_of(-(-jnp.maximum(count, 1) // most), window, overlap, exclude_local)
        room = min(most, num_keys)
    chunks, used = _real_runs(count, num_keys, room, size, chunk, overlap_of_chunks)
    siblings, used_siblings = None, None
    if has_siblings:
        siblings, used_siblings = _real_runs(count, num_keys, -(-num_keys // window), window, window)
    return Layout(window, size, chunks, siblings, None, used=used, used_siblings=used_siblings)


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


def _image_layout(
    num_queries: int,
    num_keys: int,
    window: int,
    chunk: int | None,
    num_chunks: int | None,
    overlap: int,
    exclude_local: bool,
    spatial_shape: tuple[int, int],
) -> Layout:
    """Square windows and chunks; the tokens are ordered window by window, and chunk by chunk within."""
    height, width = as_pair("spatial_shape", spatial_shape)
    if height % window or width % window or not num_queries == num_keys == height * width:
        raise ValueError(
            f"spatial_shape must be that of the {num_keys} tokens, with sides that window_size = {window} divides; "
            f"got {spatial_shape} and {num_queries} queries"
        )
    if overlap:
        raise NotImplementedError("method 'eva' does not support overlap with spatial_shape")
    if chunk is None and num_chunks is not None:
        sides = [side for side in range(1, window + 1) if window % side == 0 and num_keys <= num_chunks * side**2]
        if not sides:
            raise ValueError(
                f"num_chunks must be at least {num_keys // window**2}, one chunk a window, got {num_chunks}"
            )
        chunk = sides[0]
    chunk = chunk or largest_divisor(window, max(1, math.isqrt(DEFAULT_CHUNK)))
    if (exclude_local and window % chunk) or height % chunk or width % chunk:
        raise ValueError(f"chunk_size must divide {window if exclude_local else spatial_shape}, got {chunk}")

    def squares(side: int) -> np.ndarray:
        grid = np.arange(num_keys).reshape(height // side, side, width // side, side)
        return grid.transpose(0, 2, 1, 3).reshape(-1, side * side)

    if not exclude_local:
        order = squares(window).reshape(-1)
        member = np.argsort(order)[squares(chunk)]
        return Layout(window**2, chunk**2, Segments(member, np.ones(member.shape, bool)), None, order)
    within = np.arange(window**2).reshape(window // chunk, chunk, window // chunk, chunk)
    within = within.transpose(0, 2, 1, 3).reshape(-1)
    order = squares(window)[:, within].reshape(-1)
    return Layout(window**2, chunk**2, _runs(num_keys, chunk**2), None, order, within)


def _runs(num_tokens: int, length: int, overlap: int = 0) -> Segments:
    """Runs of ``length`` tokens, the last of the rest, and ``overlap`` more to either side."""
    first = np.arange(0, num_tokens, length)[:, None]
    member = first + np.arange(-overlap, length + overlap)
    return Segments(np.clip(member, 0, num_tokens - 1), (member >= 0) & (member < num_tokens))


def _real_runs(
    count: Array, num_tokens: int, room: int, length: Array | int, longest: int, overlap: int = 0
) -> tuple[Segments, Array]:
    """The same of the first ``count`` tokens, with room for ``room`` runs; and the number of runs."""
    first = jnp.arange(room, dtype=jnp.int32)[:, None] * length
    member = first + np.arange(-overlap, longest + overlap, dtype=np.int32)[None, :]
    inside = (member >= 0) & (member < jnp.minimum(count, first + length + overlap)) & (first < count)
    return Segments(jnp.clip(member, 0, num_tokens - 1), inside), -(-count // length)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``."""
    return max(divisor for divisor in range(1, max(1, min(number, limit)) + 1) if number % divisor == 0)
