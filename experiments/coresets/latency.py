"""How long a cache takes to be compressed, and what a decoding step then costs, against exact attention."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from approx_attention import attend, attention, compress_tokens
from approx_attention.core import each
from approx_attention.evaluation import time_interleaved
from experiments.config import Count, Seeded, Several, Share

# The whole cache as a summary that holds it.
EVERY_TOKEN = "every token"


@dataclasses.dataclass(frozen=True)
class LatencyConfig(Seeded):
    """Gaussian tensors of these lengths, compressed to a share of them."""

    lengths: Several[Count]
    policies: Several[str]
    kept: Share = 0.0625
    num_heads: Count = 8
    head_dim: Count = 64
    rounds: Count = 3


def run(config: LatencyConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Seconds of compression, of exact attention over the prompt, and of one decoding step with each cache."""
    result: dict[str, Any] = {"prefill": {}, "decode": {}}
    for length in config.lengths:
        keys = jax.random.split(jax.random.key(config.seed), 4)
        shape = (length, config.num_heads, config.head_dim)
        q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
        prefill: dict[str, Any] = {
            "exact": functools.partial(_compiled(functools.partial(_exact, is_causal=True), q, k, v), q, k, v)
        }
        last = q[-1:]
        # The whole cache is asked in both ways, and the compressed ones are held to the faster.
        whole = jax.vmap(functools.partial(compress_tokens, budget=length), in_axes=1)(k, v)
        decode: dict[str, Any] = {
            "exact": functools.partial(_compiled(_exact, last, k, v), last, k, v),
            EVERY_TOKEN: functools.partial(_compiled(_ask, last, whole), last, whole),
        }
        for policy in config.policies:
            build = _compiled(functools.partial(_build, policy, round(config.kept * length)), k, v, keys[3])
            prefill[policy] = functools.partial(build, k, v, keys[3])
            small = build(k, v, keys[3])
            decode[policy] = functools.partial(_compiled(_ask, last, small), last, small)
        for name, calls in (("prefill", prefill), ("decode", decode)):
            timings = time_interleaved(calls, rounds=config.rounds, patience=60)
            for arm, timing in timings.items():
                result[name].setdefault(arm, {})[str(length)] = timing.least
    longest = str(max(config.lengths))
    exact = min(result["decode"][arm][longest] for arm in ("exact", EVERY_TOKEN))
    result["decode_speedup"] = {policy: exact / result["decode"][policy][longest] for policy in config.policies}
    result["build_share"] = {
        policy: result["prefill"][policy][longest] / result["prefill"]["exact"][longest] for policy in config.policies
    }
    return result


def _compiled(function: Any, *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def _exact(q, k, v, is_causal=False):
    return attention(q, k, v, method="exact", is_causal=is_causal)


def _build(policy, budget, k, v, key):
    def head(args):
        return compress_tokens(*args, budget=budget, policy=policy)

    heads = (jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0), jax.random.split(key, k.shape[1]))
    return each(head, heads)


def _ask(q, small):
    return jax.vmap(lambda q, small: attend(q, small).out, in_axes=(1, 0))(q, small)
