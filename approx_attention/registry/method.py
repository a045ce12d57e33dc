"""The description of a method for generic code: its functions, capabilities and arguments."""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from approx_attention.core import WeightedKV, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The capabilities of a method; tests/contract checks every entry.

    Attributes:
        causal: it supports ``is_causal``.
        cross: it supports queries of another sequence (T != S).
        padding: it supports ``kv_mask``; values in padding have no effect.
        dense_mask: it supports ``mask`` and ``bias`` of shape ``[T, S]``.
        soft_cap: it supports ``logits_soft_cap``.
        decode: it has a running summary, and so a decoding cache.
        needs_key: it is random.
        takes_key: it is random with a PRNG key, and deterministic without.
        affine: the weights of a query sum to 1.
        convex: outputs are averages of values, with non-negative weights.
        trainable: it is designed for learned parameters, which replace default arguments.
        normalizer: ``return_state`` gives log-normalisers comparable to those of exact attention, so states merge.
        unbiased: numerator and normaliser are unbiased over PRNG keys.
        exact_limit: it equals exact attention when its size reaches the number of keys.
        subquadratic: it makes no array with both a T and an S axis.
    """

    causal: bool = True
    cross: bool = True
    padding: bool = True
    dense_mask: bool = False
    soft_cap: bool = False
    decode: bool = False
    needs_key: bool = False
    takes_key: bool = False
    affine: bool = True
    convex: bool = True
    trainable: bool = False
    normalizer: bool = True
    unbiased: bool = False
    exact_limit: bool = False
    subquadratic: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """An attention method: its functions and the roles of their arguments, for generic code.

    Attributes:
        function: ``(q, k, v, key, *, ...) -> out`` of one head.
        capabilities: the `Capabilities`.
        cost: ``(T, S, D, Dv, size) -> FLOPs`` of the matrix products of the bidirectional form, per head.
        reference: the source of the method.
        size: the hyper-parameter for the size of the summary, if any.
        usual_size: the size for which the cost is shown, and which corresponds to a budget of 256 in comparisons.
        summarize: ``(k, v, key, *, ...) -> summary``, if outputs depend on the keys through a summary only.
        running: ``(head_dim, key, *, ...) -> RunningSummary``, if it can decode.
        certified: ``(head_dim, key, *, max_length, ...) -> CertifiedSummary``, if the default running summary has an
            error bound for each query.
        summary: the class of these summaries.
        grows: whether the running summary grows with the number of keys and needs ``max_length``.
        block: the hyper-parameter for the block size of the causal form, if it can decode.
        draw: ``(key, head_dim, *, ...) -> {argument: array}``, if calls can share a random projection.
        noise: arguments for random arrays in place of a PRNG key.
        per_token: arguments with one number per key: ``[S]`` for a head, ``[..., S, K]`` for all heads.
        values: numeric hyper-parameters that may be arrays, traced or not, with the check of their values.
        indifferent: arguments that choose an implementation and do not change outputs.
        together: ``(query, key, value, *, ...) -> out`` over all heads ``[B, T, N, D]``, if there is a fused kernel; it
            returns None where the kernel does not apply.
        is_exact: whether it is exact attention, the reference for others.
        windowed: the method restricted to a window around each query.
        window: ``(arguments, is_causal) -> (left, right)``: the window, if a query sees only nearby keys.
        tokens_seen: ``(arguments, is_causal) -> count``: the number of keys that a query sees, if a cache needs only
            these.
        suits: the kinds of heads on which it has the smallest errors, as named by `diagnose`.
        sharding: how a sequence is distributed over devices. ``"summaries"``: each device sends the summary of its
            part. ``"prefix"``: the same, but for the causal form only, because the bidirectional form has no summary
            of all keys. ``"ring"``: keys and values visit each device. ``"halos"``: neighbours exchange the ends of
            their parts.
    """

    function: Callable[..., Any]
    capabilities: Capabilities
    cost: Callable[[int, int, int, int, int], float]
    reference: str
    size: str | None = None
    usual_size: int = 256
    summarize: Callable[..., Any] | None = None
    running: Callable[..., Any] | None = None
    certified: Callable[..., Any] | None = None
    summary: type = WeightedKV
    grows: bool = False
    block: str = "block_size"
    draw: Callable[..., Any] | None = None
    noise: tuple[str, ...] = ()
    per_token: tuple[str, ...] = ()
    values: Mapping[str, Callable[[str, Any], None]] = dataclasses.field(default_factory=dict)
    indifferent: tuple[str, ...] = ()
    together: Callable[..., Any] | None = None
    is_exact: bool = False
    windowed: str | None = None
    window: Callable[[Mapping[str, Any], bool], tuple[int, int]] | None = None
    tokens_seen: Callable[[Mapping[str, Any], bool], int] | None = None
    suits: tuple[str, ...] = ()
    sharding: Literal["summaries", "prefix", "ring", "halos"] = "summaries"

    def sender(self, is_causal: bool) -> Callable[..., Any] | None:
        """The function that makes the summary that a device sends; None if the method does not send summaries.

        Args:
            is_causal: whether the attention is causal.
        """
        if self.sharding in ("ring", "halos") or is_causal:
            return self.running
        return self.summarize or (self.running if self.sharding == "summaries" else None)


def _remembered(read: Callable[[Callable[..., Any]], Any]) -> Callable[[Callable[..., Any]], Any]:
    """Cache a property of functions for the lifetime of each function."""
    known: weakref.WeakKeyDictionary[Callable[..., Any], Any] = weakref.WeakKeyDictionary()

    @functools.wraps(read)
    def cached(function: Callable[..., Any]) -> Any:
        try:
            if function not in known:
                known[function] = read(function)
            return known[function]
        except TypeError:  # not hashable, or not weakly referenceable
            return read(function)

    return cached


@_remembered
def defaults(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The parameters of a function and their defaults, `inspect.Parameter.empty` if there is none."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@_remembered
def arguments(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """The arguments of a function of one head after q, k, v and key; None if it accepts any argument.

    Args:
        function: ``(q, k, v, key, *, ...) -> out``.

    Example:
        >>> from approx_attention import mean_value
        >>> from approx_attention.registry import arguments
        >>> "kv_mask" in arguments(mean_value)
        True
    """
    parameters = list(inspect.signature(function).parameters.values())
    if inspect.Parameter.VAR_KEYWORD in [p.kind for p in parameters]:
        return None
    named = [p for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY or i >= 4]
    return tuple([p.name for p in named if p.kind is not p.VAR_POSITIONAL])


def accepted(function: Callable[..., Any], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that a function accepts, for example those of a method that its running summary has too.

    Args:
        function: a function with named arguments.
        hyperparameters: values by name.
    """
    taken = defaults(function)
    return {name: value for name, value in hyperparameters.items() if name in taken}


# Options of `attention` that a method's function may lack, and their descriptions in error messages.
OPTIONS: Mapping[str, str] = {
    "scale": "scale",
    "is_causal": "is_causal",
    "return_state": "return_residual: its normaliser is not comparable to that of exact attention",
    "kv_mask": "padding (a mask over keys or key_value_seq_lengths)",
    "q_mask": "a mask over queries",
    "mask": "a mask that differs between queries or heads",
    "bias": "bias",
}


# Hyper-parameters with one meaning in all methods, and the capabilities of methods that support them.
CAPABILITY_OF: Mapping[str, str] = {"logits_soft_cap": "soft_cap"}


def check_hyperparameters(
    name: str, function: Callable[..., Any], given: Iterable[str], *, options: Iterable[str] = ()
) -> None:
    """Raise unless all names are hyper-parameters of a function, or among the given options.

    Args:
        name: name of the method, for the error message.
        function: the method. With arbitrary keyword arguments it takes every name.
        given: the names to check.
        options: names of options of `attention` that are allowed too.

    Raises:
        TypeError: another name; the message names the nearest argument and lists all.
    """
    takes = arguments(function)
    if takes is None:
        return
    own = [argument for argument in takes if argument not in OPTIONS or argument in options]
    for argument in given:
        if argument not in own:
            known = f"its arguments: {', '.join(own)}" if own else "it has no arguments"
            raise TypeError(f"method {name!r} has no argument {argument!r}{did_you_mean(argument, own)} ({known})")
