"""Operations on rows of arrays: padding, blocks, and maps block by block."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def pad_rows(x: Array, padding: int) -> Array:
    """Append ``padding`` rows of zeros."""
    return jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) if padding else x


def in_blocks(x: Array, block_size: int) -> Array:
    """Rows as blocks, of which the last is filled with zeros.

    Args:
        x: rows ``[n, ...]``.
        block_size: the number b of rows per block.

    Returns:
        ``[ceil(n / b), b, ...]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.kernels import in_blocks
        >>> in_blocks(jnp.array([1, 2, 3]), 2).tolist()
        [[1, 2], [3, 0]]
    """
    return pad_rows(x, -x.shape[0] % block_size).reshape(-1, block_size, *x.shape[1:])


def out_of_blocks(tree: Any, num_rows: int | None = None) -> Any:
    """The inverse of ``in_blocks``, for every array of a tree.

    Args:
        tree: a pytree of arrays ``[blocks, block_size, ...]``.
        num_rows: the number of rows without those that fill the last block; by default all.

    Returns:
        The pytree of the first ``num_rows`` rows.
    """
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], tree)


def along_with(tree: Any, *arrays: Any) -> Any:
    """Make the arrays of a tree vary over the mapped and mesh axes of ``arrays``, without changing values.

    The initial carry of a loop, or one branch of a condition, must have the type of the result. Mapped axes come first.
    Compilers remove the selection.
    """
    others = [x if jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool else None for x in jax.tree.leaves(arrays)]
    others = [lax.stop_gradient(x).reshape(-1)[0].astype(bool) for x in others if x is not None and x.size]
    if not others:
        return tree
    # One number that varies as all others do: a program would otherwise select for each pair of arrays.
    of_all = functools.reduce(lambda first, second: lax.select(np.False_, first, second), others)

    # The mapped axis of x is moved to that of the other case, which is the first.
    return jax.tree.map(lambda x: jnp.where(True, x, of_all.astype(x.dtype)), tree)


def map_rows(function: Callable[[Any], Any], tree: Any, block_size: int) -> Any:
    """Apply a function to blocks of rows, one after the other, which bounds its memory.

    Args:
        function: maps a pytree of rows ``[b, ...]`` to one of rows ``[b, ...]``, row by row.
        tree: a pytree of arrays ``[n, ...]``.
        block_size: the largest number of rows per block.

    Returns:
        The results ``[n, ...]``. Blocks have equal sizes; rows of zeros fill the last one.
    """
    num_rows = jax.tree.leaves(tree)[0].shape[0]
    blocks, rows = even_split(num_rows, block_size)
    if blocks == 1:
        return function(tree)
    return out_of_blocks(lax.map(function, jax.tree.map(lambda x: in_blocks(x, rows), tree)), num_rows)


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple that is at least ``length``."""
    return -(-length // multiple) * multiple


def even_split(length: int, block_size: int) -> tuple[int, int]:
    """Split a length into blocks of equal size.

    Args:
        length: the number of rows.
        block_size: the largest size of a block.

    Returns:
        The number of blocks, at least 1, and the smallest common size that covers the length.

    Example:
        >>> from approx_attention.kernels import even_split
        >>> even_split(130, 128)
        (2, 65)
    """
    blocks = max(1, -(-length // block_size))
    return blocks, -(-length // blocks)


def block_windows(x: Array, block: int, blocks: int, left: int, right: int, fill: float) -> Array:
    """The rows of each block with those around it.

    Args:
        x: rows ``[n, ...]``.
        block: the number of rows per block.
        blocks: the number of blocks.
        left: the number of rows before a block.
        right: the number of rows after a block.
        fill: the value before the first row and after the last.

    Returns:
        ``[blocks, left + block + right, ...]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.kernels import block_windows
        >>> block_windows(jnp.array([1, 2, 3]), 2, 2, left=1, right=0, fill=0).tolist()
        [[0, 1, 2], [2, 3, 0]]
    """
    end = blocks * block + right
    x = x[:end]
    around = jnp.pad(x, ((left, end - x.shape[0]),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)
    if left == right == 0:
        return around.reshape(blocks, block, *x.shape[1:])
    return around[np.arange(blocks)[:, None] * block + np.arange(left + block + right)]


def sums_so_far(x: Array, weights: Array | None = None) -> Array:
    r"""Prefix sums of the rows of ``x [n, ...]`` by one product with a triangular matrix of weights.

    .. math:: y_i = \sum_{j \le i} w_{ij}\, x_j

    Args:
        x: the rows.
        weights: ``[n, n]``, or ``[n, n, R]`` for rows ``[R, ...]``; 0 above the diagonal. By default 1 elsewhere.

    Returns:
        The sums ``[n, ...]``, in full precision on every platform; NaN from the first row that is not finite.
    """
    return sums_of_seen(jnp.tri(x.shape[0], dtype=bool), x, weights)


def sums_of_seen(seen: Array, x: Array, weights: Array | None = None) -> Array:
    r"""Sums of the rows of ``x [n, ...]`` that each of m sums sees, by one product with a matrix of weights.

    .. math:: y_i = \sum_{j: s_{ij}} w_{ij}\, x_j

    Args:
        seen: s ``[m, n]``, boolean.
        x: the rows.
        weights: ``[m, n]``, or ``[m, n, R]`` for rows ``[R, ...]``; 0 where not seen. By default 1 elsewhere.

    Returns:
        The sums ``[m, ...]``, in full precision on every platform; NaN where a row that is not finite is seen.
    """
    rest = (1,) * (x.ndim - 1)
    # In the product an unseen NaN would reach the sum as 0 times NaN, so it is restored separately.
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    lost = jnp.any(seen & ~finite[None], axis=1)
    kept = jnp.where(finite.reshape(-1, *rest), x, 0)
    weights = seen.astype(x.dtype) if weights is None else weights
    form = "ij,j...->i..." if weights.ndim == 2 else "ijr,jr...->ir..."
    total = jnp.einsum(form, weights, kept, precision=lax.Precision.HIGHEST)
    return jnp.where(lost.reshape(-1, *rest), jnp.nan, total)
