"""Layouts of an image: its windows and chunks are squares of pixels."""

import math

import numpy as np

from approx_attention.core import Segments, as_pair
from approx_attention.methods.eva.layouts import DEFAULT_CHUNK, Layout, Parts, Sizes, largest_divisor, runs


def image_layout(sizes: Sizes, num_queries: int, num_keys: int) -> Layout:
    """Square windows and chunks; the tokens are ordered window by window, and chunk by chunk within."""
    window, spatial_shape = sizes.window_size, sizes.spatial_shape
    height, width = as_pair("spatial_shape", spatial_shape)
    if height % window or width % window or not num_queries == num_keys == height * width:
        raise ValueError(
            f"spatial_shape must be that of the {num_keys} tokens, with sides that window_size = {window} divides; "
            f"got {spatial_shape} and {num_queries} queries"
        )
    for name, given in (("is_causal", sizes.is_causal), ("overlap", sizes.overlap)):
        if given:
            raise NotImplementedError(f"method 'eva' does not support {name} with spatial_shape")
    chunk = sizes.chunk_size
    if chunk is None and sizes.num_chunks is not None:
        chunk = _side_of(sizes.num_chunks, num_keys, window)
    # The side of a square with about as many pixels as a chunk of a sequence has tokens.
    chunk = chunk or largest_divisor(window, max(1, math.isqrt(DEFAULT_CHUNK)))
    if (sizes.exclude_local and window % chunk) or height % chunk or width % chunk:
        raise ValueError(f"chunk_size must divide {window if sizes.exclude_local else spatial_shape}, got {chunk}")

    def squares(side: int) -> np.ndarray:
        grid = np.arange(num_keys).reshape(height // side, side, width // side, side)
        return grid.transpose(0, 2, 1, 3).reshape(-1, side * side)

    if not sizes.exclude_local:
        # Chunks need not lie within windows, so they are not contiguous in this order.
        order = squares(window).reshape(-1)
        member = np.argsort(order)[squares(chunk)]
        chunks = Parts(Segments(member, np.ones(member.shape, bool)))
        return Layout(window**2, chunk**2, chunks, order=order)
    within = np.arange(window**2).reshape(window // chunk, chunk, window // chunk, chunk)
    within = within.transpose(0, 2, 1, 3).reshape(-1)
    order = squares(window)[:, within].reshape(-1)
    return Layout(window**2, chunk**2, Parts(runs(num_keys, chunk**2)), order=order, within=within)


def _side_of(num_chunks: int, num_keys: int, window: int) -> int:
    """The least side that divides the window and gives at most ``num_chunks`` chunks."""
    for side in range(1, window + 1):
        if window % side == 0 and num_keys <= num_chunks * side**2:
            return side
    raise ValueError(f"num_chunks must be at least {num_keys // window**2}, one chunk a window, got {num_chunks}")
