"""Masks of real tokens of a batch, from lengths or masks of several shapes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from approx_attention.core import InputError


def key_mask(key_shape: Sequence[int], *, lengths: Any = None, mask: Any = None) -> np.ndarray | None:
    """Make the mask of real keys.

    Args:
        key_shape: shape of the keys, ``[B, S, K, D]``.
        lengths: real tokens of each sequence, integers ``[B]``, or one integer for all.
        mask: true where a key is real, boolean ``[B, S]``, ``[B, 1, 1, S]`` or for all sequences ``[S]``.

    Returns:
        A boolean array ``[B, S]`` that combines both arguments, or None without arguments.

    Raises:
        InputError: a shape or dtype is wrong, a length is out of range, or a sequence has no real key.

    Example:
        >>> key_mask((2, 3, 1, 8), lengths=[3, 1]).tolist()
        [[True, True, True], [True, False, False]]
    """
    if lengths is None and mask is None:
        return None
    num_sequences, num_keys = key_shape[:2]
    real = np.ones((num_sequences, num_keys), bool)
    if lengths is not None:
        lengths = np.asarray(lengths)
        if not np.issubdtype(lengths.dtype, np.integer):
            raise InputError(f"lengths must be integers, got dtype {lengths.dtype}")
        if lengths.shape not in ((), (num_sequences,)):
            raise InputError(f"lengths must be [B] = [{num_sequences}], got shape {list(lengths.shape)}")
        lengths = np.broadcast_to(lengths, num_sequences)
        for sequence, length in enumerate(lengths.tolist()):
            if not 1 <= length <= num_keys:
                raise InputError(f"lengths must be from 1 to S = {num_keys}, got {length} for sequence {sequence}")
        real &= np.arange(num_keys) < lengths[:, None]
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != np.bool_:
            raise InputError(f"mask must be boolean, true where a key is real; got dtype {mask.dtype}")
        allowed = (num_sequences, num_keys), (num_sequences, 1, 1, num_keys), (num_keys,)
        if mask.shape not in allowed:
            raise InputError(
                f"mask must be [B, S] = {list(allowed[0])} or [S] = {list(allowed[2])}, got shape {list(mask.shape)}"
            )
        real &= mask.reshape(-1, num_keys)
    empty = np.flatnonzero(~real.any(1))
    if len(empty):
        raise InputError(f"every sequence must have a real key, but sequence {empty[0]} has none")
    return real


def query_mask(kv_mask: np.ndarray | None, num_queries: int) -> np.ndarray | None:
    """The mask of real queries ``[B, T]``: those at positions of real keys if T = S, else all."""
    if kv_mask is None or kv_mask.shape[1] == num_queries:
        return kv_mask
    return np.ones((kv_mask.shape[0], num_queries), bool)
