"""A method, what it can do, and how generic code may use it."""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from approx_attention.core import WeightedKV, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The capabilities of a method; every entry is a fact that tests/contract checks.

    Attributes:
        causal: takes ``is_causal``.
        cross: takes queries of another sequence (T != S).
        padding: takes ``kv_mask``; the values in padding never matter.
        dense_mask: takes ``mask`` and ``bias`` of shape ``[T, S]``.
        soft_cap: takes ``logits_soft_cap``.
        decode: has a running summary, so a cache of bounded size.
        needs_key: is random.
        takes_key: is random with a key, and deterministic without.
        affine: the weights of a query sum to 1.
        convex: answers are averages of values, with weights that are not negative.
        trainable: is made to be learned: arrays that its caller owns take the place of a default.
        normalizer: ``return_state`` gives log-normalisers comparable to those of exact attention, so it merges.
        unbiased: the expectation of numerator and normaliser over keys is the exact one.
        exact_limit: equals exact attention once its size reaches the number of keys.
        subquadratic: makes no array with both a T and an S axis.
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
    """An attention method: its functions, and what generic code has to know about their arguments.

    Attributes:
        function: ``(q, k, v, key, *, ...) -> out`` of one head.
        capabilities: what it can do.
        cost: ``(T, S, D, Dv, size) -> FLOPs`` of the matrix products of its bidirectional form, per head.
        reference: where it comes from.
        size: the hyper-parameter that says how large its summary is, if it has one.
        usual_size: the value at which its cost is shown, and that it has in a comparison with a budget of 256.
        summarize: ``(k, v, key, *, ...) -> summary``, if it answers from a summary of all keys.
        running: ``(head_dim, key, *, ...) -> RunningSummary``, if it can decode.
        certified: ``(head_dim, key, *, max_length, ...) -> CertifiedSummary``, if the running summary, as it is by
            default, has a bound for each query.
        summary: the class of what these make.
        grows: the running summary grows with the number of keys: it needs ``max_length``.
        block: the hyper-parameter that says how long the blocks of its causal form are, if it can decode.
        draw: ``(key, head_dim, *, ...) -> {argument: array}``, if calls can share a random projection.
        noise: arguments that take random arrays made beforehand, in place of a key.
        per_token: arguments that hold one number per key: ``[S]`` for a head, ``[..., S, K]`` for all.
        values: hyper-parameters that are numbers and may be arrays, traced or not, with the check of their values.
        indifferent: arguments that choose an implementation and change no output.
        together: ``(query, key, value, *, ...) -> out`` over all heads ``[B, T, N, D]`` at once, if it has a fused
            kernel for them; returns None where that does not apply.
        is_exact: it is exact attention, by which others are judged.
        windowed: the method that is this one within a window around each query.
        window: ``(arguments, is_causal) -> (left, right)``: how far a query sees, if it sees just the keys so near.
        tokens_seen: ``(arguments, is_causal) -> count``: how many keys a query sees, if these are all a cache needs.
        suits: the kinds of heads that it follows with the least errors, in the words of `diagnose`.
        sharding: how a sequence is spread over devices. ``"summaries"``: each sends the summary of its part.
            ``"prefix"``: the same for the causal form only, as the bidirectional one is no summary of all keys.
            ``"ring"``: keys and values visit each device. ``"halos"``: neighbours send the ends of their parts.
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
        """Makes the summary that a device sends of its part; None if the method does not go over devices that way."""
        if self.sharding in ("ring", "halos") or is_causal:
            return self.running
        return self.summarize or (self.running if self.sharding == "summaries" else None)


def _remembered(read: Callable[[Callable[..., Any]], Any]) -> Callable[[Callable[..., Any]], Any]:
    """Caches what is read of a function for as long as the function lives."""
    known: weakref.WeakKeyDictionary[Callable[..., Any], Any] = weakref.WeakKeyDictionary()

    @functools.wraps(read)
    def cached(function: Callable[..., Any]) -> Any:
        try:
            if function not in known:
                known[function] = read(function)
            return known[function]
        except TypeError:  # no hash, or no weak reference
            return read(function)

    return cached


@_remembered
def defaults(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The parameters of a function and their defaults, `inspect.Parameter.empty` where there is none."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@_remembered
def arguments(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """The arguments that a function of one head has after q, k, v and key; None for one that takes anything."""
    parameters = list(inspect.signature(function).parameters.values())
    if inspect.Parameter.VAR_KEYWORD in [p.kind for p in parameters]:
        return None
    named = [p for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY or i >= 4]
    return tuple([p.name for p in named if p.kind is not p.VAR_POSITIONAL])


def accepted(function: Callable[..., Any], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a method's hyper-parameters that one of its functions takes."""
    taken = defaults(function)
    return {name: value for name, value in hyperparameters.items() if name in taken}


# What `attention` may ask of a method's function, and what its absence is called in an error.
OPTIONS: Mapping[str, str] = {
    "scale": "scale",
    "is_causal": "is_causal",
    "return_state": "return_residual: its normaliser is not comparable to that of exact attention",
    "kv_mask": "padding (a mask over keys or key_value_seq_lengths)",
    "q_mask": "a mask over queries",
    "mask": "a mask that differs between queries or heads",
    "bias": "bias",
}


# Hyper-parameters that mean the same in every method that takes them, and the capability that says which do.
CAPABILITY_OF: Mapping[str, str] = {"logits_soft_cap": "soft_cap"}


def check_hyperparameters(
    name: str, function: Callable[..., Any], given: Iterable[str], *, options: Iterable[str] = ()
) -> None:
    """Raises ``TypeError`` for names that are neither hyper-parameters of the function nor among the ``options``."""
    takes = arguments(function)
    if takes is None:
        return
    own = [argument for argument in takes if argument not in OPTIONS or argument in options]
    for argument in given:
        if argument not in own:
            known = f"it takes {', '.join(own)}" if own else "it takes none"
            raise TypeError(f"method {name!r} has no argument {argument!r}{did_you_mean(argument, own)} ({known})")
