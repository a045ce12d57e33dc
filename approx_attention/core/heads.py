"""Lifts functions of one head over batch and grouped heads: sequentially on a CPU, in parallel elsewhere.

The choice follows the platform that a program is lowered for, not the machine on which it is traced.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.core.choices import keeping_outputs
from approx_attention.kernels import along_with, by_platform

# Largest number of q, k and v entries of the heads that an accelerator processes in parallel: 32 heads of 32,768 tokens
# with 64 channels, or 8 heads of 131,072 tokens. More heads do not use a device better, and their intermediate results
# would fill its memory.
TOGETHER = 2**28


def each(function: Callable[[Any], Any], slices: Any, *, together: bool = False) -> Any:
    """Map a function over the slices along the leading axis.

    On a CPU one slice after the other, so that its data stays in cache; elsewhere, or with ``together``, in parallel.
    If the slices have more numbers than ``TOGETHER``, an accelerator takes them in groups.

    Args:
        function: maps one slice, a pytree like ``slices`` without the leading axis, to arrays.
        slices: a pytree of arrays ``[n, ...]``.
        together: map all slices in parallel on every platform, without groups.

    Returns:
        The results, stacked ``[n, ...]``.
    """
    if together:
        return jax.vmap(function)(slices)
    in_turn, at_once = functools.partial(lax.map, function), functools.partial(_at_once, function)
    return by_platform(slices, cpu=in_turn, default=at_once)


def _at_once(function: Callable[[Any], Any], slices: Any) -> Any:
    """All slices in parallel, or groups of a size that `TOGETHER` allows."""
    leaves = jax.tree.leaves(slices)
    count, numbers = leaves[0].shape[0], sum(x.size for x in leaves)
    most = count if numbers <= TOGETHER else max(1, count * TOGETHER // numbers)
    # Groups of equal size share one program; if no such size is near the limit, the last group is smaller.
    size = next(size for size in range(most, 0, -1) if count % size == 0) if count else 0
    size = size if 2 * size > most else most
    if size == count:
        return jax.vmap(function)(slices)
    return lax.map(function, slices, batch_size=size)


def by_kv_head(x: Array, num_kv_heads: int) -> Array:
    """Slice heads by the key head that they share.

    Args:
        x: ``[B, T, K * G, ...]``: the G query heads of one key head are consecutive.
        num_kv_heads: the number K of key heads.

    Returns:
        One slice per key head of every sequence, ``[B * K, T, G, ...]``; those of one sequence are consecutive.

    Example:
        >>> import jax.numpy as jnp
        >>> by_kv_head(jnp.arange(4).reshape(1, 1, 4), 2).tolist()
        [[[0, 1]], [[2, 3]]]
    """
    x = x.reshape(*x.shape[:2], num_kv_heads, x.shape[2] // num_kv_heads, *x.shape[3:])
    return jnp.moveaxis(x, 2, 1).reshape(x.shape[0] * num_kv_heads, x.shape[1], *x.shape[3:])


def from_kv_head(x: Array, num_kv_heads: int) -> Array:
    """The inverse of `by_kv_head`.

    Args:
        x: ``[B * K, T, G, ...]``.
        num_kv_heads: the number K of key heads.

    Returns:
        ``[B, T, K * G, ...]``.
    """
    x = jnp.moveaxis(x.reshape(x.shape[0] // num_kv_heads, num_kv_heads, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], num_kv_heads * x.shape[3], *x.shape[4:])


class Operands(NamedTuple):
    """All array arguments of a call.

    Attributes:
        tokens: q ``[B, T, K * G, D]``, k and v ``[B, S, K, D]``: G query heads share a key head.
        sliced: ``[B * K, ...]``, arguments of each key head of each sequence.
        dense: ``[B * K, G, ...]``, arguments of each query head of each sequence.
        per_head: ``[K, ...]``, arguments of each key head, the same for all sequences.
        shared: arguments of all heads.
    """

    tokens: tuple[Array, Array, Array]
    sliced: dict[str, Array]
    dense: dict[str, Array]
    per_head: dict[str, Any]
    shared: dict[str, Any]


Static = tuple[tuple[str, Any], ...]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="in_place")
def over_heads(function: Callable[..., Any], static: Static, operands: Operands, *, in_place: bool) -> Any:
    """Lift ``function(q, k, v, key, **arguments)`` of one head to ``[B, T, N, ...]``.

    Args:
        function: the function of one head.
        static: arguments that are known when tracing.
        operands: the array arguments.
        in_place: on a CPU, slice each head from the array instead of transposing all arrays first, which would take a
            third of the time of a linear method. Derivatives use the transposed layout, because the derivative of a
            slice is an array of zeros of the full size. Its derivative rule uses forward mode, and would miss arrays
            with derivatives that the function closes over.
    """
    num_batches, _, num_kv_heads, _ = operands.tokens[1].shape
    group = operands.tokens[0].shape[2] // num_kv_heads

    # Traced once, although it is used for shapes, in the loop, and in the derivative.
    @jax.jit
    def of_one_head(tokens: tuple[Array, ...], arguments: dict[str, Any], dense: dict[str, Array]) -> Any:
        """The output ``[T, G, ...]`` for queries ``[T, G, D]`` from keys and values ``[S, 1, D]``."""
        q, k, v = tokens[0], tokens[1][:, 0], tokens[2][:, 0]

        def query_head(q: Array, dense: dict[str, Array]) -> Any:
            given = arguments | dense
            return function(q, k, v, given.pop("key", None), **dict(static), **given)

        if group == 1:
            dense = {name: x[0] for name, x in dense.items()}
            return jax.tree.map(lambda x: x[:, None], query_head(q[:, 0], dense))
        return jax.vmap(query_head, in_axes=(1, 0), out_axes=1)(q, dense)

    def kv_head(operands: Operands, index: Array | int, tokens: tuple[Array, ...]) -> Any:
        own, dense = jax.tree.map(lambda x: x[index], (operands.sliced, operands.dense))
        own |= jax.tree.map(lambda x: x[index % num_kv_heads], operands.per_head) | operands.shared
        return of_one_head(tokens, own, dense)

    def transposed(apply: Callable[..., Any], operands: Operands) -> Any:
        tokens = jax.tree.map(lambda x: by_kv_head(x, num_kv_heads), operands.tokens)
        slices = jnp.arange(num_batches * num_kv_heads), tokens
        result = apply(lambda args: kv_head(operands, *args), slices)
        return jax.tree.map(lambda x: from_kv_head(x, num_kv_heads), result)

    @jax.custom_jvp
    def where_it_lies(operands: Operands) -> Any:
        def head(index: Array) -> Any:
            batch, head = index // num_kv_heads, index % num_kv_heads

            def cut(x: Array) -> Array:
                heads = x.shape[2] // num_kv_heads
                x = lax.dynamic_index_in_dim(x, batch, keepdims=False)
                return lax.dynamic_slice_in_dim(x, head * heads, heads, axis=1)

            return kv_head(operands, index, jax.tree.map(cut, operands.tokens))

        def put(index: Array, result: Any) -> Any:
            at = index // num_kv_heads, 0, index % num_kv_heads * group

            def paste(x: Array, of_head: Array) -> Array:
                return lax.dynamic_update_slice(x, of_head[None], (*at, *(0,) * (x.ndim - 3)))

            return jax.tree.map(paste, result, head(index))

        one = jax.eval_shape(head, jnp.zeros((), jnp.int32))
        num_heads = num_kv_heads * group
        room = jax.tree.map(lambda x: jnp.zeros((num_batches, x.shape[0], num_heads, *x.shape[2:]), x.dtype), one)
        return lax.fori_loop(0, num_batches * num_kv_heads, put, along_with(room, operands))

    def derivative(primals: tuple[Operands], tangents: tuple[Operands]) -> tuple[Any, Any]:
        def result(operands: Operands) -> Any:  # mapped like the result of the loop, even if independent of queries
            def in_turn(head: Callable[..., Any], slices: Any) -> Any:
                return lax.map(keeping_outputs(head), slices)

            return along_with(transposed(in_turn, operands), operands)

        return jax.jvp(result, primals, tangents)

    where_it_lies.defjvp(derivative)

    if num_batches * num_kv_heads == 1:
        tokens = jax.tree.map(lambda x: x[0], operands.tokens)
        return jax.tree.map(lambda x: x[None], kv_head(operands, 0, tokens))
    if num_batches == 0 or not in_place:
        return transposed(each, operands)
    at_once = functools.partial(transposed, _at_once)
    return by_platform(operands, cpu=where_it_lies, default=at_once)


def hashable(x: Any) -> Any:
    """Tuples in place of lists, at any depth: options of JSON become constants of programs, which must be hashable."""
    return tuple(map(hashable, x)) if isinstance(x, list | tuple) else x


def split_arrays(name: str, arguments: dict[str, Any]) -> tuple[Static, dict[str, Any]]:
    """Split arguments into static ones and those with arrays.

    Args:
        name: name of the method, for the error message.
        arguments: the arguments by name.

    Returns:
        The static arguments as pairs of name and value, which can be hashed, and a dict of the arguments that are
        arrays or pytrees with an array.

    Raises:
        TypeError: an argument of the method ``name`` is neither hashable nor contains arrays.
    """
    arrays = {
        argument: value
        for argument, value in arguments.items()
        if any(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(value))
    }
    static = tuple((argument, value) for argument, value in arguments.items() if argument not in arrays)
    for argument, value in static:
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"argument {argument!r} of method {name!r} must be hashable or contain arrays, got {value!r}"
            ) from None
    return static, arrays
