"""E10: every bidirectional method in place of the attention of a trained sentence encoder, without any training."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from approx_attention.evaluation import BASELINES, default_methods, light_grid, method_styles
from approx_attention.nnx import layer_errors, replace_attention
from approx_attention.registry import METHODS
from experiments.config import Count, Seeded, Several
from experiments.real_models.documents import excerpts
from experiments.real_models.encoder import Encoder, load_encoder
from experiments.results import Frame, Record
from experiments.show import code, having, markdown, parts, pivot, spread

# The size at which methods have their usual size, as in `approx-attention compare`.
USUAL_BUDGET = 256
# Methods above this share of the FLOPs of exact attention are not worth their errors.
CHEAP = 0.5


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Texts and methods.

    Attributes:
        modules: of the standard library, whose docstrings are the texts; two excerpts of each.
        excerpt_length: tokens of an excerpt, at most 512.
        methods: names in `METHODS`; if none, all that cost less than exact attention, and top_k.
        budgets: sizes, of methods whose usual size is 256; others in proportion.
        batch_size: excerpts per call.
    """

    modules: Several[str]
    budgets: Several[Count]
    excerpt_length: Count = 512
    methods: list[str] = dataclasses.field(default_factory=list)
    batch_size: Count = 10


def run(config: Config, directory: pathlib.Path, console: Any) -> list[Record]:
    """Records of three kinds, exact attention first.

    What embeddings have kept, by method and size; errors of attention, by method, size and layer; and by layer and
    head the method with the least error among those that cost at most `CHEAP` of exact attention.
    """
    exact, tokenizer = load_encoder()
    tokens = excerpts(config.modules, config.excerpt_length, tokenizer, of_each=2)
    truth = embeddings(exact, tokens, config.batch_size)
    records: list[Record] = [{"method": "exact", "size": None, "cost": 1.0, **kept(truth, truth)}]
    errors: dict[tuple[str, int | None], np.ndarray] = {}
    for method, size in sizes(config):
        model = nnx.clone(exact)
        options: Any = {} if size is None else {METHODS[method].size: size}
        replace_attention(model, method, rngs=nnx.Rngs(attention=config.seed), **options)
        found = layer_errors(model, exact, batches(tokens, config.batch_size))
        errors[method, size] = of_heads = np.array(list(found.values()))
        figures = {
            "cost": cost(method, size, tokens.shape[1], exact.layers[0].attention.head_dim),
            **kept(embeddings(model, tokens, config.batch_size), truth),
            "attention_error": float(of_heads.mean()),
            "worst_head_error": float(of_heads.max()),
            "heads_beyond_mean_value": int(np.sum(of_heads >= errors["mean_value", None])),
        }
        records.append({"method": method, "size": size, **figures})
        for layer, row in enumerate(of_heads):
            records.append({"method": method, "size": size, "layer": layer, "layer_error": float(row.mean())})
        console.print(f"{method} {size or ''}: cosine {figures['cosine']:.3f}")
    costs: dict[Any, Any] = {(r["method"], r.get("size")): r["cost"] for r in records if "cost" in r}
    return records + list(best_of_heads({of: x for of, x in errors.items() if costs[of] <= CHEAP}))


def best_of_heads(errors: dict[tuple[str, int | None], np.ndarray]) -> Iterator[dict[str, Any]]:
    """For each layer and head the method with the least error, of ``[layers, heads]`` by method and size."""
    least = np.argmin(np.stack(list(errors.values())), axis=0)
    for (layer, head), i in np.ndenumerate(least):
        (method, size), of_heads = list(errors.items())[i]
        trivial = float(errors["mean_value", None][layer, head])
        best = {"best_method": method, "best_size": size, "best_error": float(of_heads[layer, head])}
        yield {"layer": layer, "head": head, "mean_value_error": trivial, **best}


def kept(found: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """What embeddings ``[2 M, width]`` have kept of the exact ones.

    Pairs are those of two excerpts; the partner of an excerpt is the other one of the same module.
    """
    cosine = np.sum(found * truth, axis=-1)
    pairs = np.triu_indices(len(truth), 1)
    correlation: Any = spearmanr((found @ found.T)[pairs], (truth @ truth.T)[pairs])
    nearest, exact_nearest = (_nearest(x) for x in (found, truth))
    return {
        "cosine": float(cosine.mean()),
        "worst_cosine": float(cosine.min()),
        "rank_correlation": float(correlation.statistic),
        "neighbours_kept": float(np.mean(nearest == exact_nearest)),
        "partner_found": float(np.mean(nearest == np.arange(len(truth)) ^ 1)),
    }


def cost(method: str, size: int | None, length: int, head_dim: int) -> float:
    """FLOPs of a method's matrix products over those of exact attention."""
    sizes = length, length, head_dim, head_dim, size or 0
    return METHODS[method].cost(*sizes) / METHODS["exact"].cost(*sizes)


def sizes(config: Config) -> Iterator[tuple[str, int | None]]:
    """Every method with each of its sizes, baselines first."""
    for method in dict.fromkeys((*BASELINES, *(config.methods or (*default_methods(False), "top_k")))):
        usual = METHODS[method].usual_size
        proposed = {max(1, round(budget * usual / USUAL_BUDGET)) for budget in config.budgets}
        yield from ((method, size) for size in (sorted(proposed) if METHODS[method].size else [None]))


def embeddings(model: Encoder, tokens: Array, batch_size: int) -> np.ndarray:
    """The embeddings of all excerpts, ``[2 M, width]``."""
    graphdef, state = nnx.split(model)
    embed = jax.jit(lambda state, batch: nnx.merge(graphdef, state)(batch))
    return np.concatenate([np.asarray(embed(state, batch)) for batch in batches(tokens, batch_size)])


def batches(tokens: Array, batch_size: int) -> list[Array]:
    """The excerpts, some at a time."""
    return [tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size)]


def _nearest(x: np.ndarray) -> np.ndarray:
    """For each embedding the index of the most similar other one."""
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(axis=-1)


FIGURES = {
    "cosine": "cosine",
    "worst_cosine": "worst",
    "rank_correlation": "rank correlation",
    "neighbours_kept": "neighbours kept",
    "partner_found": "partner found",
    "attention_error": "attention error",
}


def table(records: Frame) -> Iterable[str]:
    """Embeddings by method and size, the best first; errors by layer; and the best methods of heads."""
    own = records[records["cost"].notna()]
    rows = []
    for (method, size), of in own.groupby(["method", "size"], sort=False, dropna=False):
        figures = ["" if of[name].isna().any() else spread(list(of[name])) for name in FIGURES]
        rows.append((of["cosine"].mean(), [code(_labelled(method, size)), f"{of['cost'].mean():.2f}", *figures]))
    yield "Embeddings against those of exact attention; *cost*: FLOPs of matrix products over those of exact attention"
    yield markdown(["", "cost", *FIGURES.values()], [row for _, row in sorted(rows, key=lambda row: -row[0])])
    layers = having(records, "layer_error")
    named = layers.assign(method=[_labelled(*row) for row in layers[["method", "size"]].itertuples(index=False)])
    yield "Relative error of the attention, mean over heads, by layer"
    yield pivot(named.assign(layer=named["layer"].astype(int)), "method", "layer", "layer_error", cell=spread)
    best = having(records, "best_method")
    counts = best["best_method"].value_counts()
    wins = ", ".join(f"{code(name)} {count}" for name, count in counts.items())
    yield (
        f"The method with the least error at less than {CHEAP:g} of the cost, of {len(best)} heads: {wins}; mean error "
        f"{best['best_error'].mean():.3f}, of the mean of the values {best['mean_value_error'].mean():.3f}."
    )


def _labelled(method: str, size: float) -> str:
    return method if np.isnan(size) else f"{method} {size:g}"


def figure(records: Frame) -> Figure:
    """Cosine to the exact embedding against the cost, and against the error of the attention."""
    own = having(records[records["method"] != "exact"], "cost", "attention_error")
    drawn = Figure(figsize=(10, 5))
    by_cost, by_error = drawn.subplots(1, 2, sharey=True)
    styles = method_styles(dict.fromkeys(own["method"]))
    for method, of in parts(own, "method"):
        look = {**styles[method], "linestyle": ""}
        by_cost.plot(of["cost"], of["cosine"], label=method, **look)
        by_error.plot(of["attention_error"], of["cosine"], **look)
    by_cost.set(xlabel="FLOPs over those of exact attention", ylabel="cosine to the exact embedding")
    by_error.set(xlabel="relative error of the attention, mean over heads", xscale="log")
    by_error.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    by_error.minorticks_off()
    for axes in (by_cost, by_error):
        light_grid(axes)
    drawn.legend(*by_cost.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return drawn
