"""E10: every bidirectional method in place of the attention of a trained sentence encoder, without any training."""

import ast
import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from scipy.stats import spearmanr

from approx_attention.evaluation import BASELINES, default_methods
from approx_attention.nnx import layer_errors, replace_attention
from approx_attention.registry import METHODS
from experiments.real_models.encoder import Encoder, load_encoder
from experiments.real_models.wordpiece import WordPiece

# The size at which methods have their usual size, as in `approx-attention compare`.
USUAL_BUDGET = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Texts and methods.

    Attributes:
        modules: of the standard library, whose docstrings are the texts; two excerpts of each.
        excerpt_length: tokens of an excerpt, at most 512.
        methods: names in `METHODS`; if none, all that cost less than exact attention, and top_k.
        budgets: sizes, of methods whose usual size is 256; others in proportion.
        batch_size: excerpts per call.
        seed: of random methods.
    """

    modules: tuple[str, ...] = (
        "argparse", "collections", "difflib", "inspect", "logging", "mailbox", "statistics", "subprocess", "tarfile",
        "threading",
    )  # fmt: skip
    excerpt_length: int = 512
    methods: tuple[str, ...] = ()
    budgets: tuple[int, ...] = (32, 64, 128)
    batch_size: int = 10
    seed: int = 0


def run(config: Config, directory: pathlib.Path, console: Any) -> list[dict[str, Any]]:
    """One record for each method and size; the first is that of exact attention."""
    exact, tokenizer = load_encoder()
    tokens = excerpts(config, tokenizer)
    truth = embeddings(exact, tokens, config.batch_size)
    records = [record("exact", None, truth, truth, [[0.0] * layer.attention.num_heads for layer in exact.layers])]
    for method, size in sizes(config):
        model = nnx.clone(exact)
        options = {} if size is None else {METHODS[method].size: size}
        replace_attention(model, method, rngs=nnx.Rngs(attention=config.seed), **options)
        errors = [x.tolist() for x in layer_errors(model, exact, batches(tokens, config.batch_size)).values()]
        records.append(record(method, size, embeddings(model, tokens, config.batch_size), truth, errors))
        console.print(f"{method} {size or ''}: cosine {records[-1]['cosine']:.3f}")
    return records


def record(method: str, size: int | None, found: np.ndarray, truth: np.ndarray, errors: list[list[float]]) -> Any:
    """What embeddings have kept of the exact ones, and the errors of attention ``[layers][heads]`` on exact inputs."""
    cosine = np.sum(found * truth, axis=-1)
    pairs = np.triu_indices(len(truth), 1)
    nearest, exact_nearest = (_nearest(x) for x in (found, truth))
    partner = np.arange(len(truth)) ^ 1
    return {
        "method": method,
        "size": size,
        "cosine": float(cosine.mean()),
        "worst_cosine": float(cosine.min()),
        "rank_correlation": float(spearmanr((found @ found.T)[pairs], (truth @ truth.T)[pairs]).statistic),
        "neighbours_kept": float(np.mean(nearest == exact_nearest)),
        "partner_found": float(np.mean(nearest == partner)),
        "attention_error": float(np.mean(errors)),
        "worst_head_error": float(np.max(errors)),
        **{f"error_of_layer_{i}": float(np.mean(of_heads)) for i, of_heads in enumerate(errors)},
        "error_of_heads": errors,
    }


def sizes(config: Config) -> Iterator[tuple[str, int | None]]:
    """Every method with each of its sizes, baselines first."""
    for method in dict.fromkeys((*BASELINES, *(config.methods or (*default_methods(False), "top_k")))):
        usual = METHODS[method].usual_size
        proposed = {max(1, round(budget * usual / USUAL_BUDGET)) for budget in config.budgets}
        yield from ((method, size) for size in (sorted(proposed) if METHODS[method].size else [None]))


def excerpts(config: Config, tokenizer: WordPiece) -> Array:
    """Two excerpts of each module, one after the other, ``[2 M, T]``.

    Raises:
        ValueError: a module with too little text.
    """
    found, length = [], config.excerpt_length
    for module in config.modules:
        pieces = tokenizer.pieces(documentation(module))
        if len(pieces) < 2 * (length - 2):
            raise ValueError(
                f"two excerpts of {length} tokens need {2 * (length - 2)}, and the docstrings of {module} have "
                f"{len(pieces)}"
            )
        found += [tokenizer.marked(pieces[start:], length) for start in (0, length - 2)]
    return jnp.asarray(found, jnp.int32)


def documentation(module: str) -> str:
    """The docstrings of a module of the standard library, its own first.

    Raises:
        ValueError: it has no source on this machine.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"the standard library here has no source of {module}")
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = ast.walk(ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8")))
    return "\n\n".join(text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node)))


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
