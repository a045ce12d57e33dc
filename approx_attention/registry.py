"""The methods by name, with the facts about each that the contract tests check and the README's table prints."""

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention.core import (
    check_finite,
    check_key,
    check_not_negative,
    check_positive,
    check_scale,
    did_you_mean,
    unknown,
)
from approx_attention.coresets import running_coreset
from approx_attention.methods import (
    bigbird,
    block_linformer,
    coreset,
    cosformer,
    draw_favor,
    draw_rfa,
    eva,
    exact,
    exact_together,
    favor,
    hyper_attention,
    importance_sample,
    lara,
    linformer,
    local,
    longformer,
    lsh_top_k,
    mean_pool,
    mean_value,
    nystrom,
    polynomial_attention,
    ra,
    rfa,
    running_block_linformer,
    running_eva,
    running_exact,
    running_favor,
    running_mean_pool,
    running_polynomial,
    running_rfa,
    running_uniform_sample,
    scatterbrain,
    skyformer,
    sparse_coreset,
    summarize_block_linformer,
    summarize_coreset,
    summarize_exact,
    summarize_favor,
    summarize_importance_sample,
    summarize_mean_pool,
    summarize_mean_value,
    summarize_polynomial,
    summarize_uniform_sample,
    svd,
    top_k,
    uniform_sample,
    unreduced_jlt,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a method can do; every entry is a fact that tests/contract checks.

    Attributes:
        causal: takes ``is_causal``.
        cross: takes queries of another sequence (T != S).
        padding: takes ``kv_mask``; what padding holds never matters.
        dense_mask: takes ``mask`` and ``bias`` of shape ``[T, S]``.
        decode: has a running summary, so a cache of bounded size.
        needs_key: is random.
        takes_key: is random with a key, and deterministic without.
        affine: the weights of a query sum to 1.
        convex: answers are averages of values, with weights that are not negative.
        trainable: is made to be learned: arrays that its caller owns take the place of a default.
        normalizer: ``return_state`` gives log-normalisers comparable to those of exact attention, so it merges.
        unbiased: the expectation of numerator and normaliser over keys is the exact one.
        exact_limit: equals exact attention once its size reaches the number of keys.
        subquadratic: holds no array with both a T and an S axis.
        forward_mode: has forward-mode derivatives (`jax.jvp`) with its default arguments; all have reverse mode.
    """

    causal: bool = True
    cross: bool = True
    padding: bool = True
    dense_mask: bool = False
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
    forward_mode: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """An attention method.

    Attributes:
        function: ``(q, k, v, key, *, ...) -> out`` of one head.
        capabilities: what it can do.
        cost: ``(T, S, D, Dv, size) -> FLOPs`` of the matrix products of its bidirectional form, per head.
        reference: where it comes from.
        size: the hyper-parameter that says how large its summary is, if it has one.
        usual_size: the value at which its cost is shown, and that it has in a comparison with a budget of 256.
        summarize: ``(k, v, key, *, ...) -> summary``, if it answers from a summary of all keys.
        running: ``(head_dim, key, *, ...) -> RunningSummary``, if it can decode.
        block: the hyper-parameter that says how long the blocks of its causal form are, if it can decode.
        draw: ``(key, head_dim, *, ...) -> {argument: array}``, if its draw can be shared between calls.
        values: hyper-parameters that are numbers and may be arrays, traced or not, with the check of their values.
        together: ``(query, key, value, *, ...) -> out`` over all heads ``[B, T, N, D]`` at once, if it has a fused
            kernel for them; returns None where that does not apply.
    """

    function: Callable[..., Any]
    capabilities: Capabilities
    cost: Callable[[int, int, int, int, int], float]
    reference: str
    size: str | None = None
    usual_size: int = 256
    summarize: Callable[..., Any] | None = None
    running: Callable[..., Any] | None = None
    block: str = "block_size"
    draw: Callable[..., Any] | None = None
    values: Mapping[str, Callable[[str, Any], None]] = dataclasses.field(default_factory=dict)
    together: Callable[..., Any] | None = None


def svd_flops(rows: int, columns: int) -> float:
    """What a thin singular value decomposition takes (Golub and Van Loan, "Matrix computations", section 8.6)."""
    long, short = max(rows, columns), min(rows, columns)
    return 14 * long * short**2 + 8 * short**3


METHODS: Mapping[str, Method] = types.MappingProxyType(
    {
        "exact": Method(
            function=exact,
            summarize=summarize_exact,
            running=running_exact,
            together=exact_together,
            # The gradient of its tiles is written out by hand, in reverse mode.
            capabilities=Capabilities(
                dense_mask=True, decode=True, unbiased=True, subquadratic=False, forward_mode=False
            ),
            cost=lambda T, S, D, Dv, size: 2 * T * S * (D + Dv),
            reference="Vaswani et al. 2017",
        ),
        "mean_value": Method(
            function=mean_value,
            summarize=summarize_mean_value,
            capabilities=Capabilities(normalizer=False),
            cost=lambda T, S, D, Dv, size: 0,
            reference="baseline",
        ),
        "local": Method(
            function=local,
            size="window_size",
            capabilities=Capabilities(exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * min(2 * size - 1, S) * (D + Dv),
            reference="Beltagy et al. 2020",
        ),
        "longformer": Method(
            function=longformer,
            size="window_size",
            capabilities=Capabilities(exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * (T * min(2 * size - 1 + 4, S) + 4 * S) * (D + Dv),
            reference="Beltagy et al. 2020",
        ),
        "bigbird": Method(
            function=bigbird,
            size="num_random_blocks",
            usual_size=3,
            capabilities=Capabilities(needs_key=True, exact_limit=True),
            # Blocks of 64: three of the window, one that all see, and those at random.
            cost=lambda T, S, D, Dv, size: 2 * (T * min(64 * (4 + size), S) + 64 * S) * (D + Dv),
            reference="Zaheer et al. 2020",
        ),
        "top_k": Method(
            function=top_k,
            size="keys_per_query",
            usual_size=32,
            capabilities=Capabilities(exact_limit=True, subquadratic=False),
            cost=lambda T, S, D, Dv, size: 2 * T * (S * D + min(size, S) * (D + Dv)),
            reference="Gupta et al. 2021",
        ),
        "lsh_top_k": Method(
            function=lsh_top_k,
            size="keys_per_query",
            usual_size=32,
            capabilities=Capabilities(needs_key=True, exact_limit=True),
            # Four rounds of two buckets are looked through.
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (8 * D + D + Dv),
            reference="Kitaev et al. 2020",
        ),
        "uniform_sample": Method(
            function=uniform_sample,
            size="sample_size",
            summarize=summarize_uniform_sample,
            running=running_uniform_sample,
            capabilities=Capabilities(decode=True, needs_key=True, unbiased=True, exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (D + Dv),
            reference="baseline",
        ),
        "mean_pool": Method(
            function=mean_pool,
            size="num_landmarks",
            summarize=summarize_mean_pool,
            running=running_mean_pool,
            capabilities=Capabilities(decode=True, exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (D + Dv),
            reference="Zheng et al. 2023, special case",
        ),
        "coreset": Method(
            function=coreset,
            size="coreset_size",
            summarize=summarize_coreset,
            running=running_coreset,
            values={"query_radius": check_not_negative},
            capabilities=Capabilities(decode=True, needs_key=True, exact_limit=True),
            # Seeding reads keys against twice the coreset, k-means and the Nystrom sums once against it.
            cost=lambda T, S, D, Dv, size: 2 * min(size, S) * (T * (D + Dv) + S * (4 * D + Dv)),
            reference="Liberty et al. 2026, k-means with Nystrom weights",
        ),
        "sparse_coreset": Method(
            function=sparse_coreset,
            size="coreset_size",
            usual_size=8,
            block="window_size",
            capabilities=Capabilities(needs_key=True, exact_limit=True, subquadratic=False),
            # Blocks of 64: three nearby, and the tokens of all.
            cost=lambda T, S, D, Dv, size: 2 * T * (min(192, S) + -(-S // 64) * min(size, 64)) * (D + Dv),
            reference="Chen et al. 2021, with coresets",
        ),
        "hyper_attention": Method(
            function=hyper_attention,
            size="sample_size",
            capabilities=Capabilities(causal=False, needs_key=True, unbiased=True, exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * (min(size, S) + min(256, S)) * (D + Dv),
            reference="Han et al. 2023",
        ),
        "linformer": Method(
            function=linformer,
            size="num_slots",
            capabilities=Capabilities(trainable=True, normalizer=False, exact_limit=True),
            # Of pooling; learned projections cost 2 S R (D + Dv) on top.
            cost=lambda T, S, D, Dv, size: 2 * T * min(size, S) * (D + Dv),
            reference="Wang et al. 2020",
        ),
        "block_linformer": Method(
            function=block_linformer,
            size="slots_per_block",
            usual_size=16,
            summarize=summarize_block_linformer,
            running=running_block_linformer,
            capabilities=Capabilities(decode=True, trainable=True, exact_limit=True, subquadratic=False),
            cost=lambda T, S, D, Dv, size: 2 * T * -(-S // 128) * min(size, 128) * (D + Dv),
            reference="Wang et al. 2020, by blocks",
        ),
        "unreduced_jlt": Method(
            function=unreduced_jlt,
            size="sketch_size",
            capabilities=Capabilities(causal=False, needs_key=True, convex=False, unbiased=True, subquadratic=False),
            cost=lambda T, S, D, Dv, size: 2 * T * S * (D + Dv),
            reference="Wang et al. 2020, theorem 1",
        ),
        "importance_sample": Method(
            function=importance_sample,
            size="sample_size",
            summarize=summarize_importance_sample,
            capabilities=Capabilities(causal=False, needs_key=True, unbiased=True),
            cost=lambda T, S, D, Dv, size: 2 * T * size * (D + Dv),
            reference="Drineas et al. 2006",
        ),
        "favor": Method(
            function=favor,
            size="num_features",
            summarize=summarize_favor,
            running=running_favor,
            draw=draw_favor,
            capabilities=Capabilities(decode=True, needs_key=True, unbiased=True),
            cost=lambda T, S, D, Dv, size: 2 * (T + S) * size * (D + Dv),
            reference="Choromanski et al. 2021",
        ),
        "scatterbrain": Method(
            function=scatterbrain,
            size="num_features",
            # Without the future it is causal favor, whose blocks are the windows.
            running=running_favor,
            block="window_size",
            draw=draw_favor,
            capabilities=Capabilities(decode=True, needs_key=True, unbiased=True),
            cost=lambda T, S, D, Dv, size: 2 * ((T + S) * size + T * min(192, S)) * (D + Dv),
            reference="Chen et al. 2021",
        ),
        "cosformer": Method(
            function=cosformer,
            # Tokens carry no place by themselves: see running_cosformer.
            capabilities=Capabilities(normalizer=False),
            cost=lambda T, S, D, Dv, size: 4 * (T + S) * D * Dv,
            reference="Qin et al. 2022, a kernel of its own",
        ),
        "rfa": Method(
            function=rfa,
            size="num_features",
            running=running_rfa,
            draw=draw_rfa,
            values={"bandwidth": check_finite},
            capabilities=Capabilities(decode=True, needs_key=True, normalizer=False, convex=False),
            cost=lambda T, S, D, Dv, size: 2 * (T + S) * size * (D / 2 + Dv),
            reference="Peng et al. 2021",
        ),
        "ra": Method(
            function=ra,
            size="num_samples",
            usual_size=1,
            capabilities=Capabilities(dense_mask=True, needs_key=True, unbiased=True, subquadratic=False),
            cost=lambda T, S, D, Dv, size: 2 * T * S * (size + 1) * (D + Dv),
            reference="Zheng et al. 2022",
        ),
        "lara": Method(
            function=lara,
            size="num_landmarks",
            values={"correction": check_finite},
            capabilities=Capabilities(causal=False, takes_key=True),
            cost=lambda T, S, D, Dv, size: 2 * (T + S) * min(size, T, S) * (D + Dv),
            reference="Zheng et al. 2022",
        ),
        "eva": Method(
            function=eva,
            size="num_chunks",
            running=running_eva,
            block="window_size",
            capabilities=Capabilities(decode=True, takes_key=True, exact_limit=True),
            cost=lambda T, S, D, Dv, size: 2 * T * (min(size, S) + 64) * (D + Dv),
            reference="Zheng et al. 2023",
        ),
        "nystrom": Method(
            function=nystrom,
            size="num_landmarks",
            values={"ridge": check_positive, "rcond": check_positive},
            capabilities=Capabilities(causal=False, affine=False, convex=False, normalizer=False),
            # Six steps of four products invert the middle matrix.
            cost=lambda T, S, D, Dv, size: 2 * min(size, T, S) * ((T + S) * (D + Dv) + 24 * min(size, T, S) ** 2),
            reference="Xiong et al. 2021",
        ),
        "skyformer": Method(
            function=skyformer,
            size="num_landmarks",
            values={"ridge": check_positive},
            capabilities=Capabilities(causal=False, needs_key=True, affine=False, convex=False, normalizer=False),
            cost=lambda T, S, D, Dv, size: 2 * (T + S) * min(size, T + S) * (D + Dv),
            reference="Chen et al. 2021",
        ),
        "polynomial": Method(
            function=polynomial_attention,
            summarize=summarize_polynomial,
            running=running_polynomial,
            values={"coefficients": check_finite},
            capabilities=Capabilities(decode=True),
            cost=lambda T, S, D, Dv, size: 2 * (T * (Dv + 1) + S * Dv) * math.comb(D + 2, 2),
            reference="Alman and Song 2023",
        ),
        "svd": Method(
            function=svd,
            size="rank",
            capabilities=Capabilities(
                causal=False, affine=False, convex=False, normalizer=False, exact_limit=True, subquadratic=False
            ),
            cost=lambda T, S, D, Dv, size: (
                2 * T * S * (D + min(size, T, S) + Dv) + svd_flops(T, S) * (size < min(T, S))
            ),
            reference="Eckart and Young 1936, cubic yardstick",
        ),
    }
)


def get_method(name: str) -> Method:
    """The registered method of that name.

    Raises:
        ValueError: there is none; the message lists all and names the nearest.
    """
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return METHODS[name]


def draw_per_head(
    name: str,
    method: Method | None,
    rng: Array | None,
    num_kv_heads: int,
    head_dim: int,
    hyperparameters: Mapping[str, Any],
    given: Set[str] = frozenset(),
) -> dict[str, Array]:
    """What each key head draws from, stacked: the draw itself where it can be shared between calls, else a key.

    Args:
        name: what errors call the method.
        method: its entry in `METHODS`; None for a function that has none, whose heads get keys.
        rng: typed PRNG key, or None for nothing.
        num_kv_heads: the number K of key heads, each with a draw of its own.
        head_dim: the number D of channels.
        hyperparameters: those of the method.
        given: names of further arguments that are given.

    Raises:
        ValueError: a random method without ``rng`` and without its noise.
    """
    noise = _NOISE & (hyperparameters.keys() | given)
    if rng is None:
        drawn = noise or not isinstance(hyperparameters.get("sketch", ""), str)
        if method and method.capabilities.needs_key and not drawn:
            raise ValueError(f"method {name!r} is random: pass rng, as in rng=jax.random.key(0)")
        return {}
    check_key(name, rng)
    if method and not (method.capabilities.needs_key or method.capabilities.takes_key):
        return {}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(num_kv_heads))
    draw = method.draw if method else None
    if draw is None or noise:
        return {"key": keys}
    return jax.vmap(lambda key: draw(key, head_dim, **accepted(draw, hyperparameters)))(keys)


# Drawn noise that a caller may pass in place of an rng.
_NOISE = frozenset({"projection", "noise", "blocks"})


# What `attention` may ask of a method's function, and what its absence is called in an error.
OPTIONS: Mapping[str, str] = types.MappingProxyType(
    {
        "scale": "scale",
        "is_causal": "is_causal",
        "return_state": "return_residual: its normaliser is not comparable to that of exact attention",
        "kv_mask": "padding (a mask over keys or key_value_seq_lengths)",
        "q_mask": "a mask over queries",
        "mask": "a mask that differs between queries or heads",
        "bias": "bias",
    }
)


def arguments(function: Callable[..., Any]) -> list[str] | None:
    """What a function of one head takes after q, k, v and key; None for one that takes anything."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [
        p.name
        for i, p in enumerate(parameters)
        if p.kind is p.KEYWORD_ONLY or (i >= 4 and p.kind is p.POSITIONAL_OR_KEYWORD)
    ]


def check_hyperparameters(
    name: str, function: Callable[..., Any], given: Iterable[str], *, options: Iterable[str] = ()
) -> None:
    """Raises ``TypeError`` for what is no hyper-parameter of a method's function, nor among the ``options`` allowed."""
    takes = arguments(function)
    if takes is None:
        return
    own = [argument for argument in takes if argument not in OPTIONS or argument in options]
    for argument in given:
        if argument not in own:
            known = f"it takes {', '.join(own)}" if own else "it takes none"
            raise TypeError(f"method {name!r} has no argument {argument!r}{did_you_mean(argument, own)} ({known})")


def check_values(method: Method | None, given: Mapping[str, Any]) -> None:
    """Raises for numbers in arrays that a method cannot use, while they are known: a compiled method sees tracers."""
    if given.get("scale") is not None:
        check_scale(given["scale"])
    for name, check in method.values.items() if method else ():
        if hasattr(given.get(name), "dtype"):
            check(name, given[name])


def accepted(function: Callable[..., Any], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a method's hyper-parameters that one of its functions takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in hyperparameters.items() if name in parameters}


def capability_table() -> str:
    """The methods and what each can do, as a Markdown table."""
    from tabulate import tabulate  # most who import the methods print no table

    columns = {
        "causal": "causal",
        "cross": "T != S",
        "padding": "padding",
        "dense_mask": "mask, bias",
        "decode": "decode",
        "normalizer": "merges",
        "unbiased": "unbiased",
        "subquadratic": "below T x S",
        "needs_key": "random",
        "takes_key": "may be random",
        "trainable": "learned",
    }
    header = ["method", *columns.values(), "exact at", "FLOPs, n = 4k", "n = 64k", "reference"]
    rows = []
    for name, method in METHODS.items():
        facts = ["x" if getattr(method.capabilities, field) else "" for field in columns]
        limit = "always" if name == "exact" else f"{method.size} = S" if method.capabilities.exact_limit else ""
        rows.append([f"`{name}`", *facts, limit, *(_relative_cost(method, n) for n in (4096, 65536)), method.reference])
    alignment = ["left"] + ["center"] * len(columns) + ["left", "right", "right", "left"]
    return tabulate(rows, header, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def _relative_cost(method: Method, length: int) -> str:
    """Matrix-product FLOPs at head dimension 64 and the usual size, as a share of exact attention's."""
    share = method.cost(length, length, 64, 64, method.usual_size) / METHODS["exact"].cost(length, length, 64, 64, 0)
    return f"{100 * share:.3g}%"
