r"""Exact tensor attention of any order: attention over pairs, triples and so on of keys.

A pair's logit is :math:`\sum_t q_t k^1_t k^2_t = (q \odot k^1) \cdot k^2`: given the first key, it is ordinary attention
of the query :math:`q \odot k^1` over the second. So attention of order m is attention over the first keys of the
answers of order m - 1, with their log-normalisers as logits, and matrix products are all there is to it.
"""

import math
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from approx_attention.causal import in_blocks
from approx_attention.softmax import HIDDEN, LEAST_TILE, dense_state, map_rows, pad_rows
from approx_attention.states import AttentionState, finite_peak, merge, normalise
from approx_attention.tensors import check_causal, tensor_inputs

Causal = Literal["both", "ordered"]
# Rows of composed queries in one tile at least, so that products stay products of matrices when keys are many.
LEAST_ROWS = 64
# Causal queries are taken in up to so many segments of at least so many, each with the keys up to its end.
SEGMENTS, LEAST_SEGMENT = 4, 64


def tensor_attention(
    q: Float[Array, "T D"],
    k: Any,
    v: Any,
    key: Array | None = None,
    *,
    is_causal: Causal | None = None,
    window: int | tuple[int, ...] | None = None,
    kv_mask: Any = None,
    scale: float | Array | None = None,
    return_state: bool = False,
) -> Any:
    r"""Attention over all tuples of m - 1 keys, of which values are multiplied channel by channel.

    .. math:: \mathrm{out}_i = \frac{\sum_{j, l} e^{x_{ijl}}\, v^1_j \odot v^2_l}{\sum_{j, l} e^{x_{ijl}}}, \qquad
              x_{ijl} = s \sum_t q_{it}\, k^1_{jt}\, k^2_{lt}

    for order 3. It takes :math:`2 T S^{m-1} (D + D_v)` operations, in memory linear in T and S, forwards and backwards.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[m-1, S, D]``, or a tuple of m - 1 arrays ``[S_a, D]``; one array ``[S, D]`` is ordinary attention.
        v: values ``[m-1, S, Dv]``, likewise.
        key: ignored; exact attention is deterministic.
        is_causal: ``"both"``: query i sees keys at places up to i in every set; ``"ordered"``: also none of a set at
            a place after that of the set before it (l <= j <= i). Aligned top left where T != S.
        window: how many places back from its own, which counts, a query sees, in all sets or in each.
        kv_mask: true where a key is real: ``[S]``, ``[m-1, S]`` or a tuple. A query that sees no tuple gives 0.
        scale: factor of the logits, of any sign; ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, whose normaliser is that over tuples, in the accumulation dtype.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of the values, or the state.

    Raises:
        ValueError: shapes that do not fit, an unknown ``is_causal``, a window without it.
        TypeError: dtypes that are not floating point (or boolean, for masks).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import tensor_attention
        >>> q, k, l, v, w = (jax.random.normal(jax.random.key(i), (5, 4)) for i in range(5))
        >>> logits = jnp.einsum("id,jd,ld->ijl", q, k, l) / 2
        >>> weights = jax.nn.softmax(logits.reshape(5, 25)).reshape(5, 5, 5)
        >>> expected = jnp.einsum("ijl,jc,lc->ic", weights, v, w)
        >>> bool(jnp.allclose(tensor_attention(q, (k, l), (v, w)), expected, atol=1e-6))
        True

    Reference:
        Alman and Song (2024), "How to capture higher-order correlations? Generalizing matrix softmax attention to
        Kronecker computation", definition of tensor attention; Roy et al. (2025), "Fast and simplex: 2-simplicial
        attention in Triton", for windows.
    """
    inputs = tensor_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    widths = check_causal(is_causal, window, len(inputs.keys))
    tokens = tuple(_Tokens.of(*one) for one in zip(inputs.keys, inputs.values, inputs.masks, strict=True))
    if is_causal is None:
        state = _streamed(_Queries(inputs.q, None, None), tokens, _Rule(False, (None,) * len(tokens)))
    elif widths is None:
        state = _causal(inputs.q, tokens, _Rule(is_causal == "ordered", (None,) * len(tokens)))
    else:
        state = _windowed(inputs.q, tokens, _Rule(is_causal == "ordered", widths))
    return state if return_state else state.out.astype(jax.tree.leaves(v)[0].dtype)


def determinant_attention(
    q: Float[Array, "T D"], k: Any, v: Any, key: Array | None = None, **options: Any
) -> Any:
    r"""Third-order attention whose logits are signed volumes, which rotations of three channels leave alone.

    .. math:: x_{ijl} = s \sum_g \det\big[\, q_{ig},\ k^1_{jg},\ k^2_{lg} \,\big]

    over groups g of three channels: rotary embeddings of all three tokens by one angle cancel. Each determinant is two
    trilinear forms, so this is `tensor_attention` of twice the channels (`determinant_channels`).

    Args:
        q: queries ``[T, D]``, D a multiple of 3.
        k: keys ``[2, S, D]``, or a tuple of two arrays.
        v: values ``[2, S, Dv]``, likewise.
        key: ignored.
        options: those of `tensor_attention`; the scale is ``1/sqrt(D)`` by default.

    Returns:
        As `tensor_attention`.

    Raises:
        ValueError: another order, or channels that are no multiple of 3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import determinant_attention
        >>> x = jnp.ones((4, 3))  # three equal vectors span no volume, so all weights are equal
        >>> v = jnp.arange(4.0)[:, None]
        >>> [float(y) for y in determinant_attention(x, (x, x), (v, v))[0]]
        [2.25]

    Reference:
        Roy et al. (2025), section on rotation invariant trilinear forms.
    """
    options.setdefault("scale", 1 / math.sqrt(q.shape[-1]))
    return tensor_attention(*determinant_channels(q, k), v, key, **options)


def determinant_channels(q: Array, k: Any) -> tuple[Array, tuple[Array, Array]]:
    r"""Queries and keys ``[., 2 D]`` whose trilinear form is the sum of the determinants of groups of three channels.

    .. math:: \det[a, b, c] = \sum_t a_t b_{t+1} c_{t+2} - \sum_t a_t b_{t+2} c_{t+1}, \quad t \bmod 3.

    Args:
        q: queries ``[T, D]``.
        k: two sets of keys ``[S, D]``.

    Returns:
        Queries ``[T, 2 D]`` and two sets of keys ``[S, 2 D]``, for any tensor attention.

    Raises:
        ValueError: not two sets of keys, or channels that are no multiple of 3.
    """
    if len(k) != 2 or q.shape[-1] % 3:
        raise ValueError(f"determinants take two sets of keys and 3 n channels, got {len(k)} and {q.shape[-1]}")

    def rolled(x: Array, by: int) -> Array:
        return jnp.roll(x.reshape(x.shape[0], -1, 3), -by, axis=-1).reshape(x.shape)

    first = jnp.concatenate([rolled(k[0], 1), rolled(k[0], 2)], axis=-1)
    second = jnp.concatenate([rolled(k[1], 2), rolled(k[1], 1)], axis=-1)
    return jnp.concatenate([q, -q], axis=-1), (first, second)


class _Queries(NamedTuple):
    """Queries ``[N, D]``, their own places, and the newest place of a key that each may see; None if not causal."""

    q: Array
    place: Array | None
    newest: Array | None


class _Tokens(NamedTuple):
    """One set of keys ``[S, D]`` and values, which of them are real (None for all), and their places."""

    k: Array
    v: Array
    real: Array | None
    place: Array

    @classmethod
    def of(cls, k: Array, v: Array, real: Array | None) -> Self:
        return cls(k, v, real, jnp.arange(k.shape[0], dtype=jnp.int32))

    def padded(self, before: int, after: int) -> Self:
        """So many more places on both sides, without real keys."""
        real = jnp.ones(self.k.shape[0], bool) if self.real is None else self.real
        around = lambda x: jnp.pad(x, ((before, after),) + ((0, 0),) * (x.ndim - 1))  # noqa: E731
        return type(self)(*(around(x) for x in (self.k, self.v, real, self.place)))


class _Rule(NamedTuple):
    """Whether places must not increase from set to set, and how far back each set is seen (None for all the way)."""

    ordered: bool
    widths: tuple[int | None, ...]

    def visible(self, queries: _Queries, tokens: _Tokens) -> Array | None:
        """Which keys of the first set a query sees, ``[N or 1, S]``; None for all."""
        seen = None if tokens.real is None else tokens.real[None, :]
        if queries.place is None or queries.newest is None:
            return seen
        before = tokens.place[None, :] <= queries.newest[:, None]
        seen = before if seen is None else seen & before
        if self.widths[0] is None:
            return seen
        return seen & (tokens.place[None, :] > queries.place[:, None] - self.widths[0])

    def compose(self, queries: _Queries, tokens: _Tokens) -> _Queries:
        """The queries times each key of the first set, which ask the sets after it."""
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


def _streamed(queries: _Queries, sets: tuple[_Tokens, ...], rule: _Rule) -> AttentionState:
    """The state of queries over tuples of keys, from tiles of queries composed with keys of the first set."""
    first, *others = sets
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
        room = first.padded(0, -first.k.shape[0] % num_keys)
        blocks = jax.tree.map(lambda x: in_blocks(x, num_keys), room)
        empty = AttentionState.empty(queries.q.shape[0], first.v.shape[1], first.v.dtype)
        return lax.scan(lambda state, tokens: (merge(state, tile(tokens)), None), empty, blocks)[0]

    return map_rows(over_first_keys, queries, max(1, rows // num_keys))


def _fold(answers: AttentionState, v: Array, visible: Array | None) -> AttentionState:
    r"""Attention over first keys, whose logits are the normalisers of their answers over all others.

    .. math:: \mathrm{lse}_i = \log \sum_j e^{\mathrm{lse}_{ij}}, \qquad
              \mathrm{out}_i = \sum_j e^{\mathrm{lse}_{ij} - \mathrm{lse}_i}\, v_j \odot \mathrm{out}_{ij}
    """
    num_keys = v.shape[0]
    out, lse = answers.out.reshape(-1, num_keys, v.shape[1]), answers.lse.reshape(-1, num_keys)
    lse = lse if visible is None else jnp.where(visible, lse, -jnp.inf)
    peak = finite_peak(jnp.max(lse, axis=1))
    weights = jnp.exp(lse - peak[:, None])
    return normalise(jnp.einsum("ij,jc,ijc->ic", weights, v, out), jnp.sum(weights, axis=1), peak)


def _bias(rule: _Rule, queries: _Queries, tokens: _Tokens) -> Array | None:
    visible = rule.visible(queries, tokens)
    return None if visible is None else jnp.where(visible, jnp.zeros((), queries.q.dtype), HIDDEN)


def _causal(q: Array, sets: tuple[_Tokens, ...], rule: _Rule) -> AttentionState:
    """Causal attention by segments of queries, each of which leaves out the keys after its end."""
    length = -(-q.shape[0] // min(SEGMENTS, -(-q.shape[0] // LEAST_SEGMENT)))
    states = []
    for start in range(0, q.shape[0], length):
        end = min(start + length, q.shape[0])
        place = jnp.arange(start, end, dtype=jnp.int32)
        before = tuple(jax.tree.map(lambda x: x[:end], tokens) for tokens in sets)
        states.append(_streamed(_Queries(q[start:end], place, place), before, rule))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *states)


def _windowed(q: Array, sets: tuple[_Tokens, ...], rule: _Rule) -> AttentionState:
    """Causal attention by short blocks of queries, each with the keys in reach of it."""
    reach = [min(width or 0, q.shape[0]) for width in rule.widths]
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
    at_once = max(1, LEAST_TILE // math.prod(block + width for width in [0, *reach[-2:]]))
    q_blocks = pad_rows(q, blocks * block - q.shape[0]).reshape(blocks, block, -1)
    state = lax.map(near, (starts, q_blocks), batch_size=min(at_once, blocks))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: q.shape[0]], state)
