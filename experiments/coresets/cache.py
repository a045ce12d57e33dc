"""A trained model whose cache is compressed: what the tokens after it lose, at prefill and while decoding."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from rich.console import Console

from approx_attention import attend, attention, compress_tokens, exact, fold_scale, merge
from approx_attention.core import causal_state, in_float32
from approx_attention.coresets import ALGORITHMS
from approx_attention.coresets import running_coreset as running
from approx_attention.decoding import HEURISTICS, MATCHING
from approx_attention.evaluation import output_error
from approx_attention.nnx import capture_attention
from experiments import data
from experiments.config import Count, Several, Share, Whole
from experiments.models import attention_layers
from experiments.results import Frame, Record
from experiments.show import curves, having, mean, parts, pivot, spread
from experiments.training import TrainsExact, bits, fit, predict

# The policy under which the cache is a folded coreset that grows with the tokens.
STREAMED = "streamed"
# The mass correction of `compress_tokens`, by what follows a "+" in the name of a policy.
CORRECTIONS: dict[str, Any] = {"": False, "mass": True, "fitted": "fitted"}


def parse_policy(policy: str, *others: str) -> tuple[str, Any]:
    """The name of a policy, and its mass correction.

    Raises:
        ValueError: it is none of: an algorithm, a heuristic, with or without a correction, ``attention_matching``, the
            ``others``.
    """
    name, _, correction = policy.partition("+")
    known = {*ALGORITHMS, *HEURISTICS, *MATCHING, *others}
    if name not in known or correction not in CORRECTIONS or (correction and name not in HEURISTICS):
        raise ValueError(
            f"unknown policy {policy!r}; known are {', '.join(sorted(known))}, and heuristics with +mass or +fitted"
        )
    return name, CORRECTIONS[correction]


@dataclasses.dataclass(frozen=True)
class Config(TrainsExact):
    """What is trained with exact attention, and how its caches are compressed.

    Attributes:
        prefix: tokens whose cache is compressed; what comes after them attends to it.
        policies: names of algorithms, of heuristics, with ``+mass`` for one with mass correction and ``+fitted`` for
            masses that fit all tokens, ``attention_matching``, and ``streamed``, which keeps a window of ``recent``
            tokens and folds all before it into a coreset as they come.
        kept: shares of the prefix that are kept.
        sinks: first tokens kept exactly.
        recent: last tokens kept exactly.
        batches: held-out batches that are scored.
    """

    prefix: Count
    policies: Several[str]
    kept: Several[Share] = dataclasses.field(default_factory=lambda: [0.5, 0.25, 0.125, 0.0625])
    sinks: Whole = 4
    recent: Whole = 16
    batches: Count = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for policy in self.policies:
            parse_policy(policy, STREAMED)


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Bits and accuracy of the targets after the prefix, and the error of the attention there, by policy and share."""
    model, dataset, seconds = fit(config.seeded_training, directory, console)
    batches = data.held_out(dataset, "test", config.training.train.batch, config.batches)
    captured = capture_attention(model, lambda model: predict(model, batches[0]))
    exact = _scores(config, model, batches, _causal)
    records: list[Record] = [{"training_seconds": round(seconds, 1)}, {"policy": "exact", **exact}]
    for policy in config.policies:
        for share in config.kept:
            function = _compressed(config, policy, round(share * config.prefix))
            scores = _scores(config, model, batches, function)
            scores["attention_error"] = _error(config, captured, function)
            records.append({"policy": policy, "share": share, **scores, "lost": scores["bits"] - exact["bits"]})
            console.print(f"{policy}, {share:g}: {scores['bits']:.3f} bits")
    return records


def table(records: Frame) -> Iterable[str]:
    """Bits lost, accuracy and attention error by policy and share, by configuration."""
    for name, own in parts(records):
        exact = own[own["policy"] == "exact"]
        bits, accuracy = (spread(list(exact[figure])) for figure in ("bits", "accuracy"))
        yield f"`{name}`: {bits} bits and accuracy {accuracy} with the exact cache; by the share of the prefix kept"
        shown = having(own, "share").rename(columns={"lost": "bits lost", "attention_error": "error"})
        yield pivot(shown, "policy", "share", ["bits lost", "accuracy", "error"], cell=[spread, mean, mean])


# Bits lost by the share of the prefix that is kept.
figure = functools.partial(
    curves,
    x="share",
    y="lost",
    by="policy",
    labels=("share of the tokens of the prefix that is kept", "bits per token lost after the prefix"),
    ticks=lambda share: f"{100 * share:g} %",
    least=1e-4,
    size=(7.0, 4.0),
)


def _causal(q: Array, k: Array, v: Array, key: Array) -> Array:
    return exact(q, k, v, is_causal=True)


def _compressed(config: Config, policy: str, budget: int) -> Callable[..., Array]:
    """Exact causal attention within the prefix; after it, the compressed prefix and the exact tokens since."""
    prefix = config.prefix
    name, mass_correction = parse_policy(policy, STREAMED)

    def function(q: Array, k: Array, v: Array, key: Array) -> Array:
        if name == STREAMED:
            # The two blocks that a query sees exactly and the coreset together are the budget.
            block = max(1, config.recent // 2)
            scaled_q, scaled_k = fold_scale(q, k)
            folded = running(q.shape[1], key, coreset_size=max(1, budget - 2 * block))
            return causal_state(scaled_q, scaled_k, v, folded, block_size=block).out
        small = compress_tokens(
            k[:prefix],
            v[:prefix],
            key,
            budget=budget,
            policy=name,
            queries=q[:prefix],
            sinks=config.sinks,
            recent=min(config.recent, budget - config.sinks - 1),
            mass_correction=mass_correction,
        )
        since = exact(q[prefix:], k[prefix:], v[prefix:], is_causal=True, return_state=True)
        after = merge(attend(q[prefix:], small), since).out
        return jnp.concatenate([exact(q[:prefix], k[:prefix], v[:prefix], is_causal=True), after])

    return function


def _scores(config: Config, model: nnx.Module, batches: Any, function: Callable[..., Array]) -> dict[str, float]:
    rng = jax.random.key(config.seed)

    def answer(query: Array, key: Array, value: Array, **_: Any) -> Array:
        return attention(query, key, value, method=function, rng=rng)

    changed = nnx.clone(model)
    for layer in attention_layers(changed).values():
        layer.attention_fn = nnx.static(answer)
    score = nnx.jit(bits)
    parts = [[np.asarray(x)[:, config.prefix :] for x in score(changed, batch)] for batch in batches]
    entropy, right, asked = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return {"bits": float(entropy[asked].mean()), "accuracy": float(right[asked].mean())}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _answers(q: Array, k: Array, v: Array, function: Callable[..., Array], seed: int) -> Array:
    return attention(q, k, v, method=function, rng=jax.random.key(seed))


def _error(config: Config, captured: Any, function: Callable[..., Array]) -> float:
    """Mean relative error over layers of the attention after the prefix, on the trained model's own tensors."""
    errors = []
    for tensors in captured.values():
        q, k, v = (jnp.asarray(tensors[name], jnp.float32) for name in "qkv")
        out = _answers(q, k, v, function, config.seed)[:, config.prefix :]
        with in_float32():
            truth = _answers(q, k, v, _causal, config.seed)[:, config.prefix :]
        errors.append(float(output_error(out, truth).relative))
    return float(np.mean(errors))
