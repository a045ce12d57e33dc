"""Checks and translates the arguments that Flax passes to an ``attention_fn``; none is dropped silently."""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, PrecisionLike
from jax import Array
from jax.core import Tracer

from approx_attention.core import check_choice, check_count, check_number, shown, split_arrays
from approx_attention.registry import CAPABILITY_OF, BoundMethod, HeadMethods, bind


def bind_layer(
    method: str | Callable[..., Array] | BoundMethod | HeadMethods, noise: bool, hyperparameters: Mapping[str, Any]
) -> tuple[BoundMethod | HeadMethods, Any, bool]:
    """Bind the method of a layer.

    Args:
        method: a name, a function of one head, or a bound method.
        noise: whether the layer requests the noise of a method that is also deterministic.
        hyperparameters: arguments of the method, and its ``scale``.

    Returns:
        The bound method, its scale if one is given, and whether the method is random.

    Raises:
        ValueError: the method is unknown, or noise is requested of a method without noise.
        TypeError: the method is neither a name nor a function, or it has no such argument.
    """
    if isinstance(method, HeadMethods):
        bound, given = method, dict(hyperparameters)
        scale = given.pop("scale", None)
        if given:
            raise TypeError(f"HeadMethods already contains the hyper-parameters of its methods, got {', '.join(given)}")
    else:
        bound = bind(method, hyperparameters, options=("scale",))
        given = dict(bound.hyperparameters)
        scale = given.pop("scale", None)
        bound = dataclasses.replace(bound, hyperparameters=given)
    if noise and not bound.may_be_random:
        raise ValueError(f"method {bound.name!r} has no noise to switch on")
    return bound, scale, bound.is_random or noise


def split_owned(
    bound: BoundMethod | HeadMethods | None, scale: Any, per_head: Mapping[str, Any] | None
) -> tuple[BoundMethod | HeadMethods | None, dict[str, Any], dict[str, Any]]:
    """The method of a layer without its arrays, and those: of all heads, and of each key head.

    Raises:
        TypeError: arrays that are no state of a layer: the scale, one number per key, or those of a method for each
            head; arguments per head that the method does not have.
        ValueError: arrays per head of different numbers of heads.
    """
    of_heads = bound.methods if isinstance(bound, HeadMethods) else ()
    fixed = [("scale", scale), *(item for one in of_heads for item in one.hyperparameters.items())]
    shared: dict[str, Any] = {}
    if isinstance(bound, BoundMethod):
        shared = split_arrays(bound.name, dict(bound.hyperparameters))[1]
        per_token = bound.registered.per_token if bound.registered else ()
        fixed += [(name, x) for name, x in shared.items() if name in per_token]
    for name, x in fixed:
        if any(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(x)):
            assert bound is not None
            raise TypeError(
                f"argument {name!r} of method {bound.name!r} must be static, got an array; approx_attention.attention "
                "takes arrays for it"
            )
    if not per_head:
        per_head = {}
    elif not isinstance(bound, BoundMethod):
        raise TypeError(
            "per_head is not supported with a module or HeadMethods; use one method for all heads; "
            f"got {shown(per_head)}"
        )
    else:
        # The number of key heads is known only in a call.
        sizes = {x.shape[:1] for x in jax.tree.leaves(per_head) if hasattr(x, "shape")}
        per_head = bound.of_heads(per_head, next(iter(sizes))[0] if sizes and min(sizes) else 0)
    if isinstance(bound, BoundMethod) and shared:
        given = {name: x for name, x in bound.hyperparameters.items() if name not in shared}
        bound = dataclasses.replace(bound, hyperparameters=given)
    return bound, shared, dict(per_head)


def check_makers(bound: BoundMethod | HeadMethods, *fields: tuple[str, Any]) -> set[str]:
    """The arguments of a method whose arrays are made by functions, in the fields of a layer ``(name, field)``.

    Raises:
        TypeError: something else than functions by argument, an argument that the method does not have or that is given
            twice, or methods by head.
    """
    given: set[str] = set()
    for field, makers in fields:
        if not isinstance(makers, Mapping) or not all(map(callable, makers.values())):
            raise TypeError(f"{field} must be functions () -> array by argument, got {shown(makers)}")
        if makers and not isinstance(bound, BoundMethod):
            raise TypeError(f"{field} is for one method of all heads, got methods by head")
        if isinstance(bound, BoundMethod):
            bind(bound, makers)
            if twice := given.union(bound.hyperparameters).intersection(makers):
                raise TypeError(f"argument {', '.join(sorted(twice))} of method {bound.name!r} is given twice")
        given.update(makers)
    return given


def check_redraw(redraw: str, every: int | None) -> int:
    """The number of calls between two samples of the random projections.

    Args:
        redraw: ``"never"``, ``"every_call"`` or ``"every_n"``.
        every: the number of calls for ``"every_n"``, else None.

    Returns:
        ``every``; 1 for the other choices.

    Raises:
        ValueError: an unknown choice, ``every`` without ``"every_n"`` or the reverse, or below 1.
        TypeError: ``every`` is not an integer.
    """
    check_choice("redraw", redraw, ("never", "every_call", "every_n"))
    if (redraw == "every_n") != (every is not None):
        raise ValueError(f"give every with redraw='every_n', and only then; got redraw={redraw!r}, every={every}")
    return 1 if every is None else check_count("every", every)


def check_opt_ins(causal_mask: str, dropout: str) -> None:
    """Raise ``ValueError`` unless both are among their choices."""
    check_choice("causal_mask", causal_mask, ("error", "as_is_causal"))
    check_choice("dropout", dropout, ("error", "output"))


def drawn_array(name: str, drawn: Mapping[str, Array], argument: str) -> Array:
    """The random array of a method that becomes a parameter. Raises ``ValueError`` if there is none."""
    if argument not in drawn:
        allowed = ", ".join(drawn) or "none"
        raise ValueError(f"method {name!r} samples no {argument!r} to learn; its random arrays: {allowed}")
    return drawn[argument]


def check_unused(
    name: str, *, dropout: str, dropout_rate: float, deterministic: bool, dropout_rng: Array | None, **others: Any
) -> None:
    """Raise for arguments that no approximation supports.

    Args:
        name: of the method.
        dropout: ``"output"`` to apply the dropout of attention weights to the output.
        dropout_rate: the rate of Flax's dropout of attention weights.
        deterministic: whether dropout is off.
        dropout_rng: PRNG key of dropout.
        **others: arguments that must be None.

    Raises:
        NotImplementedError: one of them is given.
        ValueError: dropout has no key, or its rate is not from 0 to 1.
        TypeError: the rate is traced or not a number.
    """
    check_number("dropout_rate", dropout_rate)
    if isinstance(dropout_rate, Tracer):
        raise TypeError("dropout_rate must be known when tracing, got a traced number")
    if not 0 <= dropout_rate <= 1:
        raise ValueError(f"dropout_rate must be from 0 to 1, got {dropout_rate}")
    if dropout_rate > 0 and not deterministic and dropout == "error":
        raise NotImplementedError(
            f"method {name!r} does not support dropout of attention weights (dropout_rate={dropout_rate}), which it "
            f"never forms; make ApproxAttention with dropout='output' to drop entries of its output instead, or leave "
            f"dropout_rate at 0 and put a Dropout on the output of the attention layer"
        )
    if dropout_rate > 0 and not deterministic and dropout_rng is None:
        raise ValueError(f"dropout_rate={dropout_rate} needs a dropout_rng, got None")
    for argument, value in others.items():
        if value is not None:
            advice = " (sow_weights: there are no weights to sow)" if argument == "module" else ""
            raise NotImplementedError(f"method {name!r} does not support {argument}{advice}")


def with_dropout(out: Array, rate: float, deterministic: bool, rng: Array | None, broadcast: bool) -> Array:
    """Dropout of the output: a share of its entries is 0, the others are scaled up.

    Args:
        out: outputs ``[..., T, N, Dv]``.
        rate: the share of entries to drop, from 0 to 1.
        deterministic: whether dropout is off.
        rng: PRNG key; None for no dropout.
        broadcast: whether the same entries are dropped in all sequences and heads, as Flax does with weights.

    Returns:
        Outputs of the same shape, with the same mean over PRNG keys if the rate is below 1.
    """
    if rate == 0 or deterministic or rng is None:
        return out
    if rate >= 1:
        return jnp.zeros_like(out)
    shape = (*(1,) * (out.ndim - 3), out.shape[-3], 1, out.shape[-1]) if broadcast else out.shape
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, shape), out / (1 - rate), jnp.zeros_like(out))


def as_boolean(mask: Array | None) -> Array | None:
    """Flax's mask, boolean or floating point with 1 for a visible key, as a boolean mask.

    Raises:
        TypeError: the mask is not an array, or neither boolean nor numeric.
        ValueError: concrete values other than 0 and 1, as in an additive mask.
    """
    if mask is None:
        return None
    if not hasattr(mask, "dtype") or not hasattr(mask, "shape"):
        raise TypeError(f"mask must be an array, boolean or of 0 and 1; got {type(mask).__name__}")
    if mask.dtype == jnp.bool_:
        return mask
    if not jnp.issubdtype(mask.dtype, jnp.number):
        raise TypeError(f"mask must be boolean or contain 0 and 1, got dtype {mask.dtype}")
    if not isinstance(mask, Tracer) and not np.isin(np.asarray(mask, np.float32), (0, 1)).all():
        raise ValueError("mask must be boolean or contain 0 and 1 (1 = visible); pass an additive mask as bias")
    return mask > 0


def without_causality(
    name: str, mask: Array | None, causal_mask: str, *, dense: bool = False
) -> tuple[Array | None, bool]:
    """Split a mask into its padding ``[..., 1, 1, S]`` and whether it is causal.

    A mask with an axis of queries is taken to be causal, or causal combined with padding. Then a key is real if any
    query sees it; a key that no query sees counts as padding, as do queries that see no key. A concrete mask may also
    be padding alone.

    Args:
        name: name of the method.
        mask: boolean, broadcastable to ``[B, N, T, S]``.
        causal_mask: ``"as_is_causal"`` to split the mask, ``"error"`` to leave every mask as it is.
        dense: whether the method supports every mask; it then keeps a mask not known to be causal or padding.

    Returns:
        The padding, None if there is none, and whether attention is causal.

    Raises:
        NotImplementedError: any other concrete mask. A traced square mask is taken to be causal.
    """
    if mask is None or causal_mask == "error" or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask, False
    square, traced = mask.shape[-2] == mask.shape[-1], isinstance(mask, Tracer)
    if traced and dense:
        return mask, False
    looked_at: Any = mask if traced else np.asarray(mask)
    one = looked_at if mask.ndim == 2 else looked_at[..., :1, :, :]
    real = one.any(-2, keepdims=True)
    if traced and square:
        return real, True
    if not traced:
        pairs = real & one.any(-1, keepdims=True)
        causal = square and bool((np.tri(mask.shape[-1], dtype=bool) & pairs == looked_at).all())
        if causal or (pairs == looked_at).all():
            return None if real.all() else jnp.asarray(real), causal
    if dense:
        return jnp.asarray(mask), False
    raise NotImplementedError(
        f"method {name!r} with causal_mask='as_is_causal' supports padding masks, causal masks and their combination, "
        f"with as many queries as keys; got another mask, of shape {mask.shape}"
    )


def seen_arrays(
    attention_fn: Callable[..., Any],
    tokens: tuple[Array, Array, Array],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Array]:
    """The array arguments of a call of an attention function, by name, with its causality and scale.

    Args:
        attention_fn: the function, whose bound options may make it causal.
        tokens: query, key and value.
        args: further arguments by position.
        kwargs: further arguments by name.
        options: known arguments that the function binds.

    Raises:
        ValueError: capped logits.
    """
    by_position = inspect.signature(attention_fn).bind_partial(*tokens, *args).arguments
    given = {**dict(list(by_position.items())[len(tokens) :]), **kwargs}
    arrays = {
        name: x
        for name, x in given.items()
        if isinstance(x, Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    }
    capped = [name for name in CAPABILITY_OF if options.get(name) is not None or given.get(name) is not None]
    if capped:
        raise ValueError(f"the layer has {', '.join(capped)}, which files of q, k and v cannot represent")
    # A module with learned parts says itself whether it is causal.
    knows = attention_fn, getattr(attention_fn, "method", None)
    is_causal = bool(given.get("is_causal")) or any(bool(getattr(x, "is_causal", False)) for x in knows)
    scale = given.get("scale") if options.get("scale") is None else options["scale"]
    scales = {} if scale is None else {"scale": jnp.asarray(scale, jnp.float32)}
    return {**arrays, **scales, **dict(zip("qkv", tokens, strict=True)), "is_causal": jnp.asarray(is_causal)}


def as_layer(name: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arguments of an attention function in the format of layer files: causality and padding in place of a mask.

    Args:
        name: name of the layer.
        given: ``q``, ``k`` and ``v``, and other arrays by their names.

    Raises:
        ValueError: there is a bias, or a mask that is neither causal nor padding.
    """
    arrays = {argument: x if x.dtype.kind in "fbiu" else x.astype(np.float32) for argument, x in given.items()}
    is_causal = bool(arrays.get("is_causal", False))
    if "bias" in arrays:
        raise ValueError(f"layer {name!r} has a bias of its logits, which files of q, k and v cannot represent")
    batch, num_keys = arrays["k"].shape[:-3], arrays["k"].shape[-3]
    mask = arrays.pop("mask", None)
    if mask is not None:
        padding, causal = None, False
        try:
            padding, causal = without_causality(name, as_boolean(jnp.asarray(mask)), "as_is_causal")
        except NotImplementedError:
            padding = jnp.asarray(mask)
        if padding is not None:
            if any(n != 1 for n in padding.shape[-3:-1]):
                raise ValueError(
                    f"layer {name!r} has a mask of shape {list(mask.shape)} that is neither causal nor padding, which "
                    "files of q, k and v cannot represent"
                )
            real = padding if padding.ndim < 3 else padding[..., 0, 0, :]
            arrays["mask"] = np.broadcast_to(np.asarray(real), (*batch, num_keys)).reshape(-1, num_keys)
        is_causal = is_causal or causal
    if "key_value_seq_lengths" in arrays:
        real = np.arange(num_keys) < arrays["key_value_seq_lengths"].reshape(-1, 1)
        arrays["mask"] = arrays.get("mask", True) & np.broadcast_to(real, (math.prod(batch), num_keys))
    return {**arrays, "is_causal": np.asarray(is_causal)}


def check_mask(
    name: str, mask: Array | None, is_causal: bool, num_queries: int, num_keys: int, *, dense: bool = False
) -> bool:
    """Whether attention is causal in addition to the mask. Raises for a mask that the method does not support.

    Flax's own cache calls with one query, all keys, and a mask of the keys generated so far. That mask replaces
    causality: aligned top left, a single causal query would see the first key only.

    Args:
        name: name of the method.
        mask: boolean, broadcastable to ``[B, N, T, S]``.
        is_causal: whether causal attention is requested.
        num_queries: T.
        num_keys: S.
        dense: whether the method supports every mask.

    Raises:
        NotImplementedError: the mask differs between queries or heads.
        ValueError: a single causal query has many keys and no mask.
    """
    if is_causal and num_queries == 1 and num_keys > 1:
        if mask is None:
            raise ValueError(f"is_causal with one query and {num_keys} keys would hide all keys but the first")
        is_causal = False
    if mask is None or dense:
        return is_causal
    padded = (1,) * (4 - mask.ndim) + mask.shape
    if padded[-2] != 1 or padded[-3] != 1:
        raise NotImplementedError(
            f"method {name!r} does not support a mask that differs between queries or heads, got shape {mask.shape}; "
            f"in place of a causal mask pass is_causal=True, or make ApproxAttention with causal_mask='as_is_causal'; "
            f"and padding as [B, 1, 1, S]: make_attention_mask(jnp.ones((B, 1)), is_real)"
        )
    return is_causal


def real_tokens(mask: Array, batch_size: int, num_tokens: int) -> tuple[Array, Array]:
    """The number of real tokens of a call while decoding, and whether they all stand before the padding.

    Args:
        mask: boolean ``[B, 1, 1, T]``, or a shape that broadcasts to it.
        batch_size: the number B of sequences.
        num_tokens: the number T of tokens of the call.

    Returns:
        The numbers, int32 ``[B]``, and booleans ``[B]``.

    Raises:
        ValueError: the mask has another shape, or a concrete mask has real tokens after padding.
    """
    sizes = batch_size, 1, 1, num_tokens
    if mask.ndim > 4 or any(n not in (1, size) for n, size in zip(mask.shape[::-1], sizes[::-1], strict=False)):
        raise ValueError(
            f"while decoding, a mask marks the real tokens of this call: it must be [B, 1, 1, T] = "
            f"{list(sizes)}, got shape {mask.shape}"
        )
    real = jnp.broadcast_to(mask, sizes)[:, 0, 0]
    first = ~(real[:, 1:] & ~real[:, :-1]).any(-1)
    if not isinstance(first, Tracer) and not first.all():
        raise ValueError("while decoding, padding must be on the right: a mask must hide the last tokens of a sequence")
    return real.sum(-1, dtype=jnp.int32), first


def matmul_precision(precision: PrecisionLike) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products use Flax's ``precision``.

    Raises:
        NotImplementedError: there is one precision for each of two operands.
    """
    if precision is None:
        return contextlib.nullcontext()
    if isinstance(precision, jax.lax.Precision):
        precision = precision.name.lower()
    if not isinstance(precision, str):
        raise NotImplementedError(f"precision must be one jax.lax.Precision or its name, got {precision!r}")
    return jax.default_matmul_precision(precision)


def promoted(arrays: tuple[Array, ...], dtype: Dtype | None) -> tuple[Array, ...]:
    """Arrays cast to Flax's computation dtype, or promoted to one dtype."""
    common = jnp.result_type(*arrays) if dtype is None else dtype
    return tuple(x.astype(common) for x in arrays)
