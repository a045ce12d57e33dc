"""The public array function: any method over batch and heads, in the layout of `jax.nn.dot_product_attention`."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Integer

from approx_attention.core import along_with, as_pair, check_flag, check_floating, check_lengths, did_you_mean, shown
from approx_attention.registry import (
    METHODS,
    OPTIONS,
    arguments,
    check_hyperparameters,
    check_values,
    draw_per_head,
    get_method,
)


def attention(
    query: Float[Array, "*B T N D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K Dv"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    method: str | Callable[..., Array],
    rng: Array | None = None,
    scale: float | Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integer[Array, "*B"] | None = None,
    key_value_seq_lengths: Integer[Array, "*B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    per_head: Mapping[str, Array] | None = None,
    **hyperparameters: Any,
) -> Any:
    r"""Attention by any method, over batch and heads, with the arguments of `jax.nn.dot_product_attention`.

    .. math:: \mathrm{out}_{btn} \approx \mathrm{softmax}_s(s\, q_{btn} \cdot k_{bsn'})\, v_{bsn'},
              \qquad n' = \lfloor n K / N \rfloor

    Args:
        query: ``[..., T, N, D]`` with any number of batch axes.
        key: ``[..., S, K, D]``, where K divides N: N/K consecutive query heads share a key head.
        value: ``[..., S, K, Dv]``.
        bias: added to the logits, broadcastable to ``[..., N, T, S]``; only for methods with ``dense_mask``.
        mask: true where a key may be seen, broadcastable to ``[..., N, T, S]``. A padding mask ``[..., 1, 1, S]`` is
            taken by every method with ``padding``, any other only by methods with ``dense_mask``.
        method: a name in `METHODS`, or any function ``(q, k, v, key) -> out`` of one head.
        rng: typed PRNG key; each key head draws from its own, shared over the batch and over its query heads.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.
        is_causal: query t sees keys j <= t (aligned top left where T != S).
        query_seq_lengths: real queries per sequence, ``[...]``; the output of the others is 0. Methods that take
            ``q_mask`` leave them out of what they make of all queries. Where lengths are traced, those below 0 count as
            0, and those above the number of tokens as that.
        key_value_seq_lengths: real keys per sequence, ``[...]``.
        local_window_size: as in `jax.nn`: with ``method="exact"`` the same as ``method="local"`` with a window of so
            many tokens to the left and to the right of a query; without bias, dense mask and ``implementation``.
        return_residual: also return the log-normalisers ``[..., T, N]``, for methods with ``normalizer``: in float32
            (float64 where an input is), differentiable, and -inf where a query sees no key. Those of `jax.nn` have the
            type of the inputs, and no gradient flows through them.
        per_head: arguments of the method that each key head has of its own, such as a learned ``bandwidth [K, D]``.
        **hyperparameters: keyword arguments of the method, such as ``num_features=256``. The implementations of
            ``method="exact"`` have names of their own: "dense", "blocked" and "cudnn". What belongs to a token, such as
            the ``gate_logits`` of gated `rfa`, is ``[..., S, K]``.

    Returns:
        Outputs ``[..., T, N, Dv]`` in the dtype of ``value``; with ``return_residual`` a pair with the log-normalisers.

    Raises:
        ValueError: shapes or lengths that do not fit, an unknown method, a random method without ``rng``.
        TypeError: wrong dtypes, an argument that the method does not have, options that are not known when tracing.
        NotImplementedError: an option that the method does not support; the message names both.

    Example:
        >>> import jax
        >>> from approx_attention import attention
        >>> query = jax.random.normal(jax.random.key(0), (2, 100, 8, 16))
        >>> key, value = (jax.random.normal(jax.random.key(i), (2, 100, 2, 16)) for i in (1, 2))
        >>> attention(query, key, value, method="favor", rng=jax.random.key(3), num_features=64, is_causal=True).shape
        (2, 100, 8, 16)

    Reference:
        Grouped key heads: :cite:p:`ainslie2023gqa`.
    """
    is_causal, return_residual = check_flag("is_causal", is_causal), check_flag("return_residual", return_residual)
    if bias is not None:
        check_floating("bias", bias)
    if local_window_size is not None:
        if method not in ("exact", METHODS["exact"].function):
            raise NotImplementedError(f"method {method!r} does not support local_window_size; only 'exact' does")
        if bias is not None or "implementation" in hyperparameters:
            raise NotImplementedError("method 'exact' with local_window_size supports neither bias nor implementation")
        sides = local_window_size if isinstance(local_window_size, tuple) else (local_window_size, local_window_size)
        window = as_pair("local_window_size", sides, least=0)
        method, hyperparameters = "local", {**hyperparameters, "window_size": window}
    check_layout(query, key, value)
    *batch, num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads = key.shape[-3:-1]
    num_batches, group = math.prod(batch), num_heads // num_kv_heads

    head = _Head(method, hyperparameters)
    options: dict[str, Any] = {}
    if scale is not None:
        options["scale"] = scale
    if is_causal:
        options["is_causal"] = True
    if return_residual:
        options["return_state"] = True
    head.check_options(options)
    if return_residual and head.method and not head.method.capabilities.normalizer:
        raise NotImplementedError(f"method {head.name!r} does not support {OPTIONS['return_state']}")

    # Arrays with one slice per key head of every sequence, [B * K, ...]; `dense` ones have a slice per query head too.
    sliced: dict[str, Array] = {}
    dense: dict[str, Array] = {}
    padding, dense_mask = _split_mask(mask, (*batch, num_heads, num_queries, num_keys))
    if key_value_seq_lengths is not None:
        real = within(key_value_seq_lengths, num_keys, batch, "key_value_seq_lengths")
        padding = real if padding is None else padding & real
    if padding is not None:
        padding = padding.reshape(num_batches, 1, num_keys)
        padding = jnp.broadcast_to(padding, (num_batches, num_kv_heads, num_keys))
        sliced["kv_mask"] = padding.reshape(num_batches * num_kv_heads, num_keys)
    for name, x in (("mask", dense_mask), ("bias", bias)):
        if x is not None:
            full = _broadcast(name, x, (*batch, num_heads, num_queries, num_keys))
            dense[name] = full.reshape(num_batches * num_kv_heads, group, num_queries, num_keys)
    head.check_options(sliced | dense)

    if query_seq_lengths is not None:
        asked = within(query_seq_lengths, num_queries, batch, "query_seq_lengths")[..., None, None]
        query = jnp.where(asked, query, jnp.zeros_like(query))
        if "q_mask" in (head.arguments or ()):
            real = jnp.broadcast_to(asked[..., 0, 0][..., None, :], (*batch, num_kv_heads, num_queries))
            sliced["q_mask"] = real.reshape(num_batches * num_kv_heads, num_queries)

    for name in _PER_TOKEN & hyperparameters.keys():
        x, expected = hyperparameters.pop(name), (*batch, num_keys, num_kv_heads)
        if x is None:
            continue
        check_floating(name, x)
        if x.shape != expected:
            raise ValueError(f"{name} must be [..., S, K] = {list(expected)}, got shape {x.shape}")
        x = x.reshape(num_batches, num_keys, num_kv_heads).transpose(0, 2, 1)
        sliced[name] = x.reshape(num_batches * num_kv_heads, num_keys)

    own = _per_head(head, {} if per_head is None else per_head, num_kv_heads)
    check_values(head.method, {**hyperparameters, **options, **own})
    noise = draw_per_head(head.name, head.method, rng, num_kv_heads, query.shape[-1], hyperparameters, own.keys())
    of_heads = {**noise, **own}
    query, key, value = (x.reshape(num_batches, *x.shape[-3:]) for x in (query, key, value))
    result = None
    if head.method and head.method.together and not (sliced or dense or of_heads or return_residual):
        result = head.method.together(query, key, value, **hyperparameters, **options)
    if result is None:
        static, arrays = split_arrays(head.name, {**hyperparameters, **options})
        operands = _Operands((query, key, value), sliced, dense, of_heads, arrays)
        result = _lifted(head.function, static, operands, in_place=head.in_place)

    result = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), result)
    out, residual = (result.out.astype(value.dtype), result.lse) if return_residual else (result, None)
    if query_seq_lengths is not None:
        out = jnp.where(asked, out, jnp.zeros_like(out))
        residual = None if residual is None else jnp.where(asked[..., 0], residual, -jnp.inf)
    return (out, residual) if return_residual else out


class _Head:
    """A method bound to its hyper-parameters, which knows what it can be asked for."""

    def __init__(self, method: str | Callable[..., Any], hyperparameters: dict[str, Any]):
        if isinstance(method, str):
            self.name, self.method = method, get_method(method)
            self.function = self.method.function
        elif not callable(method):
            raise TypeError(f"method must be a registered name or a function (q, k, v, key) -> out, got {method!r}")
        else:
            self.name = getattr(method, "__name__", type(method).__name__)
            self.method = next((known for known in METHODS.values() if known.function is method), None)
            self.function = method
        # The rule of `where_it_lies` differentiates in forward mode, and could not see arrays with derivatives that a
        # function from elsewhere closes over.
        self.in_place = self.method is not None and self.method.capabilities.forward_mode
        self.hyperparameters = hyperparameters
        self.arguments = arguments(self.function)
        check_hyperparameters(self.name, self.function, hyperparameters)

    def check_options(self, options: Iterable[str]) -> None:
        for name in options:
            if self.arguments is not None and name not in self.arguments:
                raise NotImplementedError(f"method {self.name!r} does not support {OPTIONS[name]}")


class _Operands(NamedTuple):
    """All arrays of a call: ``tokens`` are q ``[B, T, K * G, D]``, k and v ``[B, S, K, D]`` of G query heads each.

    ``sliced [B * K, ...]`` and ``dense [B * K, G, ...]`` hold what belongs to one key head of one sequence, ``per_head
    [K, ...]`` what a key head shares over the batch, and ``shared`` what all have in common.
    """

    tokens: tuple[Array, Array, Array]
    sliced: dict[str, Array]
    dense: dict[str, Array]
    per_head: dict[str, Any]
    shared: dict[str, Any]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="in_place")
def _lifted(
    function: Callable[..., Any], static: tuple[tuple[str, Any], ...], operands: _Operands, *, in_place: bool
) -> Any:
    """A one-head function over key heads and the query heads that share them, ``[B, T, N, ...]``.

    On CPU heads take turns, so that what one needs stays in cache, and each is cut out of the layout where it lies:
    to transpose all first would take a third of the time of a linear method. Derivatives go through the transposed
    layout, because that of a cut is an array of zeros as large as the whole.
    """
    num_batches, _, num_kv_heads, _ = operands.tokens[1].shape
    group = operands.tokens[0].shape[2] // num_kv_heads

    def one_kv_head(operands: _Operands, index: Array | int, tokens: tuple[Array, ...]) -> Any:
        """The answer ``[T, G, ...]`` to queries ``[T, G, D]`` from keys and values ``[S, 1, D]``."""
        q, k, v = tokens[0], tokens[1][:, 0], tokens[2][:, 0]
        own, dense = jax.tree.map(lambda x: x[index], (operands.sliced, operands.dense))
        own |= jax.tree.map(lambda x: x[index % num_kv_heads], operands.per_head) | operands.shared

        def one_head(q: Array, dense: dict[str, Array]) -> Any:
            arguments = own | dense
            return function(q, k, v, arguments.pop("key", None), **dict(static), **arguments)

        if group == 1:
            dense = {name: x[0] for name, x in dense.items()}
            return jax.tree.map(lambda x: x[:, None], one_head(q[:, 0], dense))
        return jax.vmap(one_head, in_axes=(1, 0), out_axes=1)(q, dense)

    def transposed(operands: _Operands) -> Any:
        def by_kv_head(x: Array) -> Array:
            x = x.reshape(*x.shape[:2], num_kv_heads, x.shape[2] // num_kv_heads, x.shape[3])
            return jnp.moveaxis(x, 2, 1).reshape(num_batches * num_kv_heads, x.shape[1], *x.shape[3:])

        def to_layout(x: Array) -> Array:
            x = jnp.moveaxis(x.reshape(num_batches, num_kv_heads, *x.shape[1:]), 1, 2)
            return x.reshape(*x.shape[:2], num_kv_heads * group, *x.shape[4:])

        over = jax.vmap if jax.default_backend() != "cpu" else lambda head: functools.partial(lax.map, head)
        slices = jnp.arange(num_batches * num_kv_heads), jax.tree.map(by_kv_head, operands.tokens)
        return jax.tree.map(to_layout, over(lambda args: one_kv_head(operands, *args))(slices))

    @jax.custom_jvp
    def where_it_lies(operands: _Operands) -> Any:
        def head(index: Array) -> Any:
            batch, head = index // num_kv_heads, index % num_kv_heads

            def cut(x: Array) -> Array:
                heads = x.shape[2] // num_kv_heads
                x = lax.dynamic_index_in_dim(x, batch, keepdims=False)
                return lax.dynamic_slice_in_dim(x, head * heads, heads, axis=1)

            return one_kv_head(operands, index, jax.tree.map(cut, operands.tokens))

        def put(index: Array, result: Any) -> Any:
            at = index // num_kv_heads, 0, index % num_kv_heads * group

            def paste(x: Array, of_head: Array) -> Array:
                return lax.dynamic_update_slice(x, of_head[None], (*at, *(0,) * (x.ndim - 3)))

            return jax.tree.map(paste, result, head(index))

        one = jax.eval_shape(head, jnp.zeros((), jnp.int32))
        num_heads = num_kv_heads * group
        room = jax.tree.map(lambda x: jnp.zeros((num_batches, x.shape[0], num_heads, *x.shape[2:]), x.dtype), one)
        return lax.fori_loop(0, num_batches * num_kv_heads, put, along_with(room, operands))

    def derivative(primals: tuple[_Operands], tangents: tuple[_Operands]) -> tuple[Any, Any]:
        def result(operands: _Operands) -> Any:  # mapped where the loop's is, also where it does not depend on queries
            return along_with(transposed(operands), operands)

        return jax.jvp(result, primals, tangents)

    where_it_lies.defjvp(derivative)

    if num_batches * num_kv_heads == 1:
        tokens = jax.tree.map(lambda x: x[0], operands.tokens)
        return jax.tree.map(lambda x: x[None], one_kv_head(operands, 0, tokens))
    if jax.default_backend() != "cpu" or num_batches == 0 or not in_place:
        return transposed(operands)
    return where_it_lies(operands)


def split_arrays(name: str, arguments: dict[str, Any]) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """Arguments that are known when tracing, and those that hold arrays."""
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
                f"argument {argument!r} of method {name!r} must be hashable or hold arrays, got {value!r}"
            ) from None
    return static, arrays


def _per_head(head: _Head, per_head: Any, num_kv_heads: int) -> dict[str, Array]:
    """Checks arguments that are stacked over the key heads."""
    if not isinstance(per_head, Mapping):
        raise TypeError(f"per_head must be a mapping of names to arrays [K, ...], got {shown(per_head)}")
    for name, x in per_head.items():
        if name in OPTIONS:
            raise TypeError(f"per_head takes arguments of the method, and {name!r} is one of all heads")
        if name not in (head.arguments or ()):
            raise TypeError(f"method {head.name!r} has no argument {name!r}{did_you_mean(name, head.arguments or ())}")
        if name in head.hyperparameters:
            raise TypeError(f"argument {name!r} is given both per_head and for all heads")
        for leaf in jax.tree.leaves(x):
            expected = f"per_head[{name!r}] must be arrays [K, ...] with K = {num_kv_heads}"
            if not hasattr(leaf, "shape"):
                raise TypeError(f"{expected}, got {shown(leaf)}")
            if leaf.shape[:1] != (num_kv_heads,):
                raise ValueError(f"{expected}, got shape {leaf.shape}")
    return dict(per_head)


# Arguments that hold one number per key and key head.
_PER_TOKEN = frozenset({"gate_logits"})


def check_layout(query: Array, key: Array, value: Array) -> None:
    """Raises unless query, key and value are ``[..., T, N, D]``, ``[..., S, K, D]`` and ``[..., S, K, Dv]``."""
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
        raise ValueError(f"key and value must share [S, K], got {key.shape[-3:-1]} and {value.shape[-3:-1]}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must share the head dimension, got {query.shape[-1]} and {key.shape[-1]}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"key heads must divide query heads, got {key.shape[-2]} and {query.shape[-2]}")


def _split_mask(mask: Any, full: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """A mask as padding ``[*B, S]``, if it tells neither queries nor heads apart, or else as a dense mask."""
    if mask is None:
        return None, None
    if getattr(mask, "dtype", None) != jnp.bool_:
        given = f"dtype {mask.dtype}" if hasattr(mask, "dtype") else type(mask).__name__
        raise TypeError(f"mask must be a boolean array (true = may be seen), got {given}")
    _broadcast("mask", mask, full)
    mask = mask.reshape((1,) * (len(full) - mask.ndim) + mask.shape)
    if mask.shape[-3:-1] == (1, 1):
        return jnp.broadcast_to(mask[..., 0, 0, :], (*full[:-3], full[-1])), None
    return None, mask


def _broadcast(name: str, x: Array, full: tuple[int, ...]) -> Array:
    try:
        return jnp.broadcast_to(x, full)
    except ValueError:
        raise ValueError(f"{name} must broadcast to [..., N, T, S] = {list(full)}, got shape {x.shape}") from None


def within(lengths: Any, size: int, batch: list[int], name: str) -> Array:
    """True at the positions before each sequence's length, ``[*B, size]``."""
    given = np.asarray(lengths) if isinstance(lengths, list | tuple | int) else lengths
    check_lengths(name, given, size)
    lengths = jnp.asarray(given)
    if lengths.shape != tuple(batch):
        raise ValueError(f"{name} must have the batch's shape {tuple(batch)}, got {lengths.shape}")
    # In the lengths' own type, whose numbers int32 may not hold.
    most = jnp.asarray(min(size, jnp.iinfo(lengths.dtype).max), lengths.dtype)
    lengths = jnp.minimum(lengths, most).astype(jnp.int32)
    positions = jnp.arange(size, dtype=jnp.int32).reshape((1,) * len(batch) + (size,))
    return positions < lengths[..., None]
