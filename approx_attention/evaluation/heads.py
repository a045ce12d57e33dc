"""Diagnosis of attention heads: where their weights are, which methods suit them, and which theorems apply."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention import bounds
from approx_attention.core import HIDDEN, InputError, check_layout, fold_scale, in_float32
from approx_attention.evaluation.arms import check_range
from approx_attention.evaluation.files import Tensors
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.real_tokens import query_mask
from approx_attention.evaluation.spectra import left_spectrum, rank_within
from approx_attention.registry import METHODS
from approx_attention.tensor import choose_degree

# The number of initial tokens that trained models use as sinks, the default in `coreset` and `longformer`.
NUM_SINKS = 4
# Descriptions of verdicts. The first one that holds is the verdict; low rank is added. The registry lists the methods
# that suit each verdict (`Method.suits`): those with the smallest errors on such heads of trained models (the guide,
# "Which heads can be approximated").
WORDS = {
    "short": "no more keys than entries of a summary",
    "uniform": "the output is the mean of the values",
    "nearby": "a window is enough",
    "sink + nearby": "a window and the first tokens are enough",
    "few keys": "a few keys of each query, at any position, are enough",
    "diffuse": "more keys share the weight than a summary has entries",
    "low rank": "the weights are a matrix of low rank",
}
LOW_RANK = "low rank"
# Diffuse weights for which fewer samples than keys meet the error; not a verdict.
SAMPLED = "sampled"


@dataclasses.dataclass(frozen=True)
class HeadDiagnosis:
    """The diagnosis of one query head, over all sequences and the analysed queries.

    Attributes:
        head: the index of the head.
        num_keys: the number of real keys of the longest sequence.
        entropy: mean entropy of the weights of a query, in nats.
        effective_keys: exp(entropy): the number of equally weighted keys with this entropy.
        sink_share: the share of the weights on the first four keys.
        heaviest_share: the largest share of one key over all queries.
        window_share: the share of the keys within a window of ``size``, as in `local`.
        top_share: the share of the ``size`` largest weights of each query.
        weight_rank: the rank at which the weights of these queries have an error equal to the tolerance, in the
            Frobenius norm.
        key_rank: the same for the centred keys.
        radius: the largest norm of a query times that of a centred key, times the scale.
        largest_logit: the largest magnitude of a logit of these queries with centred keys.
        key_spread: the largest norm of a key over the median.
        mean_error: relative error of the mean of the visible values.
        window_error: relative error of attention within the window.
        sink_window_error: relative error of attention over the window and the first four keys.
        top_error: relative error of attention over the ``size`` keys with the largest weights.
        rank_error: relative error of the best weights of rank ``size`` for these queries.
        samples: the number of keys of a uniform sample whose error is the tolerance, by the variance of the output.
        theorems: by method, the number of keys, samples or features that its theorem requires; infinite if there is
            no such number, or if it overflows float64.
        vacuous: the methods whose theorem requires at least ``num_keys``.
        verdict: the keys that are sufficient for this head, such as ``"sink + nearby"``.
        methods: methods that suit such a head.
    """

    head: int
    num_keys: int
    entropy: float
    effective_keys: float
    sink_share: float
    heaviest_share: float
    window_share: float
    top_share: float
    weight_rank: int
    key_rank: int
    radius: float
    largest_logit: float
    key_spread: float
    mean_error: float
    window_error: float
    sink_window_error: float
    top_error: float
    rank_error: float
    samples: float
    theorems: dict[str, float]
    vacuous: tuple[str, ...] = ()
    verdict: str = ""
    methods: tuple[str, ...] = ()


@in_float32()
def diagnose(
    tensors: Tensors,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    size: int = 64,
    tolerance: float = 0.1,
    num_queries: int = 512,
    lengths: Any = None,
    mask: Any = None,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> list[HeadDiagnosis]:
    r"""Diagnose each query head: where its weights are, which keys determine its output, and what theory guarantees.

    Verdicts are measured, not guessed from shares: a verdict holds if the ideal method of its kind, with ``size`` keys
    (a window, the largest weights, the best matrix of that rank), has an error of at most ``tolerance``. Low rank needs
    at least ``4 * size`` queries, because the rank of a few queries is small anyway. With weights P and outputs O of
    the analysed queries, a uniform sample of M keys has the error ``tolerance`` (:math:`\epsilon`) for

    .. math:: M = \sum_{tj} n_t P_{tj}^2 \|v_j - O_t\|^2 \Big/ \epsilon^2 \|O\|_F^2.

    Args:
        tensors: query ``[B, T, N, D]``, key ``[B, S, K, D]`` and value ``[B, S, K, Dv]``.
        is_causal: whether query t sees keys j <= t only.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        size: the number of keys of the ideal methods, and the window.
        tolerance: the largest relative error of outputs, also for the theorems.
        num_queries: the largest number of analysed queries per sequence, evenly spread over the real ones. Only their
            weights are computed.
        lengths: real tokens of each sequence, integers ``[B]``.
        mask: true where a key is real, ``[B, S]``, in place of ``lengths`` or with them.
        on_progress: called with the name of the next step, the number of finished steps and their total.

    Returns:
        A `HeadDiagnosis` for each query head.

    Raises:
        InputError: a tolerance or count is out of range, lengths, mask or tensors do not match or are not finite, or no
            query sees a key.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import Tensors, diagnose
        >>> one_hot = 40.0 * jnp.eye(128)[None, :, None]
        >>> (head,) = diagnose(Tensors(one_hot, one_hot, one_hot))
        >>> head.verdict, round(head.effective_keys, 3), head.weight_rank
        ('nearby', 1.0, 127)
    """
    check_range("size", size, 1, 2**20)
    check_range("num_queries", num_queries, 1, 2**20)
    if not (isinstance(tolerance, int | float) and 0 < tolerance < 1):
        raise InputError(f"tolerance must be between 0 and 1, got {tolerance}")
    try:
        check_layout(*tensors)
        if tensors.query.ndim != 4:
            raise InputError(f"query must be [B, T, N, D], got shape {tensors.query.shape}")
        tensors = Tensors(*(jnp.asarray(x, jnp.float32) for x in tensors))
        query, key = fold_scale(tensors.query, tensors.key, scale)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from None
    problem = Problem.of(Tensors(query, key, tensors.value), is_causal=is_causal, lengths=lengths, mask=mask)
    for name, x in problem.tensors._asdict().items():
        if not bool(jnp.all(jnp.isfinite(x))):
            raise InputError(f"{name} contains numbers that are not finite")
    query, key, value = problem.tensors
    num_heads, group = query.shape[2], query.shape[2] // key.shape[2]
    sequences = _sequences(problem, num_queries)
    measure = functools.partial(_measured, is_causal=is_causal, size=size, error=tolerance)
    heads = []
    for n in range(num_heads):
        on_progress(f"head {n}", n, num_heads)
        parts = [
            _Part(query[b, :, n], key[b, :, n // group], value[b, :, n // group], *sequence)
            for b, sequence in enumerate(sequences)
        ]
        found = [jax.tree.map(np.asarray, measure(*part[:3], *part[4:])) for part in parts]
        heads.append(_diagnosis(n, parts, found, is_causal=is_causal, size=size, error=tolerance))
    on_progress("done", num_heads, num_heads)
    return heads


class _Part(NamedTuple):
    """One head of one sequence: scaled tensors ``[T, D]``, ``[S, D]``, ``[S, Dv]``, and the queries to analyse.

    Attributes:
        is_query: mask of real queries ``[T]``.
        real: mask of real keys ``[S]``.
        rank: the rank of each key among the real ones ``[S]``.
        rows: the analysed queries ``[R]``; if sequences differ in length, the last rows are padding.
        counts: mask of the rows that are not padding ``[R]``.
        place: the rank of each row among the real keys ``[R]``.
    """

    q: Array
    k: Array
    v: Array
    is_query: np.ndarray
    real: np.ndarray
    rank: np.ndarray
    rows: np.ndarray
    counts: np.ndarray
    place: np.ndarray


def _sequences(problem: Problem, num_queries: int) -> list[tuple[np.ndarray, ...]]:
    """The fields of `_Part` after the tensors, for each sequence."""
    num_batches, num_rows = problem.tensors.query.shape[:2]
    num_keys = problem.tensors.key.shape[1]
    real = np.ones((num_batches, num_keys), bool) if problem.kv_mask is None else problem.kv_mask
    is_query = query_mask(problem.kv_mask, num_rows)
    is_query = np.ones((num_batches, num_rows), bool) if is_query is None else is_query
    place = np.broadcast_to(np.arange(num_rows), is_query.shape)
    if problem.is_causal or num_rows == num_keys:
        # Ranks continue after the last key.
        padded = np.pad(real[:, :num_rows], ((0, 0), (0, max(0, num_rows - num_keys))), constant_values=True)
        place = np.cumsum(padded, axis=1) - 1
        is_query = is_query & (place >= 0)
    found = [np.flatnonzero(own) for own in is_query]
    if not all(map(len, found)):
        raise InputError("every sequence must have a query that sees a real key")
    most = min(num_queries, max(map(len, found)))
    sequences = []
    for b, own in enumerate(found):
        count = min(len(own), most)
        rows = own[np.linspace(0, len(own) - 1, count).round().astype(int)]
        rows = np.pad(rows, (0, most - count), mode="edge")
        rank = np.cumsum(real[b]) - 1
        sequences.append((is_query[b], real[b], rank, rows, np.arange(most) < count, place[b, rows]))
    return sequences


@functools.partial(jax.jit, static_argnames=("is_causal", "size", "error"))
def _measured(
    q: Array,
    k: Array,
    v: Array,
    real: Array,
    rank: Array,
    rows: Array,
    counts: Array,
    place: Array,
    *,
    is_causal: bool,
    size: int,
    error: float,
) -> dict[str, Array]:
    """Sums over the queries of one head of one sequence."""
    row, total = counts[:, None], jnp.sum(real, dtype=q.dtype)
    # Weights do not depend on the centre of the keys; logits do.
    centred = jnp.where(real[:, None], k - (jnp.sum(k, axis=0) / total)[None, :], 0)
    mean_value = jnp.sum(v, axis=0) / total
    apart = place[:, None] - rank[None, :]
    seen = real[None, :] & row & ((apart >= 0) if is_causal else True)
    near = seen & (jnp.abs(apart) < size)
    sinks = seen & (rank < NUM_SINKS)[None, :]
    logits = q[rows] @ centred.T

    def weights_of(visible: Array) -> Array:
        # A hidden logit is finite, so that a row without a visible key gives zeros instead of NaN.
        return jnp.where(visible, jax.nn.softmax(jnp.where(visible, logits, HIDDEN), axis=-1), 0)

    weights = weights_of(seen)
    out = weights @ v
    num_seen = jnp.sum(seen, axis=-1, dtype=q.dtype)
    top, best = lax.top_k(weights, min(size, k.shape[0]))
    # By masked weights, which are far fewer numbers than gathered values.
    kept = jnp.put_along_axis(jnp.zeros_like(weights), best, top, axis=-1, inplace=False)
    of_top = kept @ v / jnp.where(counts, jnp.sum(top, axis=-1), 1)[:, None]
    left, spectrum = left_spectrum(weights)
    left, (_, key_spectrum) = left[:, :size], left_spectrum(centred.T)

    def squares(x: Array) -> Array:
        return jnp.sum(jnp.where(row, x, 0) ** 2)

    # |v_j - o_t|^2 by products.
    distance = jnp.sum(v**2, axis=-1)[None, :] - 2 * out @ v.T + jnp.sum(out**2, axis=-1)[:, None]
    return {
        "count": jnp.sum(counts, dtype=q.dtype),
        "entropy": -jnp.sum(jax.scipy.special.xlogy(weights, weights)),
        "sink": jnp.sum(jnp.where(sinks, weights, 0)),
        "window": jnp.sum(jnp.where(near, weights, 0)),
        "top": jnp.sum(top),
        "heaviest": jnp.max(jnp.sum(weights, axis=0)),
        "largest_logit": jnp.max(jnp.where(seen, jnp.abs(logits), 0)),
        "weight_rank": rank_within(spectrum, error),
        "key_rank": rank_within(key_spectrum, error),
        "out": squares(out),
        "mean_error": squares(seen.astype(q.dtype) @ v / jnp.where(counts, num_seen, 1)[:, None] - out),
        "window_error": squares(weights_of(near) @ v - out),
        "sink_window_error": squares(weights_of(near | sinks) @ v - out),
        "top_error": squares(of_top - out),
        # The best weights of a rank are the projection of P on its first left vectors, and so is their output.
        "rank_error": squares(left @ (left.T @ out) - out),
        "samples": jnp.sum(num_seen[:, None] * weights**2 * distance),
        "sketch": bounds.sketch_mse(weights, jnp.where(real[:, None], v - mean_value[None, :], 0), 1),
    }


def _diagnosis(
    head: int, parts: list[_Part], found: list[dict[str, Any]], *, is_causal: bool, size: int, error: float
) -> HeadDiagnosis:
    """The diagnosis of a head from its sums."""
    total = {name: float(sum(np.float64(one[name]) for one in found)) for name in found[0]}
    if not 0 < total["out"] < math.inf:
        raise InputError(f"the outputs of head {head} are all zero or not finite: relative errors are undefined")

    def share(name: str) -> float:
        return total[name] / total["count"]

    def relative(name: str) -> float:
        return math.sqrt(total[name] / total["out"])

    norms = [_norms(part) for part in parts]
    num_keys = max(int(part.real.sum()) for part in parts)
    measured = {name: relative(name) for name in total if name.endswith("_error")}
    theorems = _theorems(
        norms, parts[0].k.shape[1], num_keys, error, sketch=total["sketch"] / (error**2 * total["out"])
    )
    num_rows = max(int(part.counts.sum()) for part in parts)
    words = ["short"] if num_keys <= size else _words(measured, error, has_rank=num_rows >= 4 * size)
    samples = total["samples"] / (error**2 * total["out"])
    # Methods for weights of low rank suit diffuse weights better than methods that choose keys.
    telling = words[1:] if words == ["diffuse", LOW_RANK] else words
    told = {*telling, SAMPLED} if "diffuse" in words and samples < num_keys else set(telling)
    return HeadDiagnosis(
        head=head,
        num_keys=num_keys,
        entropy=share("entropy"),
        effective_keys=math.exp(share("entropy")),
        sink_share=share("sink"),
        heaviest_share=share("heaviest"),
        window_share=share("window"),
        top_share=share("top"),
        weight_rank=round(float(np.median([one["weight_rank"] for one in found]))),
        key_rank=round(float(np.median([one["key_rank"] for one in found]))),
        radius=max(of.radius for of in norms),
        largest_logit=max(float(one["largest_logit"]) for one in found),
        key_spread=max(of.key_spread for of in norms),
        **measured,
        samples=samples,
        theorems=theorems,
        vacuous=tuple(name for name, number in theorems.items() if number >= num_keys),
        verdict=", ".join(words),
        methods=tuple(
            name
            for name, method in METHODS.items()
            if told & set(method.suits) and (method.capabilities.causal or not is_causal)
        ),
    )


def _words(errors: dict[str, float], tolerance: float, *, has_rank: bool) -> list[str]:
    """The first verdict that holds, and low rank if it holds and there are enough queries."""
    enough = {
        "uniform": errors["mean_error"],
        "nearby": errors["window_error"],
        "sink + nearby": errors["sink_window_error"],
        "few keys": errors["top_error"],
    }
    word = next((word for word, own in enough.items() if own <= tolerance), "diffuse")
    is_low = has_rank and word in ("few keys", "diffuse") and errors["rank_error"] <= tolerance
    return [word, *([LOW_RANK] if is_low else [])]


class _Norms(NamedTuple):
    """Norms of one head of one sequence, in scaled space.

    Attributes:
        radius: the largest norm of a query times that of a centred key.
        query: the median norm of queries.
        key: the median norm of centred keys.
        key_spread: the largest norm of a key over the median.
    """

    radius: float
    query: float
    key: float
    key_spread: float


def _norms(part: _Part) -> _Norms:
    q, k = np.asarray(part.q, np.float64)[part.is_query], np.asarray(part.k, np.float64)[part.real]
    queries, keys, centred = (np.linalg.norm(x, axis=1) for x in (q, k, k - k.mean(axis=0)))
    middle = np.median(keys)
    spread = float(keys.max() / middle) if middle > 0 else 1.0
    return _Norms(float(queries.max() * centred.max()), float(np.median(queries)), float(np.median(centred)), spread)


def _theorems(norms: list[_Norms], head_dim: int, num_keys: int, error: float, *, sketch: float) -> dict[str, float]:
    """The size that the theorem of each method requires."""
    # The theorems need a positive radius; their sizes do not depend on a small one.
    radius = max(np.finfo(np.float32).tiny.item(), *(of.radius for of in norms))

    def coreset(result: Any) -> float:
        return bounds.coreset_size_bound(error, radius=radius, head_dim=head_dim, num_keys=num_keys, result=result).size

    # An orthogonal query and key of median norms.
    of_query, of_key = (float(np.median(x)) for x in zip(*((of.query, of.key) for of in norms), strict=True))
    pair = jnp.array([[of_query, 0.0]]), jnp.array([[0.0, of_key]])
    features = float(bounds.favor_mse(*pair, 1, scale=1.0)[0, 0]) / error**2
    try:
        degree = choose_degree(error, radius, head_dim, max_rank=max(num_keys, 1))
        polynomial = float(math.comb(head_dim + degree, degree))
    except ValueError:  # more than the number of keys
        polynomial = math.inf
    return {
        "uniform_sample": coreset("uniform"),
        "coreset": coreset("optimal"),
        "favor": features,
        "polynomial": polynomial,
        "unreduced_jlt": sketch,
        "linformer": bounds.johnson_lindenstrauss_size(max(num_keys, 2), error),
    }
