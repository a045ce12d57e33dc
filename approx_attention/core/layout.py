"""Checks of arrays over batch and heads, in the layout of `jax.nn.dot_product_attention`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from approx_attention.core.checks import check_floating, check_lengths


def check_layout(query: Array, key: Array, value: Array) -> None:
    """Check arrays over batch and heads.

    Args:
        query: ``[*B, T, N, D]`` with any number of batch axes.
        key: ``[*B, S, K, D]``; K divides N.
        value: ``[*B, S, K, Dv]``.

    Raises:
        TypeError: arrays that are not floating point.
        ValueError: fewer than three axes, an empty axis other than batch axes, or shapes that do not match.
    """
    for name, x, axes in (("query", query, "T, N, D"), ("key", key, "S, K, D"), ("value", value, "S, K, Dv")):
        check_floating(name, x)
        if x.ndim < 3 or 0 in x.shape[-3:]:
            raise ValueError(f"{name} must be [..., {axes}] with no empty axis but batch axes, got shape {x.shape}")
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        shapes = query.shape[:-3], key.shape[:-3], value.shape[:-3]
        raise ValueError(
            f"query, key and value must have the same batch axes, got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(
            "key and value must have the same numbers of tokens and heads, "
            f"got {key.shape[-3:-1]} and {value.shape[-3:-1]}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must share the head dimension, got {query.shape[-1]} and {key.shape[-1]}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"key heads must divide query heads, got {key.shape[-2]} and {query.shape[-2]}")


def split_mask(mask: Any, full: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """Return a mask as padding if it is the same for all queries and heads, else as a dense mask.

    Args:
        mask: boolean, true where a key is visible, in a shape that broadcasts to ``full``; or None.
        full: ``(*B, N, T, S)``.

    Returns:
        The mask of real keys ``[*B, S]`` and None, or None and the mask with as many axes as ``full``; twice None
        without a mask.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: a mask that does not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> kv_mask, dense = split_mask(jnp.array([[[[True, False]]]]), (3, 1, 4, 2))
        >>> kv_mask.shape, dense
        ((3, 2), None)
    """
    if mask is None:
        return None, None
    if getattr(mask, "dtype", None) != jnp.bool_:
        given = f"dtype {mask.dtype}" if hasattr(mask, "dtype") else type(mask).__name__
        raise TypeError(f"mask must be a boolean array (true = visible), got {given}")
    broadcast("mask", mask, full)
    mask = mask.reshape((1,) * (len(full) - mask.ndim) + mask.shape)
    if mask.shape[-3:-1] == (1, 1):
        return jnp.broadcast_to(mask[..., 0, 0, :], (*full[:-3], full[-1])), None
    return None, mask


def broadcast(name: str, x: Array, full: tuple[int, ...]) -> Array:
    """The array ``name`` broadcast to the full shape. Raises ``ValueError`` if that is impossible."""
    try:
        return jnp.broadcast_to(x, full)
    except ValueError:
        raise ValueError(f"{name} must broadcast to [..., N, T, S] = {list(full)}, got shape {x.shape}") from None


def within(lengths: Any, size: int, batch: list[int], name: str) -> Array:
    """A mask of the positions before each sequence's length.

    Args:
        lengths: integers in the shape of the batch, also as lists. A traced length above ``size`` counts as ``size``.
        size: the number of positions.
        batch: the batch axes ``[*B]``.
        name: name of the argument, for error messages.

    Returns:
        The mask ``[*B, size]``.

    Raises:
        TypeError: lengths that are not integers.
        ValueError: another shape, or a concrete length that is not in 0 to ``size``.

    Example:
        >>> within([1, 3], 3, [2], "lengths").tolist()
        [[True, False, False], [True, True, True]]
    """
    given = np.asarray(lengths) if isinstance(lengths, list | tuple | int) else lengths
    check_lengths(name, given, size)
    lengths = jnp.asarray(given)
    if lengths.shape != tuple(batch):
        raise ValueError(f"{name} must have the batch's shape {tuple(batch)}, got {lengths.shape}")
    # In the dtype of the lengths, which may exceed int32.
    most = jnp.asarray(min(size, jnp.iinfo(lengths.dtype).max), lengths.dtype)
    lengths = jnp.minimum(lengths, most).astype(jnp.int32)
    positions = jnp.arange(size, dtype=jnp.int32).reshape((1,) * len(batch) + (size,))
    return positions < lengths[..., None]
