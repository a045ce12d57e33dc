"""Argument checks, and the one way in which a method prepares the tensors of a head."""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


class InputError(ValueError):
    """Input that cannot be used; the message is one line that says what was given and what is allowed."""


def head_inputs(
    q: Array, k: Array, v: Array, *, scale: float | Array | None = None, kv_mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """Checks one head's tensors, casts them to the accumulation dtype, folds the scale in and zeroes the padding.

    Zeroed padding can hold no NaN; a method must still keep masked keys out of its sums by ``kv_mask``.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        kv_mask: boolean ``[S]``, true where a key is real.

    Returns:
        ``q, k, v`` in float32 (float64 where an input is), with logits ``q @ k.T``.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors that are not floating point, a mask that is not boolean.
    """
    for name, x, axes in (("q", q, "[T, D]"), ("k", k, "[S, D]"), ("v", v, "[S, Dv]")):
        check_floating(name, x)
        if x.ndim != 2:
            raise ValueError(f"{name} must be {axes}, one head without batch axes; got shape {x.shape}")
    check_key_value_fit(q, k, v)
    dtype = accumulation_dtype(q, k, v)
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    if kv_mask is not None:
        check_kv_mask(kv_mask, k.shape[0])
    k, v = zero_padding(k, v, kv_mask)
    q, k = fold_scale(q, k, scale)
    return q, k, v


def fold_scale(q: Array, k: Array, scale: float | Array | None = None) -> tuple[Array, Array]:
    r"""Folds the logits' scale into queries and keys alike, so that logits become plain dot products.

    .. math:: q \mapsto \sqrt{s}\, q, \qquad k \mapsto \sqrt{s}\, k.

    Summaries and their certificates live in this scaled space.

    Args:
        q: queries ``[..., D]``.
        k: keys ``[..., D]``.
        scale: a positive number s, ``1/sqrt(D)`` by default.

    Returns:
        The scaled queries and keys, in their own dtypes.

    Raises:
        TypeError: a scale that is not one number.
        ValueError: a scale that is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> q, k = fold_scale(jnp.ones((1, 4)), jnp.ones((1, 4)))
        >>> float((q @ k.T)[0, 0])
        2.0
    """
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    else:
        check_scale(scale)
    root = jnp.sqrt(jnp.asarray(scale, accumulation_dtype(q, k)))
    return q * root.astype(q.dtype), k * root.astype(k.dtype)


def zero_padding(k: Array, v: Array, kv_mask: Array | None) -> tuple[Array, Array]:
    """Keys and values with zeros where ``kv_mask`` says padding, so that no NaN there can reach a sum or a gradient."""
    if kv_mask is None:
        return k, v
    real = kv_mask[:, None]
    return jnp.where(real, k, jnp.zeros_like(k)), jnp.where(real, v, jnp.zeros_like(v))


def real_keys(kv_mask: Array | None, num_keys: int) -> Array:
    """Which keys ``[S]`` are real: all, where there is no ``kv_mask``."""
    return jnp.ones(num_keys, bool) if kv_mask is None else kv_mask


def token_sums_inputs(k: Array, v: Array, kv_mask: Array | None) -> tuple[Array, Array]:
    """Keys and values of a summary in the accumulation dtype, with zeros where ``kv_mask`` says padding."""
    dtype = accumulation_dtype(k, v)
    return zero_padding(k.astype(dtype), v.astype(dtype), kv_mask)


def accumulation_dtype(*tensors: Array) -> Any:
    """float64 where any tensor is float64, else float32."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in tensors) else jnp.float32


def check_floating(name: str, x: Array) -> None:
    """Raises ``TypeError`` unless ``x`` is a floating-point array."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be a floating-point array, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got dtype {x.dtype}")


def check_key_value_fit(q: Array, k: Array, v: Array) -> None:
    """Raises ``ValueError`` unless q and k share the head dimension, and k and v the number of tokens."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must share the head dimension, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"k and v must hold the same tokens, got {k.shape[0]} and {v.shape[0]}")
    if 0 in (q.shape[0], k.shape[0], q.shape[-1]):
        raise ValueError(f"attention needs at least one query, key and channel; got q {q.shape} and k {k.shape}")


def check_kv_mask(kv_mask: Array, num_keys: int) -> None:
    """Raises unless ``kv_mask`` is boolean ``[num_keys]``."""
    if getattr(kv_mask, "dtype", None) != jnp.bool_:
        given = f"dtype {kv_mask.dtype}" if hasattr(kv_mask, "dtype") else type(kv_mask).__name__
        raise TypeError(f"kv_mask must be a boolean array (true = real key), got {given}")
    if kv_mask.shape != (num_keys,):
        raise ValueError(f"kv_mask must be [S] = [{num_keys}], got shape {kv_mask.shape}")


def check_bias_and_mask(bias: Array | None, mask: Array | None, num_queries: int, num_keys: int) -> None:
    """Raises unless ``bias`` is floating point and ``mask`` boolean, each ``[T, S]``, where they are given."""
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and x.shape != (num_queries, num_keys):
            raise ValueError(f"{name} must be [T, S] = {[num_queries, num_keys]}, got shape {x.shape}")
    if bias is not None:
        check_floating("bias", bias)
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean (true = may be seen), got dtype {mask.dtype}; pass an additive one as bias"
        )


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Returns ``value`` if it is an integer of at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer known when tracing, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_scale(scale: Any) -> None:
    """Raises unless ``scale`` is one positive, finite number; that of a tracer is not known."""
    if getattr(scale, "shape", ()) != ():
        raise TypeError(f"scale must be one number, got shape {scale.shape}")
    _check_numbers("scale", scale, "one number", ("positive and finite", lambda x: (x > 0) & (x < np.inf)))


def check_positive(name: str, value: Any) -> None:
    """Raises unless ``value`` is a positive, finite number or an array of them; those of a tracer are not known."""
    _check_numbers(name, value, "a number", ("positive", lambda x: x > 0), ("finite", np.isfinite))


def check_not_negative(name: str, value: Any) -> None:
    """Raises unless ``value`` is a finite number of at least 0 or an array of them; those of a tracer are not known."""
    _check_numbers(name, value, "a number", ("finite", np.isfinite), ("at least 0", lambda x: x >= 0))


def check_finite(name: str, value: Any) -> None:
    """Raises unless ``value`` is a finite number or an array of them; those of a tracer are not known."""
    _check_numbers(name, value, "a number", ("finite", np.isfinite))


def _check_numbers(name: str, value: Any, kind: str, *rules: tuple[str, Callable[[np.ndarray], Any]]) -> None:
    dtype = getattr(value, "dtype", type(value))
    is_real = isinstance(value, int | float | np.number) or hasattr(value, "dtype")
    if not is_real or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be {kind}, got {jnp.dtype(dtype) if is_real else repr(value)}")
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return
    numbers = np.asarray(value, np.float64)
    for allowed, holds in rules:
        bad = numbers[~holds(numbers)]
        if bad.size:
            where = f" in an array of shape {numbers.shape}" if numbers.shape else ""
            raise ValueError(f"{name} must be {allowed}, got {float(bad[0])}{where}")


def check_projection(projection: Array, head_dim: int) -> None:
    """Raises ``ValueError`` unless ``projection`` is ``[R, head_dim]``."""
    if projection.ndim != 2 or projection.shape[1] != head_dim:
        raise ValueError(f"projection must be [R, D] with D = {head_dim}, got shape {projection.shape}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ``ValueError``, naming the choices and the nearest one, unless ``value`` is among them."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}{did_you_mean(value, choices)}")


def check_key(method: str, key: Any) -> Any:
    """Returns ``key`` if it is one typed PRNG key."""
    if key is None:
        raise ValueError(f"{method} is random: pass a key, as in key=jax.random.key(0)")
    if not hasattr(key, "dtype") or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{method} takes a typed PRNG key made by jax.random.key, got {getattr(key, 'dtype', type(key))}"
        )
    if key.shape != ():
        raise ValueError(f"{method} takes one PRNG key, got an array of keys of shape {key.shape}; use vmap")
    return key


def unknown(what: str, given: Any, choices: Iterable[str]) -> str:
    """What to say of a name that is none of the choices: the nearest of them, and all."""
    choices = list(choices)
    return f"unknown {what} {given!r}{did_you_mean(given, choices) or '.'} Known: {', '.join(choices)}."


def did_you_mean(given: Any, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the choice nearest to what was given, or nothing."""
    nearest = difflib.get_close_matches(str(given), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
