"""Argument checks, and the preparation of one head's tensors that all methods share."""

import difflib
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from approx_attention.kernels import accumulation_dtype

# The largest count: token positions and array sizes are int32.
MOST_COUNT = 2**31 - 1

# The longest excerpt of a given value in error messages.
SHOWN = 80


class InputError(ValueError):
    """Invalid input. The message is one line that names the given and the allowed values."""


def head_inputs(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | Array | None = None,
    kv_mask: Array | None = None,
    is_causal: bool = False,
) -> tuple[Array, Array, Array]:
    """Check one head's tensors, cast them to the accumulation dtype, fold in the scale and zero the padding.

    Zeroed padding contains no NaN. A method must still exclude masked keys from its sums by ``kv_mask``.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        kv_mask: boolean ``[S]``, true where a key is real.
        is_causal: the option of the method, a bool known when tracing.

    Returns:
        ``q, k, v`` in float32 (float64 if an input is), with logits ``q @ k.T``.

    Raises:
        ValueError: shapes that do not match.
        TypeError: tensors that are not floating point, a mask that is not boolean, ``is_causal`` that is not a bool.
    """
    q, k, v = checked_inputs(q, k, v, kv_mask=kv_mask, is_causal=is_causal)
    dtype = accumulation_dtype(q, k, v)
    q, k = fold_scale(q.astype(dtype), k.astype(dtype), scale)
    return q, k, v.astype(dtype)


def checked_inputs(
    q: Array, k: Array, v: Array, *, kv_mask: Array | None = None, is_causal: bool = False
) -> tuple[Array, Array, Array]:
    """One head's tensors with zeroed padding, unscaled and in their own dtypes.

    Arguments and errors are those of `head_inputs`.

    Returns:
        ``q [T, D]``, and ``k [S, D]`` and ``v [S, Dv]`` with zeros where ``kv_mask`` is false.
    """
    check_head(q, k, v, kv_mask=kv_mask, is_causal=is_causal)
    return q, *zero_padding(k, v, kv_mask)


def check_head(q: Any, k: Any, v: Any, *, kv_mask: Any = None, is_causal: Any = False) -> None:
    """Run the checks of `head_inputs`."""
    check_flag("is_causal", is_causal)
    for name, x, axes in (("q", q, "[T, D]"), ("k", k, "[S, D]"), ("v", v, "[S, Dv]")):
        check_rows(name, x, axes)
    check_key_value_fit(q, k, v)
    if kv_mask is not None:
        check_kv_mask(kv_mask, k.shape[0])


def fold_scale(q: Array, k: Array, scale: float | Array | None = None) -> tuple[Array, Array]:
    r"""Fold the scale of the logits into queries and keys, so that logits are plain dot products.

    .. math:: q \mapsto \sqrt{s}\, q, \qquad k \mapsto \sqrt{s}\, k.

    Summaries and certificates use this scaled space.

    Args:
        q: queries ``[..., D]``.
        k: keys ``[..., D]``.
        scale: a positive number s, ``1/sqrt(D)`` by default.

    Returns:
        The scaled queries and keys, in their own dtypes.

    Raises:
        TypeError: queries or keys are not floating point, or the scale is not one number.
        ValueError: queries or keys are scalars, or the scale is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> q, k = fold_scale(jnp.ones((1, 4)), jnp.ones((1, 4)))
        >>> float((q @ k.T)[0, 0])
        2.0
    """
    for name, x in (("q", q), ("k", k)):
        check_floating(name, x)
        if x.ndim == 0:
            raise ValueError(f"{name} must be [..., D], got shape ()")
    root = jnp.sqrt(jnp.asarray(logit_scale(scale, q.shape[-1]), accumulation_dtype(q, k)))
    return q * root.astype(q.dtype), k * root.astype(k.dtype)


def logit_scale(scale: Any, head_dim: int) -> float | Array:
    """The checked factor of the logits.

    Args:
        scale: one positive, finite number, possibly traced; None for the default.
        head_dim: the number D of channels.

    Returns:
        The given scale, or :math:`D^{-1/2}`.

    Raises:
        TypeError: not one real number.
        ValueError: a concrete scale that is not positive and finite.
    """
    if scale is None:
        return 1 / math.sqrt(head_dim)
    check_scale(scale)
    return scale


def zero_padding(k: Array, v: Array, kv_mask: Array | None) -> tuple[Array, Array]:
    """Zero the padding of keys and values, so that a NaN there cannot reach a sum or a gradient."""
    if kv_mask is None:
        return k, v
    real = kv_mask[:, None]
    return jnp.where(real, k, jnp.zeros_like(k)), jnp.where(real, v, jnp.zeros_like(v))


def check_tokens(k: Any, v: Any, kv_mask: Any = None) -> None:
    """Raise unless k and v are floating-point rows of the same tokens, and ``kv_mask`` is a mask of these tokens.

    Raises:
        TypeError: keys or values that are not floating point, a mask that is not boolean.
        ValueError: keys or values with other than two axes; different numbers of keys, values and mask entries.
    """
    check_rows("k", k, "[S, D]")
    check_rows("v", v, "[S, Dv]")
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"k and v must have the same number of tokens, got {k.shape[0]} and {v.shape[0]}")
    if kv_mask is not None:
        check_kv_mask(kv_mask, k.shape[0])


def check_rows(name: str, x: Any, axes: str) -> None:
    """Raise unless ``x`` is a floating-point array with two axes.

    Args:
        name: name of the argument, for error messages.
        x: the value to check.
        axes: the expected shape in the message, such as ``"[T, D]"``.

    Raises:
        TypeError: not a floating-point array.
        ValueError: another number of axes.
    """
    check_array(name, x, "a floating-point array")
    if x.ndim != 2:
        raise ValueError(f"{name} must be {axes}, one head without batch axes; got shape {x.shape}")


def real_keys(kv_mask: Array | None, num_keys: int) -> Array:
    """The mask of real keys ``[S]``: all true without a ``kv_mask``."""
    return jnp.ones(num_keys, bool) if kv_mask is None else kv_mask


def token_sums_inputs(k: Array, v: Array, kv_mask: Array | None) -> tuple[Array, Array]:
    """The checked keys and values of a summary, in the accumulation dtype, with zeros in padding.

    Args:
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        kv_mask: true where a key is real ``[S]``; None if all are.

    Returns:
        Keys and values in float32, or in float64 if one of them is.

    Raises:
        TypeError: as `check_tokens`.
        ValueError: as `check_tokens`.
    """
    check_tokens(k, v, kv_mask)
    dtype = accumulation_dtype(k, v)
    return zero_padding(k.astype(dtype), v.astype(dtype), kv_mask)


def check_array(name: str, x: Any, kind: Literal["a floating-point array", "integers"]) -> None:
    """Raise ``TypeError`` unless ``x`` is an array of this kind of numbers."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"{name} must be {kind}, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.integer if kind == "integers" else jnp.floating):
        raise TypeError(f"{name} must be {kind}, got dtype {x.dtype}")


def check_floating(name: str, x: Any) -> None:
    """Raise ``TypeError`` unless ``x`` is a floating-point array."""
    check_array(name, x, "a floating-point array")


def check_floats(**arrays: Any) -> None:
    """Raise ``TypeError``, naming the argument, unless each is None or a floating-point array."""
    for name, x in arrays.items():
        if x is not None:
            check_floating(name, x)


def check_noise(noise: Any, num_keys: int | None = None) -> None:
    """Raise unless ``noise`` is None or has one floating-point number per key.

    Args:
        noise: the value to check.
        num_keys: the number S of keys; None if it is unknown.

    Raises:
        TypeError: not a floating-point array.
        ValueError: noise that is not ``[S]``.
    """
    if noise is None:
        return
    check_floating("noise", noise)
    if num_keys is not None and noise.shape != (num_keys,):
        raise ValueError(f"noise must be [S] = [{num_keys}], got shape {noise.shape}")
    if noise.ndim != 1:
        raise ValueError(f"noise must be [S], got shape {noise.shape}")


def check_float_tuple(name: str, given: Any, length: int = 2) -> None:
    """Raise ``TypeError`` unless ``given`` is None or a tuple of ``length`` floating-point arrays."""
    if given is None:
        return
    if not isinstance(given, tuple) or len(given) != length:
        raise TypeError(f"{name} must be a tuple of {length} floating-point arrays, got {shown(given)}")
    for x in given:
        check_floating(name, x)


def check_number(name: str, x: Any) -> None:
    """Raise ``TypeError`` unless ``x`` is one real number: a Python or numpy number, or an array without axes."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(f"{name} must be one number, got {type(x).__name__}")
    if shape != ():
        raise TypeError(f"{name} must be one number, got shape {shape}")
    check_real(name, dtype)


def known_number(name: str, x: Any) -> float:
    """Return ``x`` as a float, if it is one real number known when tracing.

    Raises:
        TypeError: a traced value, or not one real number.

    Example:
        >>> import numpy as np
        >>> known_number("bound", np.int32(3)), known_number("bound", 10**400)
        (3.0, inf)
    """
    if isinstance(x, Tracer):
        raise TypeError(f"{name} must be a number known when tracing, got {type(x).__name__}")
    check_number(name, x)
    return _as_float(x)


def _as_float(x: Any) -> float:
    """A number of any kind as a float; infinite if it overflows."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def check_real(name: str, dtype: Any) -> None:
    """Raise ``TypeError`` unless the dtype is real."""
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be real, got dtype {dtype}")


def check_scale(scale: Any) -> None:
    """Raise unless ``scale`` is one number; a concrete scale must be positive and finite."""
    check_number("scale", scale)
    _check_values("scale", scale, ("positive and finite", lambda x: (x > 0) & (x < np.inf)))


def check_positive(name: str, x: Any) -> None:
    """Raise unless the number or array ``x``, if concrete, is positive and finite."""
    _check_values(name, x, ("positive", lambda x: x > 0), ("finite", np.isfinite))


def check_not_negative(name: str, x: Any) -> None:
    """Raise unless the number or array ``x``, if concrete, is finite and not negative."""
    _check_values(name, x, ("finite and not negative", lambda x: (x >= 0) & (x < np.inf)))


def check_share(name: str, x: Any) -> None:
    """Raise unless the number or array ``x``, if concrete, is from 0 to 1."""
    _check_values(name, x, ("from 0 to 1", lambda x: (x >= 0) & (x <= 1)))


def check_finite(name: str, x: Any) -> None:
    """Raise unless the number or array ``x``, if concrete, is finite."""
    _check_values(name, x, ("finite", np.isfinite))


def _check_values(name: str, x: Any, *rules: tuple[str, Callable[[np.ndarray], Any]]) -> None:
    if getattr(x, "shape", ()) == ():
        check_number(name, x)
    else:
        check_real(name, x.dtype)
    # Traced arrays, and arrays on other hosts, have no values to check.
    if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    numbers = np.asarray(_as_float(x) if isinstance(x, int) else x, np.float64)
    for allowed, holds in rules:
        bad = numbers[~holds(numbers)]
        if bad.size:
            where = f" in an array of shape {numbers.shape}" if numbers.shape else ""
            given = shown(x) if isinstance(x, int) else float(bad[0])
            raise ValueError(f"{name} must be {allowed}, got {given}{where}")


def checked_soft_cap(logits_soft_cap: Any) -> float | None:
    """Return the cap of logits as a float if it is None or a positive, finite number known when tracing."""
    if logits_soft_cap is None:
        return None
    logits_soft_cap = known_number("logits_soft_cap", logits_soft_cap)
    check_positive("logits_soft_cap", logits_soft_cap)
    return logits_soft_cap


def check_key_value_fit(q: Array, k: Array, v: Array) -> None:
    """Raise ``ValueError`` unless q and k share the head dimension, and k and v the number of tokens."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must share the head dimension, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"k and v must have the same number of tokens, got {k.shape[0]} and {v.shape[0]}")
    if 0 in (q.shape[0], k.shape[0], q.shape[-1]):
        raise ValueError(f"attention needs at least one query, key and channel; got q {q.shape} and k {k.shape}")


def check_kv_mask(kv_mask: Any, num_keys: int) -> None:
    """Raise unless ``kv_mask`` is boolean ``[num_keys]``."""
    check_mask("kv_mask", kv_mask, num_keys)


def check_mask(name: str, mask: Any, length: int) -> None:
    """Raise unless a token mask is boolean and has one entry for each token.

    Args:
        name: ``"kv_mask"`` or ``"q_mask"``, for error messages.
        mask: the value to check.
        length: the number of keys or of queries.

    Raises:
        TypeError: not a boolean array.
        ValueError: a mask that is not ``[length]``.
    """
    of, axis = ("key", "S") if name == "kv_mask" else ("query", "T")
    if getattr(mask, "dtype", None) != jnp.bool_:
        given = f"dtype {mask.dtype}" if hasattr(mask, "dtype") else type(mask).__name__
        raise TypeError(f"{name} must be a boolean array (true = real {of}), got {given}")
    if mask.shape != (length,):
        raise ValueError(f"{name} must be [{axis}] = [{length}], got shape {mask.shape}")


def check_bias_and_mask(bias: Array | None, mask: Array | None, num_queries: int, num_keys: int) -> None:
    """Raise unless ``bias`` is None or floating point, and ``mask`` None or boolean, each ``[T, S]``.

    Raises:
        TypeError: a bias that is not floating point, a mask that is not boolean.
        ValueError: another shape than ``[num_queries, num_keys]``.
    """
    if bias is not None:
        check_floating("bias", bias)
    if mask is not None and getattr(mask, "dtype", None) != jnp.bool_:
        given = f"dtype {mask.dtype}" if hasattr(mask, "dtype") else type(mask).__name__
        raise TypeError(f"mask must be boolean (true = visible), got {given}; pass an additive mask as bias")
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and x.shape != (num_queries, num_keys):
            raise ValueError(f"{name} must be [T, S] = {[num_queries, num_keys]}, got shape {x.shape}")


def check_count(name: str, value: Any, least: int = 1, most: int | None = MOST_COUNT) -> int:
    """Return a count as an int.

    Use the result instead of ``value``: a numpy integer can overflow, and an array is traced in compiled functions.

    Args:
        name: name of the argument, for error messages.
        value: an integer known when tracing: of Python, of numpy, or with ``__index__``; not a bool or an array.
        least: the smallest allowed count.
        most: the largest allowed count, by default that of int32; None for no limit.

    Returns:
        The count.

    Raises:
        TypeError: not such an integer.
        ValueError: a count out of range.

    Example:
        >>> import numpy as np
        >>> check_count("num_features", np.int32(8))
        8
        >>> check_count("num_features", 0)
        Traceback (most recent call last):
        ValueError: num_features must be at least 1, got 0
    """
    if isinstance(value, bool | np.bool_ | Array | np.ndarray) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer known when tracing, got {shown(value)}")
    count = operator.index(value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(count)}")
    if most is not None and count > most:
        limit = "2**31 - 1" if most == MOST_COUNT else most
        raise ValueError(f"{name} must be at most {limit}, got {shown(count)}")
    return count


def check_counts(least: int = 1, most: int | None = MOST_COUNT, **counts: Any) -> tuple[int, ...]:
    """`check_count` for several named arguments with the same limits.

    Returns:
        The counts in the order of the arguments.

    Example:
        >>> check_counts(num_heads=8, head_dim=64)
        (8, 64)
    """
    return tuple(check_count(name, value, least, most) for name, value in counts.items())


def as_pair(name: str, value: Any, least: int = 1) -> tuple[int, int]:
    """Return a tuple or list of two counts as two ints.

    Raises:
        TypeError: not a pair, or of other values than integers known when tracing.
        ValueError: a count below ``least``.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be a pair of integers known when tracing, got {shown(value)}")
    return check_count(name, value[0], least), check_count(name, value[1], least)


def keep_count(record: Any, name: str, least: int = 1) -> None:
    """Check a count in a frozen dataclass, and replace it by an int."""
    object.__setattr__(record, name, check_count(name, getattr(record, name), least))


def keep_number(record: Any, name: str, check: Callable[[str, Any], None]) -> None:
    """Check a number in a frozen dataclass, and replace it by a float: options of compiled programs are hashed."""
    value = known_number(name, getattr(record, name))
    check(name, value)
    object.__setattr__(record, name, value)


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` as a bool if it is known when tracing."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, known when tracing, got {shown(value)}")
    return bool(value)


def check_lengths(name: str, lengths: Any, most: int) -> None:
    """Raise unless lengths are integers, and concrete ones in range.

    Args:
        name: name of the argument, for error messages.
        lengths: an array of any shape.
        most: the largest allowed length; the smallest is 0.

    Raises:
        TypeError: not an array of integers.
        ValueError: a concrete length out of range. Traced lengths are not checked.
    """
    check_array(name, lengths, "integers")
    if not isinstance(lengths, Tracer):
        known = np.asarray(lengths)
        if ((known < 0) | (known > most)).any():
            given = str(known) if known.ndim == 0 else f"{known.min()} to {known.max()}"
            raise ValueError(f"{name} must be from 0 to {most}, got {given}")


def check_length(name: str, length: Any, most: int) -> None:
    """Raise unless a length is one integer; a concrete one must be from 0 to ``most``.

    Raises:
        TypeError: not one integer, of Python or as an array without axes.
        ValueError: a concrete length out of range.
    """
    check_number(name, length)
    if isinstance(length, float):
        raise TypeError(f"{name} must be an integer, got {length}")
    if not isinstance(length, int):
        check_lengths(name, length, most)
    elif not 0 <= length <= most:
        raise ValueError(f"{name} must be from 0 to {most}, got {shown(length)}")


def floating_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """Return a floating-point dtype.

    Args:
        name: name of the argument, for error messages.
        dtype: a dtype, a type or a name, such as ``jnp.bfloat16`` or ``"float32"``.

    Returns:
        The numpy dtype.

    Raises:
        TypeError: not a dtype, or not floating point.

    Example:
        >>> floating_dtype("dtype", "float32")
        dtype('float32')
    """
    try:
        made = np.dtype(dtype) if isinstance(dtype, str | type | np.dtype) else None
    except TypeError:
        made = None
    if made is None or not jnp.issubdtype(made, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {shown(dtype) if made is None else made}")
    return made


def shown(value: Any) -> str:
    """A value on one short line, for error messages."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.number | np.bool_):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check_projection(projection: Any, head_dim: int) -> None:
    """Raise unless ``projection`` is a floating-point matrix of directions.

    Args:
        projection: the value to check, ``[R, D]`` for any R.
        head_dim: the number D of channels.

    Raises:
        TypeError: not a floating-point array.
        ValueError: another shape.
    """
    check_floating("projection", projection)
    if projection.ndim != 2 or projection.shape[1] != head_dim:
        raise ValueError(f"projection must be [R, D] with D = {head_dim}, got shape {projection.shape}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise unless ``value`` is one of the names in ``choices``.

    Args:
        name: name of the argument, for the error message.
        value: the value to check.
        choices: the allowed names.

    Raises:
        ValueError: another value; the message lists the choices and names the nearest one.

    Example:
        >>> check_choice("features", "positiv", ("positive", "relu"))
        Traceback (most recent call last):
        ValueError: features must be one of positive, relu; got 'positiv'; did you mean 'positive'?
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        nearest = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}{nearest}")


def cache_dtype(dtype: Any) -> str:
    """The name of a cache's dtype. Raises ``TypeError`` unless it is float32 or float64."""
    try:
        name = "" if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in ("float32", "float64"):
        raise TypeError(f"dtype of a cache must be float32 or float64, got {shown(dtype)}")
    return name


def check_key(method: str, key: Any) -> Any:
    """Return ``key`` if it is one typed PRNG key.

    Args:
        method: name of the function that needs it, for the error message.
        key: the value to check.

    Returns:
        The key.

    Raises:
        ValueError: None, or an array of keys.
        TypeError: not a typed PRNG key, for example one of ``jax.random.PRNGKey``.
    """
    if key is None:
        raise ValueError(f"{method} is random: pass a key, as in key=jax.random.key(0)")
    if not hasattr(key, "dtype") or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{method} needs a typed PRNG key from jax.random.key, got {getattr(key, 'dtype', type(key))}")
    if key.shape != ():
        raise ValueError(f"{method} needs one PRNG key, got an array of keys of shape {key.shape}; use vmap")
    return key


def unknown(what: str, given: Any, choices: Iterable[str]) -> str:
    """The error message for an unknown name.

    Args:
        what: the kind of name, such as ``"method"``.
        given: the unknown name.
        choices: all known names.

    Returns:
        A message that names the nearest choice, if one is near, and lists all.

    Example:
        >>> unknown("method", "favour", ["exact", "favor"])
        "unknown method 'favour'; did you mean 'favor'? Known: exact, favor."
    """
    choices = list(choices)
    return f"unknown {what} {given!r}{did_you_mean(given, choices) or '.'} Known: {', '.join(choices)}."


def did_you_mean(given: Any, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the choice nearest to ``given``, or an empty string."""
    nearest = difflib.get_close_matches(str(given), list(choices), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
