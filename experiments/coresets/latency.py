"""How long a cache takes to be compressed, and what a decoding step then costs, against exact attention."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import attend, attention, compress_tokens
from approx_attention.core import each
from approx_attention.evaluation import time_interleaved
from experiments.config import Count, Seeded, Several, Share
from experiments.results import Frame, Record
from experiments.show import curves, having, milliseconds, parts, pivot, thousands

# The whole cache as a summary that holds it.
EVERY_TOKEN = "every token"


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Gaussian tensors of these lengths, compressed to a share of them."""

    lengths: Several[Count]
    policies: Several[str]
    kept: Share = 0.0625
    num_heads: Count = 8
    head_dim: Count = 64
    rounds: Count = 3


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Seconds of compression, of exact attention over the prompt, and of one decoding step with each cache."""
    records: list[Record] = []
    seconds: dict[tuple[str, str], float] = {}
    for length in sorted(config.lengths):
        keys = jax.random.split(jax.random.key(config.seed), 4)
        shape = (length, config.num_heads, config.head_dim)
        q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
        prefill: dict[str, Any] = {"exact": _call(functools.partial(_exact, is_causal=True), q, k, v)}
        last = q[-1:]
        # The whole cache is asked in both ways, and the compressed ones are held to the faster.
        whole = jax.vmap(functools.partial(compress_tokens, budget=length), in_axes=1)(k, v)
        decode: dict[str, Any] = {
            "exact": _call(_exact, last, k, v),
            EVERY_TOKEN: _call(_ask, last, whole),
        }
        for policy in config.policies:
            build = functools.partial(_build, policy, round(config.kept * length))
            prefill[policy] = _call(build, k, v, keys[3])
            decode[policy] = _call(_ask, last, prefill[policy]())
        for name, calls in (("prefill", prefill), ("decode", decode)):
            timings = time_interleaved(calls, rounds=config.rounds, patience=60)
            for policy, timing in timings.items():
                records.append({"stage": name, "policy": policy, "length": length, "seconds": timing.least})
                seconds[name, policy] = timing.least
    # At the longest, which is the last.
    exact = min(seconds["decode", policy] for policy in ("exact", EVERY_TOKEN))
    for policy in config.policies:
        share = seconds["prefill", policy] / seconds["prefill", "exact"]
        records.append({"policy": policy, "decode_speedup": exact / seconds["decode", policy], "build_share": share})
    return records


def table(records: Frame) -> Iterable[str]:
    """Milliseconds of both stages by length."""
    for name, own in parts(having(records, "seconds"), "stage"):
        what = (
            "compression of the cache, and of exact causal attention over the prompt"
            if name == "prefill"
            else "a decoding step, and of an exact one over the whole cache"
        )
        yield f"Milliseconds of {what}, by the number of tokens"
        yield pivot(own, "policy", "length", "seconds", cell=milliseconds)


def figure(records: Frame) -> Figure:
    """Time of both stages by length."""
    times = having(records, "seconds")
    titles = {"prefill": "compression, and exact causal attention", "decode": "one decoding step"}
    return curves(
        times.assign(ms=1e3 * times["seconds"]),
        x="length",
        y="ms",
        by="policy",
        panel="stage",
        labels=("tokens in the cache", "ms"),
        ticks=thousands,
        titles=lambda stage: titles[stage],
    )


def _call(function: Any, *arguments: Any) -> Any:
    """A call of the compiled function with these arguments."""
    return functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)


def _exact(q, k, v, is_causal=False):
    return attention(q, k, v, method="exact", is_causal=is_causal)


def _build(policy, budget, k, v, key):
    def head(args):
        return compress_tokens(*args, budget=budget, policy=policy)

    heads = (jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0), jax.random.split(key, k.shape[1]))
    return each(head, heads)


def _ask(q, small):
    return jax.vmap(lambda q, small: attend(q, small).out, in_axes=(1, 0))(q, small)
