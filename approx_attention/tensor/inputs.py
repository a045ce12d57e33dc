"""Inputs of tensor (Kronecker) attention, and its exact states from tiles of composed queries.

For order m there are m - 1 sets of keys and values, which may differ in length: ``k [m-1, S, D]`` or a tuple of arrays
``[S_a, D]``, and likewise the values. Logits are sums over channels of products of one query and m - 1 keys. The scale
is folded into the query only, so that it may have any sign.
"""

import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from approx_attention.core import (
    GREATEST_TILE,
    LEAST_TILE,
    AttentionState,
    accumulation_dtype,
    check_choice,
    check_count,
    check_floating,
    check_kv_mask,
    dense_state,
    finite_peak,
    in_blocks,
    map_rows,
    mask_bias,
    merge,
    normalise,
    out_of_blocks,
    pad_rows,
    real_keys,
)

# The smallest number of rows of composed queries in a tile: with many keys, matrix products must not degrade to
# products with vectors.
LEAST_ROWS = 64
# Causal queries are split into up to 4 segments of at least 64, each with the keys up to its end. At order 3 four
# segments compute 47 % of all tuples, of which 33 % are visible; each further segment adds a program to compile.
SEGMENTS, LEAST_SEGMENT = 4, 64


class TensorInputs(NamedTuple):
    """The checked tensors of one head, in the accumulation dtype.

    Attributes:
        q: queries ``[T, D]`` times the scale of the logits.
        keys: the keys of each set ``[S_a, D]``, 0 in padding.
        values: the values of each set ``[S_a, Dv]``, 0 in padding.
        masks: the mask of real keys of each set ``[S_a]``, or None.
        value_dtype: the dtype of the given values, and of outputs.
    """

    q: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    masks: tuple[Array | None, ...]
    value_dtype: Any


def tensor_inputs(q: Array, k: Any, v: Any, *, scale: float | Array | None = None, kv_mask: Any = None) -> TensorInputs:
    """Check the tensors of one head, cast them to the accumulation dtype, fold in the scale and zero the padding.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[m-1, S, D]``, or a tuple of m - 1 arrays ``[S_a, D]``; one array ``[S, D]`` is order 2.
        v: values, likewise.
        scale: factor of the logits, of any sign; ``1/sqrt(D)`` by default.
        kv_mask: true where a key is real: ``[m-1, S]``, a tuple of arrays ``[S_a]`` or None, or one array ``[S]`` for
            all sets, which must then have equal lengths.

    Returns:
        The `TensorInputs`.

    Raises:
        ValueError: shapes that do not match.
        TypeError: tensors that are not floating point, a mask that is not boolean, a scale that is not one number.
    """
    keys, values = sets("k", k), sets("v", v)
    if len(keys) != len(values):
        raise ValueError(f"k and v must have the same number of sets of tokens, got {len(keys)} and {len(values)}")
    if kv_mask is None or getattr(kv_mask, "ndim", None) == 1:
        masks = (kv_mask,) * len(keys)
    elif not isinstance(kv_mask, tuple | list) and getattr(kv_mask, "ndim", 0) < 2:
        raise TypeError(f"kv_mask must be a boolean array or a tuple of them, got {kv_mask!r}")
    else:
        masks = tuple(kv_mask)
        if len(masks) != len(keys):
            raise ValueError(f"kv_mask must contain one mask for each of {len(keys)} sets of keys, got {len(masks)}")
    check_floating("q", q)
    if q.ndim != 2:
        raise ValueError(f"q must be [T, D], one head without batch axes; got shape {q.shape}")
    for a, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"q and k must share the head dimension, got {q.shape[1]} and, in set {a}, {k.shape[1]}")
        if k.shape[0] != v.shape[0] or v.shape[1] != values[0].shape[1]:
            raise ValueError(f"v must be [S, Dv] for each set of keys; got {v.shape} in set {a} with keys {k.shape}")
        if 0 in (*q.shape, *v.shape):
            given = f"q {q.shape}, k {k.shape} and v {v.shape}"
            raise ValueError(f"attention needs at least one query, key and channel; got {given}")
        if mask is not None:
            check_kv_mask(mask, k.shape[0])
    value_dtype, dtype = values[0].dtype, accumulation_dtype(q, *keys, *values)
    q = scaled(q.astype(dtype), scale)
    keys, values = (
        tuple(x.astype(dtype) if mask is None else jnp.where(mask[:, None], x.astype(dtype), 0)
              for x, mask in zip(xs, masks, strict=True))
        for xs in (keys, values)
    )  # fmt: skip
    return TensorInputs(q, keys, values, masks, value_dtype)


def sets(name: str, x: Any) -> tuple[Array, ...]:
    """The sets of tokens of keys or of values.

    Args:
        name: name of the argument, for error messages.
        x: a stacked array ``[m-1, S, D]``, a tuple of arrays ``[S_a, D]``, or one array ``[S, D]``, which is one set.

    Returns:
        The sets, each ``[S_a, D]``.

    Raises:
        TypeError: sets that are not floating point.
        ValueError: no set, or sets with other than two axes.
    """
    if isinstance(x, tuple | list):
        parts = tuple(x)
    elif getattr(x, "ndim", None) == 3:
        parts = tuple(x[a] for a in range(x.shape[0]))
    else:
        parts = (x,)
    for part in parts:
        check_floating(name, part)
        if part.ndim != 2:
            raise ValueError(f"{name} must be [m-1, S, D], [S, D] or a tuple of arrays [S, D]; got shape {part.shape}")
    if not parts:
        raise ValueError(f"{name} must contain at least one set of tokens, got none")
    return parts


def check_causal(is_causal: Any, window: Any, num_sets: int) -> tuple[int, ...] | None:
    """Check the causal options of tensor attention.

    Args:
        is_causal: None, ``"both"`` or ``"ordered"``.
        window: the number of visible keys of every set, or one number for each set; None for no window.
        num_sets: the number m - 1 of sets of keys.

    Returns:
        The windows as one count per set; None for no window.

    Raises:
        ValueError: an unknown choice, a window without a causal form, a wrong number of windows, or one below 1.
        TypeError: a window that is not an integer known when tracing.
    """
    if is_causal is not None:
        check_choice("is_causal", is_causal, ("both", "ordered"))
    if window is None:
        return None
    if is_causal is None:
        raise ValueError("window looks back from each query: it needs is_causal='both' or 'ordered'")
    if not isinstance(window, tuple | list):
        window = (window,) * num_sets
    if len(window) != num_sets:
        raise ValueError(f"window must contain one count for each of {num_sets} sets of keys, got {window}")
    return tuple(check_count("window", width) for width in window)


def scaled(q: Array, scale: float | Array | None) -> Array:
    r"""Rows times the scale of the logits.

    Args:
        q: rows ``[T, D]``.
        scale: one number of any sign; :math:`1/\sqrt{D}` by default.

    Returns:
        Rows ``[T, D]`` in the dtype of q.

    Raises:
        TypeError: not one number.
        ValueError: a concrete scale that is not finite.
    """
    # 1 / sqrt(D) as in models; Alman and Song's theorem divides by D.
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    elif isinstance(scale, str | bool | tuple | list) or getattr(scale, "shape", ()) != ():
        raise TypeError(f"scale must be one number, got {scale!r}")
    elif not isinstance(scale, Tracer) and not math.isfinite(float(scale)):
        raise ValueError(f"scale must be finite, got {scale}")
    return q * jnp.asarray(scale, q.dtype)


class _Queries(NamedTuple):
    """Queries ``[N, D]``, their positions, and the last visible position of keys for each; None if not causal."""

    q: Array
    place: Array | None
    newest: Array | None


class _Tokens(NamedTuple):
    """One set of keys ``[S, D]`` and values, with their mask (None if all are real) and positions."""

    k: Array
    v: Array
    real: Array | None
    place: Array

    @classmethod
    def of(cls, k: Array, v: Array, real: Array | None) -> Self:
        return cls(k, v, real, jnp.arange(k.shape[0], dtype=jnp.int32))

    def padded(self, before: int, after: int) -> Self:
        """The tokens padded with ``before`` and ``after`` hidden tokens on both sides."""
        real = real_keys(self.real, self.k.shape[0])
        around = lambda x: jnp.pad(x, ((before, after),) + ((0, 0),) * (x.ndim - 1))  # noqa: E731
        return type(self)(*(around(x) for x in (self.k, self.v, real, self.place)))


class _Rule(NamedTuple):
    """Whether positions must not increase from set to set, and the window of each set (None without a window)."""

    ordered: bool
    widths: tuple[int | None, ...]

    def visible(self, queries: _Queries, tokens: _Tokens) -> Array | None:
        """The mask of visible keys of the first set, ``[N or 1, S]``; None for all."""
        seen = None if tokens.real is None else tokens.real[None, :]
        if queries.place is None or queries.newest is None:
            return seen
        before = tokens.place[None, :] <= queries.newest[:, None]
        seen = before if seen is None else seen & before
        if self.widths[0] is None:
            return seen
        return seen & (tokens.place[None, :] > queries.place[:, None] - self.widths[0])

    def compose(self, queries: _Queries, tokens: _Tokens) -> _Queries:
        """The composed queries for the remaining sets: each query times each key of the first set."""
        pairs = queries.q.shape[0], tokens.k.shape[0]

        def of_pairs(x: Array | None) -> Array | None:
            return None if x is None else jnp.broadcast_to(x, pairs).reshape(-1)

        q = (queries.q[:, None, :] * tokens.k[None, :, :]).reshape(-1, queries.q.shape[1])
        if queries.place is None or queries.newest is None:
            return _Queries(q, None, None)
        newest = tokens.place[None, :] if self.ordered else queries.newest[:, None]
        return _Queries(q, of_pairs(queries.place[:, None]), of_pairs(newest))

    def of_the_rest(self) -> Self:
        """The rule of the sets after the first."""
        return self._replace(widths=self.widths[1:])


def tensor_state(
    inputs: TensorInputs, is_causal: str | None = None, widths: tuple[int, ...] | None = None
) -> AttentionState:
    """The exact state of queries over all visible tuples of keys, in memory linear in all lengths.

    Args:
        inputs: queries and m - 1 sets of tokens, as from ``tensor_inputs``.
        is_causal: None, ``"both"`` or ``"ordered"``, as in `tensor_attention`.
        widths: the window of each set; only in the causal form.

    Returns:
        The `AttentionState` ``[T]``.
    """
    tokens = tuple(_Tokens.of(*one) for one in zip(inputs.keys, inputs.values, inputs.masks, strict=True))
    rule = _Rule(is_causal == "ordered", (None,) * len(tokens) if widths is None else widths)
    if is_causal is None:
        return _streamed(_Queries(inputs.q, None, None), tokens, rule)
    return (_causal if widths is None else _windowed)(inputs.q, tokens, rule)


def _streamed(queries: _Queries, sets: tuple[_Tokens, ...], rule: _Rule) -> AttentionState:
    """The state of queries over tuples of keys, from tiles of queries composed with keys of the first set."""
    first, *others = sets
    # Composed queries times last keys fill a tile.
    rows = max(LEAST_ROWS, LEAST_TILE // sets[-1].k.shape[0])
    if not others:
        tile = jax.checkpoint(lambda queries: dense_state(queries.q, first.k, first.v, _bias(rule, queries, first)))
        return map_rows(tile, queries, rows)
    num_keys = min(first.k.shape[0], rows)

    def over_first_keys(queries: _Queries) -> AttentionState:
        @jax.checkpoint
        def tile(tokens: _Tokens) -> AttentionState:
            answers = _streamed(rule.compose(queries, tokens), tuple(others), rule.of_the_rest())
            return _fold(answers, tokens.v, rule.visible(queries, tokens))

        if first.k.shape[0] <= num_keys:
            return tile(first)
        # Padded with hidden keys: a key of zeros would still count with logit 0.
        room = first.padded(0, -first.k.shape[0] % num_keys)
        blocks = jax.tree.map(lambda x: in_blocks(x, num_keys), room)
        empty = AttentionState.empty(queries.q.shape[0], first.v.shape[1], first.v.dtype)
        return lax.scan(lambda state, tokens: (merge(state, tile(tokens)), None), empty, blocks)[0]

    # A derivative stores the state of every query before every block of keys, unless it recomputes them: a second
    # forward pass pays off only if they are large.
    held = queries.q.shape[0] * -(-first.k.shape[0] // num_keys) * first.v.shape[1]
    over_keys = jax.checkpoint(over_first_keys) if held > GREATEST_TILE else over_first_keys
    return map_rows(over_keys, queries, max(1, rows // num_keys))


def _fold(answers: AttentionState, v: Array, visible: Array | None) -> AttentionState:
    r"""Attention over first keys, whose logits are the log-normalisers of the states over all other sets.

    .. math:: \mathrm{lse}_i = \log \sum_j e^{\mathrm{lse}_{ij}}, \qquad
              \mathrm{out}_i = \sum_j e^{\mathrm{lse}_{ij} - \mathrm{lse}_i}\, v_j \odot \mathrm{out}_{ij}
    """
    num_keys = v.shape[0]
    out, lse = answers.out.reshape(-1, num_keys, v.shape[1]), answers.lse.reshape(-1, num_keys)
    # -inf instead of HIDDEN: a hidden first key must not count even if all others are hidden too.
    if visible is not None:
        # As 0 times NaN, the output over a hidden first key would reach the query.
        lse, out = jnp.where(visible, lse, -jnp.inf), jnp.where(visible[:, :, None], out, 0)
    peak = finite_peak(jnp.max(lse, axis=1))
    weights = jnp.exp(lse - peak[:, None])
    return normalise(jnp.einsum("ij,jc,ijc->ic", weights, v, out), jnp.sum(weights, axis=1), peak)


def _bias(rule: _Rule, queries: _Queries, tokens: _Tokens) -> Array | None:
    visible = rule.visible(queries, tokens)
    return None if visible is None else mask_bias(visible, queries.q.dtype)


def _causal(q: Array, sets: tuple[_Tokens, ...], rule: _Rule) -> AttentionState:
    """Causal attention by segments of queries, each without the keys after its end."""
    length = -(-q.shape[0] // min(SEGMENTS, -(-q.shape[0] // LEAST_SEGMENT)))
    states = []
    for start in range(0, q.shape[0], length):
        end = min(start + length, q.shape[0])
        place = jnp.arange(start, end, dtype=jnp.int32)
        before = jax.tree.map(lambda x, end=end: x[:end], sets)
        states.append(_streamed(_Queries(q[start:end], place, place), before, rule))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *states)


def _windowed(q: Array, sets: tuple[_Tokens, ...], rule: _Rule) -> AttentionState:
    """Causal attention by short blocks of queries, each with the keys in its reach."""
    reach = [min(width or 0, q.shape[0]) for width in rule.widths]
    # Blocks of half the window read 1.5 w keys of a set for w visible ones; they have at least 8 rows for efficient
    # matrix products, and at most 128 to bound the tile.
    block = min(q.shape[0], max(8, min(reach) // 2), 128)
    blocks = -(-q.shape[0] // block)

    def around(tokens: _Tokens, width: int) -> _Tokens:
        seen = jax.tree.map(lambda x: x[: blocks * block], tokens)
        return seen.padded(width - 1, blocks * block - seen.k.shape[0])

    padded = tuple(around(tokens, width) for tokens, width in zip(sets, reach, strict=True))

    def near(args: tuple[Array, Array]) -> AttentionState:
        start, q = args
        place = start + jnp.arange(block, dtype=jnp.int32)
        tokens = tuple(
            jax.tree.map(lambda x, width=width: lax.dynamic_slice_in_dim(x, start, block + width - 1), one)
            for one, width in zip(padded, reach, strict=True)
        )
        return _streamed(_Queries(q, place, place), tokens, rule)

    starts = jnp.arange(blocks, dtype=jnp.int32) * block
    # Blocks are grouped to fill a tile with the composed queries of the last two sets.
    at_once = max(1, LEAST_TILE // math.prod(block + width for width in [0, *reach[-2:]]))
    q_blocks = pad_rows(q, blocks * block - q.shape[0]).reshape(blocks, block, -1)
    state = lax.map(near, (starts, q_blocks), batch_size=min(at_once, blocks))
    return out_of_blocks(state, q.shape[0])
