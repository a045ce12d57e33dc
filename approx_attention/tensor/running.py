"""Causal tensor attention by the polynomial method: running sums, windows, and decoding token by token."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.core import (
    GREATEST_TILE,
    AttentionState,
    FeatureMap,
    check_choice,
    check_count,
    in_blocks,
    normalise,
    out_of_blocks,
    pad_rows,
    sums_of_seen,
    sums_so_far,
    token_sums_inputs,
)
from approx_attention.tensor.inputs import TensorInputs
from approx_attention.tensor.kernels import Kernel
from approx_attention.tensor.polynomials import Coefficients

# Below this size, 512 KB in float32, the terms [chunk, R, Dv + 1] of a causal chunk stay in cache. Larger chunks would
# need fewer steps of the scan, but read their terms from memory.
CHUNK_TERMS = 2**17


class TensorDecoder(NamedTuple):
    """A decoder of causal tensor attention, with a state of constant size.

    `running_tensor_polynomial` makes it, and has an example.

    Attributes:
        init: ``(value_dim, dtype) -> state`` without tokens, by default in the dtype of the kernel.
        step: ``(state, q [b, D], keys, values, masks) -> (state, AttentionState)`` for b more tokens: scaled queries,
            and for each set keys ``[b, D]``, values ``[b, Dv]`` and a mask ``[b]`` or None.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, AttentionState]]


def running_tensor_polynomial(
    head_dim: int,
    *,
    order: int = 3,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | Array | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    features: Any = None,
    is_causal: Literal["both", "ordered"] = "both",
    dtype: Any = jnp.float32,
) -> TensorDecoder:
    r"""Make a decoder by the polynomial method: :math:`O(R D_v)` time and memory per token, at any position.

    With running sums :math:`G^a_i = \sum_{j \le i} U^a_j \hat V^a_j`, the moments of pairs are
    :math:`G^1_i \odot G^2_i` for ``"both"`` and :math:`\sum_{j \le i} (U^1_j \hat V^1_j) \odot G^2_j` for
    ``"ordered"``.

    degree, coefficients, bound, rms, features and is_causal are as in `tensor_polynomial`.

    Args:
        head_dim: the number D of channels.
        order: m, one more than the number of sets of keys.
        dtype: dtype of the state, float32 or float64.

    Returns:
        The `TensorDecoder`; fold the scale into the queries.

    Raises:
        ValueError: an order below 2, an unknown ``is_causal``, incompatible coefficients and bound.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import tensor_polynomial
        >>> from approx_attention.tensor import running_tensor_polynomial
        >>> q, k, l, v, w = (jax.random.normal(jax.random.key(i), (9, 4)) for i in range(5))
        >>> decoder = running_tensor_polynomial(4)
        >>> state = decoder.init(4)
        >>> for i in range(9):
        ...     tokens = [x[i : i + 1] for x in (0.5 * q, k, l, v, w)]
        ...     state, answer = decoder.step(state, tokens[0], tuple(tokens[1:3]), tuple(tokens[3:]))
        >>> whole = tensor_polynomial(q, (k, l), (v, w), is_causal="both")
        >>> bool(jnp.allclose(answer.out[0], whole[-1], atol=1e-5))
        True
    """
    check_choice("is_causal", is_causal, ("both", "ordered"))
    num_sets = check_count("order", order, 2) - 1
    kernel = Kernel.of(head_dim, num_sets, degree, coefficients, bound, rms, features, dtype)
    return _decoder(kernel, is_causal == "ordered")


def _decoder(kernel: Kernel, ordered: bool) -> TensorDecoder:
    """The decoder of a kernel. Its step takes any number of tokens; causal attention scans it over chunks."""

    def init(value_dim: int, dtype: Any = kernel.weights.dtype) -> tuple[Array, ...]:
        return tuple(jnp.zeros((kernel.weights.shape[0], value_dim + 1), dtype) for _ in kernel.key_maps)

    def step(
        sums: tuple[Array, ...],
        q: Array,
        keys: tuple[Array, ...],
        values: tuple[Array, ...],
        masks: tuple[Array | None, ...] | None = None,
    ) -> tuple[tuple[Array, ...], AttentionState]:
        if not len(keys) == len(values) == len(kernel.key_maps):
            raise ValueError(
                f"step needs {len(kernel.key_maps)} sets of keys and of values, got {len(keys)} and {len(values)}"
            )
        after, pairs = [], jnp.ones((), sums[0].dtype)
        # From the last set to the first: with "ordered", the terms of a set are multiplied by the running sums of the
        # next set.
        for a in reversed(range(len(keys))):
            mask = None if masks is None else masks[a]
            terms = _terms(kernel.key_maps[a], *token_sums_inputs(keys[a], values[a], mask), mask)
            running = sums[a][None] + sums_so_far(terms * pairs if ordered else terms)
            after.append(running[-1])
            pairs = running if ordered else pairs * running
        return tuple(reversed(after)), _answer(kernel, q, pairs)

    return TensorDecoder(init, step)


def causal_state_of(kernel: Kernel, inputs: TensorInputs, ordered: bool) -> AttentionState:
    """The causal state, by chunks of tokens with running sums.

    Args:
        kernel: the polynomial, as maps of queries and keys to R features.
        inputs: queries and m - 1 sets of tokens; no query sees a key after position T - 1.
        ordered: whether tuples are those of ``"ordered"`` in `tensor_attention`, else those of ``"both"``.

    Returns:
        The `AttentionState` ``[T]``.
    """
    chunk, tokens = _chunks(kernel, inputs, CHUNK_TERMS)
    decoder = _decoder(kernel, ordered)
    sums = decoder.init(inputs.values[0].shape[1], inputs.q.dtype)
    blocks = jax.tree.map(lambda x: in_blocks(x, chunk), tokens)
    _, state = lax.scan(jax.checkpoint(lambda sums, block: decoder.step(sums, *block)), sums, blocks)
    return out_of_blocks(state, inputs.q.shape[0])


def windowed_state_of(kernel: Kernel, inputs: TensorInputs, widths: tuple[int, ...]) -> AttentionState:
    r"""The windowed state: sums of the chunks that a window covers, and of single tokens at both ends.

    Differences of prefix sums would cancel in low precision; here nothing is subtracted. A window of w tokens up to
    token i of chunk c consists of its part of chunks c - p - 1 and c - p, with
    :math:`p = \lfloor (w - 1) / b \rfloor`, of the whole chunks in between, and of the tokens of chunk c up to i.
    """
    num_queries, dtype = inputs.q.shape[0], inputs.q.dtype
    chunk, tokens = _chunks(kernel, inputs, CHUNK_TERMS // 2)
    whole = [(min(width, num_queries) - 1) // chunk for width in widths]
    shape = kernel.weights.shape[0], inputs.values[0].shape[1] + 1
    rings = tuple(jnp.zeros((max(p - 1, 0), *shape), dtype) for p in whole)
    # A derivative stores the rings of every chunk of a group, and of the first chunk of every group. Groups of the
    # square root of the number of chunks keep both small, at the cost of a second forward pass, which small rings do
    # not need.
    count = -(-num_queries // chunk)
    groups = math.isqrt(count) if count * sum(ring.size for ring in rings) > GREATEST_TILE else 1
    per_group = -(-count // groups)
    count = groups * per_group

    def padded(x: Array, p: int) -> Array:
        before = (p + 1) * chunk
        return jnp.pad(x, ((before, count * chunk - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))

    _, keys, values, masks = tokens
    sets = tuple(
        tuple(padded(x, p) for x in each) for each, p in zip(zip(keys, values, masks, strict=True), whole, strict=True)
    )

    def step(rings: tuple[Array, ...], args: tuple[Array, Array]) -> tuple[tuple[Array, ...], AttentionState]:
        c, q = args
        place = jnp.arange(chunk, dtype=jnp.int32)
        pairs, kept = jnp.ones((), dtype), []
        for key_map, (k, v, mask), p, width, ring in zip(kernel.key_maps, sets, whole, widths, rings, strict=True):
            # Positions relative to the first token of this chunk; the array starts p + 1 chunks before the sequence.
            near = [-(p + 1), -p, 0] if p else [-1, 0]
            terms, at = [], []
            for offset in near:
                k_near, v_near, real = (
                    lax.dynamic_slice_in_dim(x, (c + p + 1 + offset) * chunk, chunk) for x in (k, v, mask)
                )
                terms.append(_terms(key_map, k_near, v_near, real))
                at.append(place + offset * chunk)
            at = jnp.concatenate(at)
            seen = (at[None, :] <= place[:, None]) & (at[None, :] > place[:, None] - width)
            sums = sums_of_seen(seen, jnp.concatenate(terms)) + jnp.sum(ring, axis=0)[None]
            kept.append(jnp.concatenate([ring, jnp.sum(terms[-1], axis=0)[None]])[1:])
            pairs = pairs * sums
        return tuple(kept), _answer(kernel, q, pairs)

    through = lambda rings, group: lax.scan(jax.checkpoint(step), rings, group)  # noqa: E731
    q_padded = pad_rows(inputs.q, count * chunk - num_queries)
    chunks = (
        jnp.arange(count, dtype=jnp.int32).reshape(groups, per_group),
        q_padded.reshape(groups, per_group, chunk, -1),
    )
    _, state = lax.scan(through if groups == 1 else jax.checkpoint(through), rings, chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:])[:num_queries], state)


def _chunks(kernel: Kernel, inputs: TensorInputs, most_terms: int) -> tuple[int, tuple[Any, ...]]:
    """The chunk size, and all tokens, with keys cut or padded to the number of queries."""
    num_queries = inputs.q.shape[0]
    per_token = kernel.weights.shape[0] * (inputs.values[0].shape[1] + 1)
    # At least 4 tokens, for any number of features; at most 64, because in a chunk every token costs one product per
    # token of the chunk.
    chunk = min(num_queries, max(4, min(64, most_terms // per_token)))

    def aligned(x: Array) -> Array:
        return pad_rows(x[:num_queries], num_queries - min(num_queries, x.shape[0]))

    masks = tuple(
        jnp.ones(k.shape[0], bool) if mask is None else mask for k, mask in zip(inputs.keys, inputs.masks, strict=True)
    )
    return chunk, (inputs.q, *jax.tree.map(aligned, (inputs.keys, inputs.values, masks)))


def _terms(key_map: FeatureMap, k: Array, v: Array, mask: Array | None) -> Array:
    r"""The contribution of each token to the moments of its set, :math:`U_j \hat V_j`: ``[b, R, Dv + 1]``."""
    features = _rows(key_map, k)
    # Features are masked instead of keys: a key of zeros still has the monomial of degree 0.
    if mask is not None:
        features = jnp.where(mask[:, None], features, jnp.zeros_like(features))
    with_one = jnp.concatenate([v, jnp.ones((v.shape[0], 1), v.dtype)], axis=1)
    return features[:, :, None] * with_one[:, None, :]


def _answer(kernel: Kernel, q: Array, pairs: Array) -> AttentionState:
    """The states of queries ``[b, D]`` from the moments of their visible pairs, ``[b, R, Dv + 1]``."""
    total = jnp.einsum("br,brc->bc", _rows(kernel.query_map, q) * kernel.weights[None, :], pairs)
    return normalise(total[:, :-1], total[:, -1], jnp.zeros(q.shape[0], total.dtype))


def _rows(feature_map: FeatureMap, x: Array) -> Array:
    """Features as plain numbers ``[N, R]``: features of polynomials have moderate size, and need no log-scale."""
    values, log_scale = feature_map(x)
    return values * jnp.exp(log_scale)
