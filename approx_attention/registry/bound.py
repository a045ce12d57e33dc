"""Methods bound to hyper-parameters, which are checked once."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention import kernels
from approx_attention.core import (
    HIDDEN,
    AttentionState,
    Block,
    RunningSummary,
    Summary,
    accumulation_dtype,
    check_count,
    check_key,
    check_scale,
    did_you_mean,
    each,
    finite_peak,
    logit_scale,
    real_keys,
    shown,
    split_arrays,
    summary_bytes,
)
from approx_attention.registry.method import (
    CAPABILITY_OF,
    OPTIONS,
    Method,
    accepted,
    arguments,
    check_hyperparameters,
    defaults,
)
from approx_attention.registry.table import METHODS, get_method


@dataclasses.dataclass(frozen=True, eq=False)
class BoundMethod:
    """A method bound to hyper-parameters. Make it with `bind`, which checks them.

    Attributes:
        name: the name of the method in error messages.
        function: ``(q, k, v, key, *, ...) -> out`` of one head.
        hyperparameters: arguments of the function.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.registry import bind
        >>> bound = bind("mean_pool", {"num_landmarks": 4})
        >>> bound.takes("kv_mask"), bound.value("block_size"), bound.is_random
        (True, 128, False)
        >>> bound.held_bytes(1024, 8, 8, jnp.float32, is_causal=False)  # 4 (8 + 8 + 1) numbers
        272
    """

    name: str
    function: Callable[..., Any]
    hyperparameters: Mapping[str, Any]

    # A layer stores it as static data, which JAX compares. Arrays are compared by identity.
    def __hash__(self) -> int:
        return hash((self.name, self.function, frozenset(self.hyperparameters)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoundMethod):
            return NotImplemented
        mine, theirs = self.hyperparameters, other.hyperparameters
        return (self.name, self.function, mine.keys()) == (other.name, other.function, theirs.keys()) and all(
            x is theirs[name] or (not _has_arrays(x) and not _has_arrays(theirs[name]) and x == theirs[name])
            for name, x in mine.items()
        )

    @property
    def registered(self) -> Method | None:
        """The entry of the method in `METHODS`; None for other functions."""
        method = METHODS.get(self.name)
        return method if method and method.function is self.function else None

    @property
    def is_random(self) -> bool:
        """Whether the method needs a PRNG key; False for functions outside `METHODS`."""
        return self.registered is not None and self.registered.capabilities.needs_key

    @property
    def may_be_random(self) -> bool:
        """Whether the method accepts a PRNG key."""
        return self.registered is None or self.is_random or self.registered.capabilities.takes_key

    def takes(self, option: str) -> bool:
        """Whether the function has an argument with this name; true for a function with arbitrary keyword arguments."""
        known = arguments(self.function)
        return known is None or option in known

    def require(self, options: Iterable[str]) -> None:
        """Raise ``NotImplementedError`` for options of `attention` that the method does not support.

        Args:
            options: names of options, such as ``"kv_mask"`` or ``"is_causal"``.
        """
        known, method = arguments(self.function), self.registered
        for option in options:
            no_state = option == "return_state" and method and not method.capabilities.normalizer
            if (known is not None and option not in known) or no_state:
                raise NotImplementedError(f"method {self.name!r} does not support {OPTIONS[option]}")

    def check_values(self, given: Mapping[str, Any]) -> None:
        """Check numbers in arrays, while they are concrete: a compiled method sees tracers.

        Args:
            given: arguments of a call; those of the bound method are checked too.

        Raises:
            ValueError: a number out of range.
            TypeError: an array of another kind.
        """
        if given.get("scale") is not None:
            check_scale(given["scale"])
        method = self.registered
        for name, check in method.values.items() if method else ():
            for values in (given, self.hyperparameters):
                if hasattr(values.get(name), "dtype"):
                    check(name, values[name])

    def value(self, name: str) -> Any:
        """The value of an argument: the given one, or the default of the function; None if there is neither."""
        return self.hyperparameters.get(name, defaults(self.function).get(name))

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The given arguments, and the defaults of the others."""
        return {**defaults(self.function), **self.hyperparameters}

    def of_heads(self, per_head: Any, num_kv_heads: int) -> dict[str, Any]:
        """Check arguments that are stacked over the key heads, and return them.

        Args:
            per_head: arrays, or trees of arrays, ``[K, ...]`` by argument name.
            num_kv_heads: the number K of key heads.

        Raises:
            TypeError: not a mapping of arrays, an unknown argument, or one that is given for all heads too.
            ValueError: an array with another number of heads.
        """
        if not isinstance(per_head, Mapping):
            raise TypeError(f"per_head must be a mapping of names to arrays [K, ...], got {shown(per_head)}")
        known = arguments(self.function)
        for name, x in per_head.items():
            if name in OPTIONS:
                raise TypeError(f"per_head supports arguments of the method only, but {name!r} applies to all heads")
            if known is not None and name not in known:
                raise TypeError(f"method {self.name!r} has no argument {name!r}{did_you_mean(name, known)}")
            if name in self.hyperparameters:
                raise TypeError(f"argument {name!r} is given both per_head and for all heads")
            for leaf in jax.tree.leaves(x):
                expected = f"per_head[{name!r}] must be arrays [K, ...] with K = {num_kv_heads}"
                if not hasattr(leaf, "shape"):
                    raise TypeError(f"{expected}, got {shown(leaf)}")
                if leaf.shape[:1] != (num_kv_heads,):
                    raise ValueError(f"{expected}, got shape {leaf.shape}")
        return dict(per_head)

    def has_noise(self, given: Set[str] = frozenset()) -> bool:
        """Whether the random arrays of the method are among its arguments.

        Args:
            given: names of further arguments of a call.

        Returns:
            True if every random array of a registered method is given; False for a method without any.

        Example:
            >>> import jax.numpy as jnp
            >>> from approx_attention.registry import bind
            >>> bind("favor").has_noise(), bind("favor", {"projection": jnp.eye(4)}).has_noise()
            (False, True)
        """
        # Some noise arguments also accept the name of a kind, which still needs sampling.
        names = self.registered.noise if self.registered else ()
        return bool(names) and all(
            name in given or not isinstance(self.hyperparameters.get(name, ""), str) for name in names
        )

    def draw(
        self, rng: Array | None, num_kv_heads: int, head_dim: int, given: Set[str] = frozenset()
    ) -> dict[str, Array]:
        """Sample the random arrays of each key head, stacked: projections that calls can share, else PRNG keys.

        Args:
            rng: typed PRNG key, or one for each key head ``[K]``; None to sample nothing.
            num_kv_heads: the number K of key heads, which have independent samples.
            head_dim: the number D of channels.
            given: names of other given arguments.

        Returns:
            Arrays ``[K, ...]`` by argument name: the projections, or PRNG keys as ``"key"`` if the method samples in
            every call; empty if there is nothing to sample.

        Raises:
            ValueError: a random method has neither ``rng`` nor its noise.
        """
        method, noise = self.registered, self.has_noise(given)
        if rng is None:
            if self.is_random and not noise:
                raise ValueError(f"method {self.name!r} is random: pass rng, as in rng=jax.random.key(0)")
            return {}
        keys = keys_of_heads(self.name, rng, num_kv_heads)
        if not self.may_be_random:
            return {}
        if method is None or method.draw is None or noise:
            return {"key": keys}
        static, arrays = split_arrays(self.name, accepted(method.draw, self.hyperparameters))
        return _drawn(method.draw, head_dim, static, keys, arrays)

    def projections(self, key: Array, head_dim: int) -> dict[str, Array]:
        """Sample the random projections of one head that calls can share.

        Args:
            key: typed PRNG key.
            head_dim: the number D of channels.

        Returns:
            Arrays by argument name, such as ``{"projection": [R, D]}``; empty for other methods.
        """
        draw = self.registered.draw if self.registered else None
        return draw(key, head_dim, **accepted(draw, self.hyperparameters)) if draw else {}

    def summarize(
        self, k: Array, v: Array, key: Array | None = None, kv_mask: Array | None = None, **random: Array
    ) -> Summary:
        """Summarise all keys of one head.

        Args:
            k: keys ``[S, D]`` in scaled space (`fold_scale`).
            v: values ``[S, Dv]``.
            key: typed PRNG key, if the method is random.
            kv_mask: true where a key is real, ``[S]``.
            **random: random arrays in place of the PRNG key, as from `projections`.

        Returns:
            The summary, for `attend`.

        Example:
            >>> import jax
            >>> from approx_attention import attend, fold_scale
            >>> from approx_attention.registry import bind
            >>> q, k, v = (jax.random.normal(jax.random.key(i), (16, 4)) for i in range(3))
            >>> q, k = fold_scale(q, k)
            >>> attend(q, bind("mean_pool", {"num_landmarks": 4}).summarize(k, v)).out.shape
            (16, 4)
        """
        make = self.registered.summarize if self.registered else None
        assert make is not None, self.name
        return make(k, v, key, kv_mask=kv_mask, **{**accepted(make, self.hyperparameters), **random})

    def running(self, head_dim: int, key: Array | None = None, **random: Array) -> RunningSummary:
        """Make the running summary of one head, for causal attention and decoding.

        Args:
            head_dim: the number D of channels.
            key: typed PRNG key, if the method is random.
            **random: random arrays in place of the PRNG key, as from `projections`.

        Returns:
            The `RunningSummary`, for example for a `Decoder`.
        """
        method = self.registered
        assert method is not None, self.name
        assert method.running is not None, self.name
        make = method.running
        self._require_followed(method, make, "while decoding", random)
        return make(head_dim, key, **{**accepted(make, self.hyperparameters), **random})

    def require_key_bias(self) -> None:
        """Raise unless the method supports a bias of each key, as in `BoundMethod.state_under_bias`.

        Raises:
            NotImplementedError: the method is not in `METHODS`, lacks the capability ``normalizer`` or ``convex``, or
                is exact attention with hyper-parameters.
        """
        if not _answers_under_bias(self.registered):
            able = ", ".join(name for name, other in METHODS.items() if _answers_under_bias(other))
            raise NotImplementedError(
                f"method {self.name!r} does not support a bias of each key; those that do: {able}"
            )
        if self.registered and self.registered.is_exact and self.hyperparameters:
            given = ", ".join(self.hyperparameters)
            raise NotImplementedError(f"method {self.name!r} does not support {given} under a bias of each key")

    def state_under_bias(
        self,
        q: Array,
        k: Array,
        v: Array,
        key_bias: Array | None = None,
        key: Array | None = None,
        *,
        kv_mask: Array | None = None,
        is_causal: bool = False,
        scale: float | Array | None = None,
    ) -> AttentionState:
        r"""Compute attention of one head with a bias on each key's logits.

        .. math:: \mathrm{out}_t = \frac{\sum_j w_{tj}\, e^{b_j} v_j}{\sum_j w_{tj}\, e^{b_j}}, \qquad
                  \mathrm{lse}_t = \mathrm{lse}^w_t + \log \sum_j w_{tj}\, e^{b_j}

        with the weights w of the method. They are the same for all channels of values, so one more channel gives the
        second sum. As a channel of keys, the bias would change their norms, which increases errors of random features.

        Args:
            q: queries ``[T, D]``.
            k: keys ``[S, D]``.
            v: values ``[S, Dv]``.
            key_bias: b ``[S]``, -inf for a hidden key; None for 0.
            key: typed PRNG key, for methods that need one.
            kv_mask: true where a key is real, ``[S]``.
            is_causal: query t sees keys j <= t.
            scale: factor of the logits, ``1/sqrt(D)`` by default.

        Returns:
            The `AttentionState`. A row is NaN if :math:`e^b` of all its visible keys underflows relative to the largest
            one.

        Raises:
            NotImplementedError: the weights of the method may be negative or have another normaliser, or it does not
                support an option.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from approx_attention.registry import bind
            >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
            >>> bias = jnp.log(jnp.arange(1.0, 7.0))
            >>> state = bind("mean_pool", {"num_landmarks": 6}).state_under_bias(q, k, v, bias)
            >>> bool(jnp.allclose(state.out, jax.nn.softmax(q @ k.T / 2 + bias[None]) @ v, atol=1e-5))
            True
        """
        self.require_key_bias()
        asked = {"scale": scale, "is_causal": is_causal or None, "kv_mask": kv_mask}
        options = {name: value for name, value in asked.items() if value is not None}
        self.require(("return_state", *options))
        self.check_values(options)
        if key_bias is not None:
            # NaN must stay visible.
            seen = real_keys(kv_mask, k.shape[0]) & ~(key_bias <= HIDDEN / 2)
            key_bias = jnp.where(seen, key_bias, HIDDEN)
            options["kv_mask"] = seen
        if self.registered and self.registered.is_exact and key_bias is not None:
            right = 0 if is_causal else None
            return kernels.state(q, k, v, key_bias, right=right, scale=logit_scale(scale, q.shape[1]))
        answer = functools.partial(self.function, return_state=True, **self.hyperparameters)
        if key_bias is None:
            return answer(q, k, v, key, **options)
        peak = finite_peak(lax.stop_gradient(jnp.max(key_bias)))
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, key_bias - peak, 0)), 0)[:, None]
        state = answer(q, k, jnp.concatenate([v * weights, weights], axis=1), key, **options)
        empty = jnp.isneginf(state.lse)
        # A sum of 0 over visible keys has underflowed, and becomes NaN.
        total = jnp.where(empty, 1, jnp.where(state.out[:, -1] > 0, state.out[:, -1], jnp.nan))
        return AttentionState(state.out[:, :-1] / total[:, None], state.lse + jnp.log(total) + peak)

    def require_certified(self) -> Method:
        """Return the method's entry in `METHODS`, if its running summary has an error bound for each query.

        Raises:
            NotImplementedError: there is no such bound, or the summary does not support an argument.
        """
        method = self.registered
        if method is None or method.certified is None:
            able = ", ".join(name for name, other in METHODS.items() if other.certified)
            raise NotImplementedError(
                f"method {self.name!r} has no running summary with an error bound for certify; those that do: {able}"
            )
        self._require_followed(method, method.certified, "with certify", self.hyperparameters)
        return method

    def certified(self, head_dim: int, key: Array | None = None, *, max_length: int, **random: Array) -> Any:
        """Make the running clusters of one head with error bounds, a `coresets.CertifiedSummary`.

        Args:
            head_dim: the number D of channels.
            key: typed PRNG key.
            max_length: capacity in tokens.
            **random: random arrays in place of the PRNG key.

        Raises:
            NotImplementedError: as `require_certified`.
        """
        make = self.require_certified().certified
        assert make is not None, self.name
        return make(head_dim, key, **{**accepted(make, self.hyperparameters), **random, "max_length": max_length})

    def _require_followed(self, method: Method, by: Callable[..., Any], when: str, given: Mapping[str, Any]) -> None:
        """Raise ``NotImplementedError`` for an argument that a function lacks, unless it has its default value."""
        taken = defaults(by)
        for name, value in given.items():
            known = name in taken or name == method.block or name in method.indifferent
            if not known and not np.array_equal(value, defaults(method.function)[name]):
                raise NotImplementedError(f"method {self.name!r} does not support {name} {when}, got {shown(value)}")

    @property
    def block_size(self) -> int:
        """Tokens per block of the causal form."""
        assert self.registered is not None
        block = self.registered.block
        return check_count(block, self.value(block)) if self.takes(block) or block in self.hyperparameters else 128

    def held_bytes(self, num_keys: int, head_dim: int, value_dim: int, dtype: Any, *, is_causal: bool) -> int | None:
        """Count the cache bytes per key head and sequence: the size of a summary in place of all keys and values.

        Args:
            num_keys: the number of keys.
            head_dim: channels of keys.
            value_dim: channels of values.
            dtype: dtype of keys and values.
            is_causal: whether to count the whole decoding cache, if the method has one, instead of one summary of all
                keys.

        Returns:
            The bytes, or None if the method has no summary: it reads every key, or its summary depends on the queries.
        """
        method = self.registered
        if method is None:
            return None
        key, held = jax.eval_shape(lambda: jax.random.key(0)), accumulation_dtype(jax.ShapeDtypeStruct((), dtype))
        if is_causal and method.running is not None and method.block in defaults(method.function):
            roomy = dataclasses.replace(self, hyperparameters={"max_length": num_keys, **self.hyperparameters})

            def cache(key: Array) -> Any:
                running = roomy.running(head_dim, key)
                block = Block.empty(self.block_size, head_dim, value_dim, held)
                return block[:2], block[:2], running.read(running.init(value_dim, held))

            return summary_bytes(jax.eval_shape(cache, key))
        if method.summarize is not None:
            tokens = (jax.ShapeDtypeStruct((num_keys, size), dtype) for size in (head_dim, value_dim))
            return summary_bytes(jax.eval_shape(self.summarize, *tokens, key))
        if method.tokens_seen is None:
            return None
        numbers = min(method.tokens_seen(self.arguments, is_causal), num_keys) * (head_dim + value_dim)
        return numbers * jnp.dtype(held).itemsize

    def for_decoding(self, max_length: int | None = None, block_size: int | None = None) -> "BoundMethod":
        """Bind the method for a decoder.

        Args:
            max_length: capacity in tokens, rounded up to whole blocks; summaries of fixed size ignore it.
            block_size: tokens per block; methods whose blocks are set by another argument do not support it.

        Raises:
            NotImplementedError: there is no running summary, or it does not support an argument.
            TypeError: ``max_length`` is missing, or the block size is set by another argument.
        """
        method = self.registered
        if method is None or method.running is None:
            able = ", ".join(name for name, other in METHODS.items() if other.running)
            raise NotImplementedError(
                f"method {self.name!r} has no running summary to decode with; those that do: {able}"
            )
        given = dict(self.hyperparameters)
        if block_size is not None:
            if method.block != "block_size":
                raise TypeError(f"blocks of method {self.name!r} are set by {method.block}, not by block_size")
            given["block_size"] = block_size
        block_size = dataclasses.replace(self, hyperparameters=given).block_size
        if method.block in given:
            given[method.block] = block_size
        taken = defaults(method.running)
        self._require_followed(method, method.running, "while decoding", given)
        if max_length is not None:
            max_length = check_count("max_length", max_length)
        if "max_length" in taken:
            if max_length is not None:
                given["max_length"] = block_size * -(-max_length // block_size)
            elif "max_length" not in given and taken["max_length"] is inspect.Parameter.empty:
                raise TypeError(
                    f"method {self.name!r} keeps every token: pass max_length, the largest number of tokens"
                )
        return dataclasses.replace(self, hyperparameters=given)


def keys_of_heads(name: str, rng: Array, num_kv_heads: int) -> Array:
    """The PRNG key of each key head.

    Args:
        name: name of the method, for error messages.
        rng: one typed PRNG key, which is folded with the number of each head; or one for each key head ``[K]``.
        num_kv_heads: the number K of key heads.

    Returns:
        Typed PRNG keys ``[K]``.

    Raises:
        ValueError: None, or an array of another number of keys.
        TypeError: not a typed PRNG key.
    """
    if getattr(rng, "shape", ()) == (num_kv_heads,) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng
    return jax.vmap(jax.random.fold_in, (None, 0))(check_key(name, rng), jnp.arange(num_kv_heads))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # otherwise the loop would be compiled in every call
def _drawn(
    draw: Callable[..., Any], head_dim: int, static: tuple[tuple[str, Any], ...], keys: Array, arrays: dict[str, Any]
) -> dict[str, Array]:
    """The random projections of each head."""
    return each(lambda key: draw(key, head_dim, **dict(static), **arrays), keys)


def _answers_under_bias(method: Method | None) -> bool:
    """Whether a bias of each key can be applied through the values."""
    return method is not None and method.capabilities.normalizer and method.capabilities.convex


def _has_arrays(value: Any) -> bool:
    return any(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(value))


def bind(
    method: str | Callable[..., Any] | BoundMethod,
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    options: Iterable[str] = (),
) -> BoundMethod:
    """Bind a method to hyper-parameters, and check them.

    Args:
        method: a name in `METHODS`, a function ``(q, k, v, key) -> out`` of one head, or a bound method to which to add
            hyper-parameters.
        hyperparameters: arguments of the method.
        options: names of arguments of `attention` that are also allowed.

    Raises:
        ValueError: the name is unknown.
        TypeError: the method is neither a name nor a function, or it has no such argument.
        NotImplementedError: only other methods have this argument, such as ``logits_soft_cap``.

    Example:
        >>> import jax
        >>> from approx_attention import attention
        >>> from approx_attention.registry import bind
        >>> x = jax.random.normal(jax.random.key(0), (1, 16, 2, 4))
        >>> attention(x, x, x, method=bind("mean_pool", {"num_landmarks": 4})).shape
        (1, 16, 2, 4)
    """
    given = dict(hyperparameters or {})
    if isinstance(method, BoundMethod):
        if not given:
            return method
        bound = dataclasses.replace(method, hyperparameters={**method.hyperparameters, **given})
    elif isinstance(method, str):
        bound = BoundMethod(method, get_method(method).function, given)
    elif callable(method):
        named = (name for name, known in METHODS.items() if known.function is method)
        bound = BoundMethod(next(named, getattr(method, "__name__", type(method).__name__)), method, given)
    else:
        raise TypeError(f"method must be a registered name or a function (q, k, v, key) -> out, got {method!r}")
    for argument, capability in CAPABILITY_OF.items():
        if argument in given and not bound.takes(argument):
            able = ", ".join(name for name, known in METHODS.items() if getattr(known.capabilities, capability))
            raise NotImplementedError(f"method {bound.name!r} does not support {argument}; those that do: {able}")
    check_hyperparameters(bound.name, bound.function, given, options=options)
    return bound
