"""Linformer: keys and values projected along the sequence, onto few slots over which the softmax then goes."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    HIDDEN,
    AttentionState,
    RealFirst,
    RunningSummary,
    TokenSums,
    WeightedKV,
    along_with,
    attend,
    averaging_matrix,
    blocked_state,
    causal_state,
    check_choice,
    check_count,
    check_counts,
    check_flag,
    check_floating,
    check_floats,
    check_tokens,
    head_inputs,
    in_blocks,
    mask_bias,
    mean,
    out_of_blocks,
    output_or_state,
    pad_rows,
    real_keys,
    segments_of,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Convolution:
    r"""A convolution of kernel and stride w, channel by channel: :math:`\sum_i \mathrm{weight}_i \odot x_{cw + i}`.

    Attributes:
        weight: ``[w, D]``.
    """

    weight: Array


Projection = Array | Convolution | Literal["mean", "max"]


def linformer(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_slots: int = 256,
    projection_k: Projection = "mean",
    projection_v: Projection | None = None,
    renormalize: bool = False,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> Array:
    r"""Softmax attention over R projected keys and values.

    .. math:: \mathrm{out} = \mathrm{softmax}\!\big(s\, q\, (E k)^T\big)\, F v, \qquad E, F \in \mathbb{R}^{R \times S}.

    A model learns E and F and adapts to them. With random E and F it approximates softmax attention at no R, because
    the softmax is taken over mixtures of keys: what the theorem of the paper speaks of is `unreduced_jlt`. With means
    of segments it is `mean_pool` without its counts.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_slots: the number R of segments to pool, for ``"mean"`` and ``"max"``; with R >= S the answer is exact.
            Segments are laid out over all real keys, causally the future included: a model that decodes takes a matrix.
        projection_k: E ``[R, S_max]``, of which the first S columns are used, each for the key of its place; or
            ``"mean"`` or ``"max"`` of R segments whose lengths differ by at most 1; or a `Convolution`.
        projection_v: F, by default the same as E.
        renormalize: scale what the visible keys give to each slot by the share of the sum of its row that is theirs,
            so that padding, shorter inputs and (causally) the future change no slot's scale; for rows whose entries are
            not negative. Pooling always does.
        is_causal: slots of query t are :math:`\sum_{j \le t} E_{rj} k_j`, those that no key has entered left out; means
            are over what is visible. For a matrix or ``"mean"``; only with a matrix does a prefix answer as the whole.
        block_size: tokens that the causal form takes at a time; the result does not depend on it.
        kv_mask: true where a key is real, ``[S]``; means, maxima and convolutions are of the real keys. Columns of a
            matrix belong to places: padding is removed together with its columns, so it should stand on the right. A
            query that sees no key gives 0, and a slot that no visible key enters is left out.

    Raises:
        ValueError: shapes that do not fit, more keys than columns, an unknown pooling.
        TypeError: dtypes that are not floating point.
        NotImplementedError: a causal maximum or convolution.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, linformer
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> projection = jax.random.normal(jax.random.key(3), (16, 64)) / 8
        >>> linformer(q, k, v, projection_k=projection).shape
        (64, 8)
        >>> bool(jnp.allclose(linformer(q, k, v, projection_k=jnp.eye(64)), exact(q, k, v), atol=1e-5))
        True

    Reference:
        :cite:p:`wang2020linformer`, section 4; the causal form is the one that :cite:p:`peng2022abc`, give.
    """
    dtype = v.dtype
    num_slots = check_count("num_slots", num_slots)
    block_size, renormalize = check_count("block_size", block_size), check_flag("renormalize", renormalize)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    if projection_v is None:
        projection_v = projection_k
    if is_causal:
        of_keys = _Rows.of("projection_k", projection_k, k, num_slots, renormalize, kv_mask)
        of_values = _Rows.of("projection_v", projection_v, k, num_slots, renormalize, kv_mask)
        return _causal(q, k, v, of_keys, of_values, kv_mask, block_size).astype(dtype)
    slots_k, present = _slots("projection_k", k, projection_k, num_slots, kv_mask, renormalize)
    slots_v, _ = _slots("projection_v", v, projection_v, num_slots, kv_mask, renormalize)
    _check_slots(slots_k, slots_v)
    return blocked_state(q, slots_k, slots_v, mask_bias(present, q.dtype)).out.astype(dtype)


def _columns(name: str, projection: Any, num_keys: int) -> Array:
    check_floating(name, projection)
    if projection.ndim != 2:
        raise ValueError(f"{name} must be [R, S_max], got shape {projection.shape}; heads of their own are per_head")
    if projection.shape[1] < num_keys:
        raise ValueError(f"{name} has columns for {projection.shape[1]} keys, got {num_keys}")
    return projection[:, :num_keys]


def _slots(
    name: str, x: Array, projection: Projection, num_slots: int, kv_mask: Array | None, renormalize: bool
) -> tuple[Array, Array]:
    """What ``projection`` makes of the rows of ``x``, zero where padded, and which slots any of them enters."""
    num_keys = x.shape[0]
    real = real_keys(kv_mask, num_keys)
    if isinstance(projection, Convolution):
        check_floating("the weight of a convolution", projection.weight)
        if projection.weight.ndim != 2:
            raise ValueError(f"the weight of a convolution must be [w, D], got shape {projection.weight.shape}")
        if renormalize:
            raise NotImplementedError("method 'linformer' does not support renormalize with a convolution")
        width, channels = projection.weight.shape
        if channels != x.shape[1]:
            raise ValueError(f"{name} convolves {channels} channels, got {x.shape[1]}")
        if kv_mask is not None:
            tokens = RealFirst.of(kv_mask)
            x, real = tokens.front(x), tokens.real
        windows = in_blocks(x, width)
        slots = jnp.sum(windows * projection.weight.astype(x.dtype)[None], axis=1)
        return slots, jnp.any(in_blocks(real, width), axis=1)
    if isinstance(projection, str):
        check_choice(name, projection, ("mean", "max"))
        parts = segments_of(num_keys, min(num_slots, num_keys), kv_mask)
        if projection == "mean":
            sums = TokenSums.of_tokens(x, x[:, :0], kv_mask).pooled(parts)
            return mean(sums.k, sums.count), sums.count > 0
        present = parts.sums(real.astype(jnp.int32)) > 0
        return jnp.where(present[:, None], parts.maxima(x), 0), present
    matrix = _columns(name, projection, num_keys).astype(x.dtype)
    visible = jnp.where(real[None, :], matrix, 0)
    slots = visible @ x
    if renormalize:
        slots = slots * _share(jnp.sum(projection.astype(x.dtype), axis=1), jnp.sum(visible, axis=1))[:, None]
    return slots, jnp.any(visible != 0, axis=1)


def _check_slots(of_keys: Array, of_values: Array) -> None:
    if of_keys.shape[0] != of_values.shape[0]:
        raise ValueError(
            f"projection_k and projection_v must make equally many slots, got {of_keys.shape[0]} and "
            f"{of_values.shape[0]}"
        )


def _share(whole: Array, visible: Array) -> Array:
    return jnp.where(visible == 0, 1, whole / jnp.where(visible == 0, 1, visible))


# The causal form: a prefix of every slot per query.


class LinformerPrefix(NamedTuple):
    """Slots of the tokens so far: all that decoding remembers.

    Attributes:
        k: projected keys ``[R, D]``.
        v: projected values ``[R, Dv]``.
        row_k: sums of the rows of E over the tokens so far ``[R]``.
        row_v: the same of F.
        entered: whether any token has entered the slot ``[R]``.
    """

    k: Array
    v: Array
    row_k: Array
    row_v: Array
    entered: Array

    @classmethod
    def empty(cls, num_slots: int, head_dim: int, value_dim: int, dtype: Any = jnp.float32) -> "LinformerPrefix":
        """The slots that no token has entered."""
        row = jnp.zeros((num_slots,), dtype)
        slots = jnp.zeros((num_slots, head_dim), dtype), jnp.zeros((num_slots, value_dim), dtype)
        return cls(*slots, row, row, jnp.zeros((num_slots,), bool))


def linformer_step(
    prefix: LinformerPrefix,
    q: Float[Array, "b D"],
    k: Float[Array, "b D"],
    v: Float[Array, "b Dv"],
    columns_k: Float[Array, "R b"],
    columns_v: Float[Array, "R b"],
    *,
    kv_mask: Bool[Array, " b"] | None = None,
    row_sums: tuple[Array | None, Array | None] = (None, None),
) -> tuple[Float[Array, "b Dv"], LinformerPrefix]:
    r"""Causal Linformer attention at b further tokens, of which one is the usual number when decoding.

    .. math:: q_i \cdot \bar k_{r,i} = q_i \cdot \bar k_r + \sum_{j \le i} (q_i \cdot k_j)\, E_{rj}, \qquad
              \mathrm{out}_i = \sum_r p_{ir}\, \bar v_r + \sum_{j \le i} \Big(\sum_r p_{ir} F_{rj}\Big) v_j.

    Args:
        prefix: the slots before these tokens.
        q: their queries in scaled space (`fold_scale`).
        k: their keys in scaled space.
        v: their values.
        columns_k: their columns of E ``[R, b]``.
        columns_v: their columns of F ``[R, b]``.
        kv_mask: true where a token is real ``[b]``.
        row_sums: the sums of all rows of E and of F ``[R]`` where slots are rescaled to them.

    Returns:
        Outputs ``[b, Dv]`` and the slots after these tokens.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import fold_scale, linformer
        >>> from approx_attention.methods import LinformerPrefix, linformer_step
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (32, 8)) for i in range(3))
        >>> projection = jax.random.normal(jax.random.key(3), (4, 32))
        >>> scaled_q, scaled_k = fold_scale(q, k)
        >>> prefix = LinformerPrefix.empty(4, 8, 8)
        >>> for t in range(32):
        ...     token = slice(t, t + 1)
        ...     columns = projection[:, token]
        ...     last, prefix = linformer_step(prefix, scaled_q[token], scaled_k[token], v[token], columns, columns)
        >>> whole = linformer(q, k, v, projection_k=projection, is_causal=True)
        >>> bool(jnp.allclose(last[0], whole[-1], atol=1e-5))
        True
    """
    dtype, working = v.dtype, prefix.k.dtype
    q, k, v, columns_k, columns_v = (x.astype(working) for x in (q, k, v, columns_k, columns_v))
    if kv_mask is not None:
        k, v = jnp.where(kv_mask[:, None], k, 0), jnp.where(kv_mask[:, None], v, 0)
        columns_k, columns_v = jnp.where(kv_mask[None, :], columns_k, 0), jnp.where(kv_mask[None, :], columns_v, 0)
    so_far = jnp.tri(q.shape[0], dtype=q.dtype)
    logits = q @ prefix.k.T + (so_far * (q @ k.T)) @ columns_k.T
    entered = prefix.entered[None, :] | (so_far @ jnp.abs(columns_k.T) > 0)
    visible_k = prefix.row_k[None, :] + so_far @ columns_k.T
    visible_v = prefix.row_v[None, :] + so_far @ columns_v.T
    if row_sums[0] is not None:
        logits = logits * _share(row_sums[0][None, :], visible_k)
    weights = jnp.where(entered, jax.nn.softmax(jnp.where(entered, logits, HIDDEN), axis=-1), 0)
    if row_sums[1] is not None:
        weights = weights * _share(row_sums[1][None, :], visible_v)
    out = weights @ prefix.v + (so_far * (weights @ columns_v)) @ v
    after = LinformerPrefix(
        prefix.k + columns_k @ k, prefix.v + columns_v @ v, visible_k[-1], visible_v[-1], entered[-1]
    )
    return out.astype(dtype), after


class _Rows(NamedTuple):
    """A projection's matrix ``[R, S]`` and, where slots are rescaled to them, the sums of its rows."""

    matrix: Array
    sums: Array | None

    @classmethod
    def of(
        cls, name: str, projection: Projection, k: Array, num_slots: int, renormalize: bool, kv_mask: Array | None
    ) -> "_Rows":
        num_keys = k.shape[0]
        if isinstance(projection, Convolution) or (isinstance(projection, str) and projection == "max"):
            raise NotImplementedError(f"method 'linformer' does not support is_causal with {name} {projection!r}")
        if isinstance(projection, str):
            check_choice(name, projection, ("mean", "max"))
            projection, renormalize = averaging_matrix(num_keys, num_slots, k.dtype, kv_mask), True
        matrix = _columns(name, projection, num_keys).astype(k.dtype)
        return cls(matrix, jnp.sum(projection.astype(k.dtype), axis=1) if renormalize else None)


def _causal(
    q: Array, k: Array, v: Array, of_keys: _Rows, of_values: _Rows, kv_mask: Array | None, block_size: int
) -> Array:
    num_queries, num_keys = q.shape[0], k.shape[0]
    _check_slots(of_keys.matrix, of_values.matrix)
    num_seen = min(num_queries, num_keys)
    tokens = (k, v, of_keys.matrix.T, of_values.matrix.T, real_keys(kv_mask, num_keys))
    tokens = tuple(pad_rows(x[:num_seen], num_queries - num_seen) for x in tokens)
    blocks = jax.tree.map(lambda x: in_blocks(x, min(block_size, num_queries)), (q, *tokens))

    @jax.checkpoint
    def step(prefix: LinformerPrefix, block: Any) -> tuple[LinformerPrefix, Array]:
        q, k, v, rows_k, rows_v, real = block
        row_sums = of_keys.sums, of_values.sums
        out, prefix = linformer_step(prefix, q, k, v, rows_k.T, rows_v.T, kv_mask=real, row_sums=row_sums)
        return prefix, out

    empty = LinformerPrefix.empty(of_keys.matrix.shape[0], k.shape[1], v.shape[1], k.dtype)
    empty = along_with(empty, blocks)
    return out_of_blocks(lax.scan(step, empty, blocks)[1], num_queries)


# Blocks: every block of keys has slots of its own, so that what is finished never changes.


@output_or_state
def block_linformer(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    slots_per_block: int = 16,
    projection_k: Float[Array, "R b"] | None = None,
    projection_v: Float[Array, "R b"] | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Attention over projected blocks of keys, and causally over nearby keys as they are, in one softmax.

    Block B of b tokens becomes :math:`R_B` slots :math:`E k_B, F v_B`, those that a real token enters, each of which
    stands for an equal share of its :math:`n_B` real tokens:

    .. math:: \mathrm{out}_t = \sum_{B, r} \tfrac{n_B}{R_B}\, e^{s\, q_t \cdot (E k_B)_r} (F v_B)_r
              \Big/ \sum_{B, r} \tfrac{n_B}{R_B}\, e^{s\, q_t \cdot (E k_B)_r}.

    Shared arguments: see `approx_attention.methods`.

    Args:
        slots_per_block: the number R of slots, unless a projection is given; with R >= b the answer is exact.
        projection_k: E ``[R, b]``; by default the means of R segments.
        projection_v: F ``[R, b]``, by default the same as E.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by slots.
        block_size: the number b of tokens per block.
        kv_mask: true where a key is real, ``[S]``; means are over real keys, and of E and F the columns of padding
            are left out. A query that sees no key gives 0.

    Raises:
        ValueError: shapes that do not fit, counts below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax
        >>> from approx_attention import block_linformer
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (256, 8)) for i in range(3))
        >>> block_linformer(q, k, v, slots_per_block=8, block_size=64, is_causal=True).shape
        (256, 8)

    Reference:
        :cite:p:`wang2020linformer`, block by block, as far as a causal model can use it.
    """
    head_dim = q.shape[-1]
    slots_per_block = check_count("slots_per_block", slots_per_block)
    block_size = check_count("block_size", block_size)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    _check_projections(projection_k, projection_v)
    options: Any = {
        "slots_per_block": slots_per_block, "projection_k": projection_k, "projection_v": projection_v,
    }  # fmt: skip
    if is_causal:
        block_size = min(block_size, q.shape[0])
        # No query looks beyond the first two blocks by slots, which a single short block could not have.
        options = options if q.shape[0] > block_size else {}
        running = running_block_linformer(head_dim, **options, block_size=block_size, max_length=q.shape[0])
        state = causal_state(q, k, v, running, block_size=block_size, kv_mask=kv_mask)
    else:
        summary = summarize_block_linformer(k, v, **options, block_size=block_size, kv_mask=kv_mask)
        state = attend(q, summary)
    return state


def summarize_block_linformer(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    slots_per_block: int = 16,
    projection_k: Float[Array, "R b"] | None = None,
    projection_v: Float[Array, "R b"] | None = None,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """The slots of every block of keys.

    Shared arguments: see `approx_attention.methods`.

    Args:
        slots_per_block: as in `block_linformer`.
        projection_k: as in `block_linformer`.
        projection_v: as in `block_linformer`.
        block_size: the number b of tokens per block.

    Returns:
        A `WeightedKV` of R tokens per block.
    """
    check_tokens(k, v, kv_mask)
    slots_per_block = check_count("slots_per_block", slots_per_block)
    block_size = check_count("block_size", block_size)
    block_size = min(block_size, k.shape[0]) if projection_k is None else block_size
    tokens, first = (k, v, real_keys(kv_mask, k.shape[0])), None
    if kv_mask is not None:
        order = RealFirst.of(kv_mask)
        tokens = (*order.front((k, v)), order.real)
        # A sequence that is shorter than a block is one block.
        first = order.real[:block_size]
    blocks = jax.tree.map(lambda x: in_blocks(x, block_size), tokens)
    slots = jax.vmap(lambda k, v, real: _block_slots(k, v, real, slots_per_block, projection_k, projection_v, first))(
        *blocks
    )
    return out_of_blocks(slots)


def running_block_linformer(
    head_dim: int,
    key: Array | None = None,
    *,
    slots_per_block: int = 16,
    projection_k: Float[Array, "R b"] | None = None,
    projection_v: Float[Array, "R b"] | None = None,
    block_size: int = 128,
    max_length: int = 65536,
) -> RunningSummary:
    """The slots of a growing prefix, with room for those of ``max_length`` tokens.

    Shared arguments: see `approx_attention.methods`.

    Args:
        slots_per_block: as in `block_linformer`.
        projection_k: as in `block_linformer`.
        projection_v: as in `block_linformer`.
        block_size: the number b of tokens per block, that of the `Decoder` too.
        max_length: the length there is room for; the blocks of a longer prefix are averaged into the last, slot by
            slot.
    """
    head_dim, slots_per_block = check_counts(head_dim=head_dim, slots_per_block=slots_per_block)
    max_length = check_count("max_length", max_length)
    block_size = check_count("block_size", block_size)
    blocks = -(-max_length // block_size)

    def slots_of(k: Array, v: Array, real: Array) -> WeightedKV:
        return _block_slots(k, v, real, slots_per_block, projection_k, projection_v)

    def init(value_dim: int, dtype: Any) -> WeightedKV:
        one = jax.eval_shape(
            slots_of,
            *(jax.ShapeDtypeStruct((block_size, size), dtype) for size in (head_dim, value_dim)),
            jax.ShapeDtypeStruct((block_size,), bool),
        )
        return WeightedKV.empty(blocks * one.mass.shape[0], head_dim, value_dim, dtype)

    def append(held: WeightedKV, start: Array, k: Array, v: Array, kv_mask: Array) -> WeightedKV:
        new = slots_of(k, v, kv_mask)
        number = new.mass.shape[0]
        at = jnp.minimum(start // k.shape[0], held.mass.shape[0] // number - 1) * number
        old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, number), held)
        mass = old.mass + new.mass
        middle = (old.mass[:, None] * old.k + new.mass[:, None] * new.k) / jnp.where(mass > 0, mass, 1)[:, None]
        both = WeightedKV(middle, old.value_sum + new.value_sum, mass)
        return jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, at, 0), held, both)

    return RunningSummary(init, append, read=lambda held: held)


def _check_projections(projection_k: Any, projection_v: Any) -> None:
    check_floats(projection_k=projection_k, projection_v=projection_v)
    if projection_v is not None and projection_k is None:
        raise ValueError("projection_v needs a projection_k beside it")


def _block_slots(
    k: Array,
    v: Array,
    real: Array,
    slots_per_block: int,
    projection_k: Array | None,
    projection_v: Array | None,
    places: Array | None = None,
) -> WeightedKV:
    """The slots of a block, by default means of segments: of all its places, or of those that are in use."""
    if projection_v is None:
        projection_v = projection_k
    _check_projections(projection_k, projection_v)
    if projection_k is None or projection_v is None:
        parts = segments_of(k.shape[0], min(slots_per_block, k.shape[0]), places)
        return TokenSums.of_tokens(k, v, real).pooled(parts).landmarks()
    if projection_k.shape != projection_v.shape or projection_k.ndim != 2 or projection_k.shape[1] != k.shape[0]:
        raise ValueError(
            f"projection_k and projection_v must be [R, b] with b = {k.shape[0]}, got {projection_k.shape} and "
            f"{projection_v.shape}"
        )
    slots_k, present = _slots("projection_k", k, projection_k, slots_per_block, real, False)
    slots_v, _ = _slots("projection_v", v, projection_v, slots_per_block, real, False)
    share = jnp.sum(real).astype(k.dtype) / jnp.maximum(jnp.sum(present), 1).astype(k.dtype)
    mass = jnp.where(present, share, 0)
    return WeightedKV(slots_k, mass[:, None] * slots_v, mass)
