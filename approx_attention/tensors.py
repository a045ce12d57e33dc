"""Tensor (Kronecker) attention: what its exact and its polynomial form share.

The keys and values of order m are m - 1 sets of tokens, that may differ in length: ``k [m-1, S, D]`` or a tuple of
arrays ``[S_a, D]``, and likewise the values. Logits are sums over channels of products of one query and m - 1 keys; the
scale is folded into the query.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from approx_attention.checks import accumulation_dtype, check_choice, check_count, check_floating, check_kv_mask

Sets = Array | tuple[Array, ...] | list[Array]


class TensorInputs(NamedTuple):
    """Queries ``[T, D]`` with the scale folded in, and per set keys ``[S_a, D]``, values and mask (or None)."""

    q: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    masks: tuple[Array | None, ...]


def tensor_inputs(q: Array, k: Any, v: Any, *, scale: float | Array | None = None, kv_mask: Any = None) -> TensorInputs:
    """Checks the tensors of one head, casts them to the accumulation dtype, folds the scale in and zeroes the padding.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[m-1, S, D]``, or a tuple of m - 1 arrays ``[S_a, D]``; one array ``[S, D]`` is order 2.
        v: values, likewise.
        scale: factor of the logits, of any sign; ``1/sqrt(D)`` by default.
        kv_mask: true where a key is real: ``[m-1, S]``, or a tuple of arrays ``[S_a]`` or None; one array ``[S]`` holds
            for all sets, whose lengths are equal then.

    Returns:
        The `TensorInputs`.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors that are not floating point, a mask that is not boolean, a scale that is not one number.
    """
    keys, values = sets("k", k), sets("v", v)
    if len(keys) != len(values):
        raise ValueError(f"k and v must hold as many sets of tokens, got {len(keys)} and {len(values)}")
    if kv_mask is None or getattr(kv_mask, "ndim", None) == 1:
        masks = (kv_mask,) * len(keys)
    else:
        masks = tuple(kv_mask)
        if len(masks) != len(keys):
            raise ValueError(f"kv_mask must hold one mask for each of {len(keys)} sets of keys, got {len(masks)}")
    check_floating("q", q)
    if q.ndim != 2:
        raise ValueError(f"q must be [T, D], one head without batch axes; got shape {q.shape}")
    for a, (keys_a, values_a, mask) in enumerate(zip(keys, values, masks, strict=True)):
        if keys_a.shape[1] != q.shape[1]:
            raise ValueError(f"q and k must share the head dimension, got {q.shape[1]} and, in set {a}, {keys_a.shape[1]}")
        if keys_a.shape[0] != values_a.shape[0] or values_a.shape[1] != values[0].shape[1]:
            raise ValueError(f"v must hold [S, Dv] for each set of keys; got {values_a.shape} in set {a}, keys {keys_a.shape}")
        if 0 in (q.shape[0], q.shape[1], keys_a.shape[0]):
            raise ValueError(f"attention needs at least one query, key and channel; got q {q.shape} and k {keys_a.shape}")
        if mask is not None:
            check_kv_mask(mask, keys_a.shape[0])
    dtype = accumulation_dtype(q, *keys, *values)
    q = _scaled(q.astype(dtype), scale)
    keys, values = (
        tuple(x.astype(dtype) if mask is None else jnp.where(mask[:, None], x.astype(dtype), 0)
              for x, mask in zip(xs, masks, strict=True))
        for xs in (keys, values)
    )  # fmt: skip
    return TensorInputs(q, keys, values, masks)


def sets(name: str, x: Any) -> tuple[Array, ...]:
    """The sets of tokens ``[S_a, D]`` of a stacked array, of a tuple, or of one array, which is one set."""
    if isinstance(x, tuple | list):
        parts = tuple(x)
    elif getattr(x, "ndim", None) == 3:
        parts = tuple(x[a] for a in range(x.shape[0]))
    else:
        parts = (x,)
    for part in parts:
        check_floating(name, part)
        if part.ndim != 2:
            raise ValueError(f"{name} must be [m-1, S, D], [S, D] or a tuple of arrays [S, D]; got shape {part.shape}")
    if not parts:
        raise ValueError(f"{name} must hold at least one set of tokens, got none")
    return parts


def check_causal(is_causal: Any, window: Any, num_sets: int) -> tuple[int, ...] | None:
    """Checks the causal options of tensor attention; returns the windows as one count per set."""
    if is_causal is not None:
        check_choice("is_causal", is_causal, ("both", "ordered"))
    if window is None:
        return None
    if is_causal is None:
        raise ValueError("window looks back from each query: it needs is_causal='both' or 'ordered'")
    window = (window,) * num_sets if hasattr(window, "__index__") else tuple(window)
    if len(window) != num_sets:
        raise ValueError(f"window must hold one count for each of {num_sets} sets of keys, got {window}")
    return tuple(check_count("window", width) for width in window)


def _scaled(q: Array, scale: float | Array | None) -> Array:
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    elif getattr(scale, "shape", ()) != () or isinstance(scale, str | bool):
        raise TypeError(f"scale must be one number, got {scale!r}")
    elif not isinstance(scale, Tracer) and not math.isfinite(float(scale)):
        raise ValueError(f"scale must be finite, got {scale}")
    return q * jnp.asarray(scale, q.dtype)
