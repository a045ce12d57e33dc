"""`attention`: any method over batch and heads, in the layout of `jax.nn.dot_product_attention`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import get_abstract_mesh, use_abstract_mesh
from jaxtyping import Bool, Float, Integer

from approx_attention.core import (
    Operands,
    as_pair,
    broadcast,
    check_flag,
    check_floating,
    check_layout,
    over_heads,
    split_arrays,
    split_mask,
    within,
)
from approx_attention.registry import CAPABILITY_OF, METHODS, BoundMethod, HeadMethods, bind, get_method


def attention(
    query: Float[Array, "*B T N D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K Dv"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    method: str | Callable[..., Array] | BoundMethod | HeadMethods,
    rng: Array | None = None,
    scale: float | Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integer[Array, "*B"] | None = None,
    key_value_seq_lengths: Integer[Array, "*B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    per_head: Mapping[str, Any] | None = None,
    **hyperparameters: Any,
) -> Any:
    r"""Approximate attention over batch and heads, with the arguments of `jax.nn.dot_product_attention`.

    .. math:: \mathrm{out}_{btn} \approx \mathrm{softmax}_s(s\, q_{btn} \cdot k_{bsn'})\, v_{bsn'},
              \qquad n' = \lfloor n K / N \rfloor

    Args:
        query: ``[..., T, N, D]`` with any number of batch axes.
        key: ``[..., S, K, D]``, where K divides N: N/K consecutive query heads share a key head.
        value: ``[..., S, K, Dv]``.
        bias: added to the logits, broadcastable to ``[..., N, T, S]``; only for methods with ``dense_mask``.
        mask: true where a key is visible, broadcastable to ``[..., N, T, S]``. Every method with ``padding`` supports
            a padding mask ``[..., 1, 1, S]``; other masks need a method with ``dense_mask``.
        method: a name in `METHODS`, any function ``(q, k, v, key) -> out`` of one head, or a
            `approx_attention.registry.BoundMethod`. For one method per key head, pass
            `approx_attention.registry.HeadMethods`; all of its methods must support the options of the call.
        rng: typed PRNG key. Each key head gets a different key, shared by the batch and by its query heads. An array
            of keys ``[K]`` sets the key of each head.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.
        is_causal: query t sees keys j <= t (aligned top left where T != S).
        query_seq_lengths: real queries per sequence, ``[...]``; the output of the others is 0. Methods with
            ``q_mask`` ignore the others in statistics over all queries. Traced lengths are clipped to
            the range from 0 to the number of tokens.
        key_value_seq_lengths: real keys per sequence, ``[...]``.
        local_window_size: as in `jax.nn`, the number of tokens to the left and to the right of a query. With
            ``method="exact"`` it is the same as ``method="local"`` with this window, and cannot be combined with a
            bias, a dense mask or ``implementation``.
        return_residual: also return the log-normalisers ``[..., T, N]``, for methods with ``normalizer``. They are
            float32 (float64 if an input is), differentiable, and -inf where a query sees no key. In `jax.nn`
            they have the dtype of the inputs, and no gradient flows through them.
        per_head: arguments of the method that differ between key heads: arrays ``[K, ...]`` or tuples of arrays, such
            as a learned ``bandwidth [K, D]``, or a `Proposal` for each head.
        **hyperparameters: keyword arguments of the method, such as ``num_features=256``. ``method="exact"`` has the
            implementations "dense", "blocked", "pallas" and "cudnn". An argument with one number per key, such as
            the ``gate_logits`` of gated `rfa`, has shape ``[..., S, K]``.

    Returns:
        Outputs ``[..., T, N, Dv]`` in the dtype of ``value``; with ``return_residual`` a pair with the log-normalisers.

    Raises:
        ValueError: shapes or lengths do not match, the method is unknown, or a random method has no ``rng``.
        TypeError: a dtype is wrong, the method has no such argument, or a static option is traced.
        NotImplementedError: the method does not support an option; the message names both.

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
    if isinstance(method, HeadMethods):
        if hyperparameters or per_head:
            given = ", ".join((*hyperparameters, *(per_head or ())))
            raise TypeError(f"HeadMethods already contains the hyper-parameters of its methods, got {given}")
        own: dict[str, Any] = {"scale": scale, "is_causal": is_causal, "local_window_size": local_window_size}
        own |= {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
        return _by_head(method, (query, key, value), bias, mask, rng, return_residual=return_residual, **own)
    bound = bind(method, hyperparameters)
    if local_window_size is not None:
        bound = _within_window(bound, local_window_size, bias)
    registered = bound.registered
    check_layout(query, key, value)
    *batch, num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads = key.shape[-3:-1]
    num_batches, group = math.prod(batch), num_heads // num_kv_heads

    asked_for = {"scale": scale, "is_causal": is_causal or None, "return_state": return_residual or None}
    options: dict[str, Any] = {name: value for name, value in asked_for.items() if value is not None}

    # Arrays with one slice per key head of every sequence, [B * K, ...]; `dense` ones have a slice per query head too.
    sliced: dict[str, Array] = {}
    dense: dict[str, Array] = {}
    padding, dense_mask = split_mask(mask, (*batch, num_heads, num_queries, num_keys))
    if key_value_seq_lengths is not None:
        real = within(key_value_seq_lengths, num_keys, batch, "key_value_seq_lengths")
        padding = real if padding is None else padding & real
    if padding is not None:
        padding = padding.reshape(num_batches, 1, num_keys)
        padding = jnp.broadcast_to(padding, (num_batches, num_kv_heads, num_keys))
        sliced["kv_mask"] = padding.reshape(num_batches * num_kv_heads, num_keys)
    for name, x in (("mask", dense_mask), ("bias", bias)):
        if x is not None:
            full = broadcast(name, x, (*batch, num_heads, num_queries, num_keys))
            dense[name] = full.reshape(num_batches * num_kv_heads, group, num_queries, num_keys)
    bound.require((*options, *sliced, *dense))

    if query_seq_lengths is not None:
        asked = within(query_seq_lengths, num_queries, batch, "query_seq_lengths")[..., None, None]
        query = jnp.where(asked, query, jnp.zeros_like(query))
        if bound.takes("q_mask"):
            real = jnp.broadcast_to(asked[..., 0, 0][..., None, :], (*batch, num_kv_heads, num_queries))
            sliced["q_mask"] = real.reshape(num_batches * num_kv_heads, num_queries)

    given = dict(bound.hyperparameters)
    for name in registered.per_token if registered else ():
        x, expected = given.pop(name, None), (*batch, num_keys, num_kv_heads)
        if x is None:
            continue
        check_floating(name, x)
        if x.shape != expected:
            raise ValueError(f"{name} must be [..., S, K] = {list(expected)}, got shape {x.shape}")
        x = x.reshape(num_batches, num_keys, num_kv_heads).transpose(0, 2, 1)
        sliced[name] = x.reshape(num_batches * num_kv_heads, num_keys)

    own = bound.of_heads({} if per_head is None else per_head, num_kv_heads)
    bound.check_values({**options, **own})
    of_heads = {**bound.draw(rng, num_kv_heads, query.shape[-1], own.keys()), **own}
    query, key, value = (x.reshape(num_batches, *x.shape[-3:]) for x in (query, key, value))
    result = None
    if registered and registered.together and not (sliced or dense or of_heads or return_residual):
        result = registered.together(query, key, value, **given, **options)
    if result is None:
        static, arrays = split_arrays(bound.name, {**given, **options})
        operands = Operands((query, key, value), sliced, dense, of_heads, arrays)
        # JAX keys its caches of traces by the mesh in context, and calls rules of derivatives in an empty mesh where
        # there is none. In the same mesh for all, a gradient traces the function of a head once instead of twice.
        with use_abstract_mesh(get_abstract_mesh()):
            # The derivative rule of the in-place form uses forward mode. It would miss arrays that a user's function
            # closes over and that have derivatives.
            result = over_heads(bound.function, static, operands, in_place=registered is not None)

    result = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), result)
    out, residual = (result.out.astype(value.dtype), result.lse) if return_residual else (result, None)
    if query_seq_lengths is not None:
        out = jnp.where(asked, out, jnp.zeros_like(out))
        residual = None if residual is None else jnp.where(asked[..., 0], residual, -jnp.inf)
    return (out, residual) if return_residual else out


def _by_head(
    methods: HeadMethods,
    tokens: tuple[Array, Array, Array],
    bias: Array | None,
    mask: Array | None,
    rng: Array | None,
    **options: Any,
) -> Any:
    """Attention with a method for each key head: one call for each group of heads with the same method."""
    check_layout(*tokens)
    *batch, num_queries, num_heads, _ = tokens[0].shape
    full = *batch, num_heads, num_queries, tokens[1].shape[-3]
    split_mask(mask, full)
    if bias is not None:
        broadcast("bias", bias, full)
    keys = methods.keys(rng)
    if len(methods.groups) == 1 and tokens[1].shape[-2] == len(methods.methods):
        return attention(*tokens, bias, mask, method=methods.methods[0], rng=keys, **options)
    groups, results = methods.split(*tokens), []
    for group in groups:
        # A mask without an axis of heads belongs to all heads.
        dense = (
            x[..., group.asking, :, :] if x is not None and x.shape[-3:-2] == (num_heads,) else x for x in (bias, mask)
        )
        own = None if keys is None else keys[group.heads]
        results.append(attention(*group.tokens, *dense, method=group.method, rng=own, **options))
    return methods.join(groups, results, axis=tokens[0].ndim - 2)


def _within_window(bound: BoundMethod, size: Any, bias: Array | None) -> BoundMethod:
    """The method restricted to a window of ``size`` tokens to the left and to the right."""
    windowed = bound.registered and bound.registered.windowed
    if not windowed:
        able = " and ".join(repr(name) for name, other in METHODS.items() if other.windowed)
        raise NotImplementedError(f"method {bound.name!r} does not support local_window_size; only {able} does")
    shared = {name: x for name, x in bound.hyperparameters.items() if name in CAPABILITY_OF}
    others = ["bias"] * (bias is not None) + [name for name in bound.hyperparameters if name not in shared]
    if others:
        raise NotImplementedError(f"method {bound.name!r} with local_window_size supports no {' or '.join(others)}")
    sides = size if isinstance(size, tuple) else (size, size)
    return bind(windowed, {get_method(windowed).size or "": as_pair("local_window_size", sides, least=0), **shared})
