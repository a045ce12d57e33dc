"""Linformer block by block: each block of keys has slots of its block only, so finished blocks never change."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    RealFirst,
    RunningSummary,
    TokenSums,
    WeightedKV,
    attend,
    causal_state,
    check_count,
    check_counts,
    check_floats,
    check_tokens,
    first_blocks,
    head_inputs,
    in_blocks,
    out_of_blocks,
    output_or_state,
    real_keys,
    segments_of,
)
from approx_attention.methods.linformer import projected_slots


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
    r"""Softmax attention over projected blocks of keys; in the causal form, also over unprojected nearby keys.

    Block B of b tokens with :math:`n_B` real ones becomes slots :math:`E k_B, F v_B`. The :math:`R_B` slots with a
    nonzero weight on a real token have equal masses :math:`n_B / R_B`:

    .. math:: \mathrm{out}_t = \sum_{B, r} \tfrac{n_B}{R_B}\, e^{s\, q_t \cdot (E k_B)_r} (F v_B)_r
              \Big/ \sum_{B, r} \tfrac{n_B}{R_B}\, e^{s\, q_t \cdot (E k_B)_r}.

    Segment means are over real keys. With matrices E and F the columns of padding are left out.

    Shared arguments: see `approx_attention.methods`.

    Args:
        slots_per_block: the number R of slots, unless a projection is given; with R >= b the output is exact.
        projection_k: E ``[R, b]``; by default the means of R segments.
        projection_v: F ``[R, b]``, by default the same as E.
        is_causal: query t sees keys j <= t: its own block and the block before exactly, earlier blocks by slots.
        block_size: the number b of tokens per block.

    Raises:
        ValueError: shapes that do not match, counts below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax
        >>> from approx_attention import block_linformer
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (256, 8)) for i in range(3))
        >>> block_linformer(q, k, v, slots_per_block=8, block_size=64, is_causal=True).shape
        (256, 8)

    Reference:
        :cite:p:`wang2020linformer`; the form by blocks, which a causal model can use, is this library's.
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
        # A single block has no slots: all queries see it exactly.
        options = options if q.shape[0] > block_size else {}
        running = running_block_linformer(head_dim, **options, block_size=block_size, max_length=q.shape[0])
        return causal_state(q, k, v, running, block_size=block_size, kv_mask=kv_mask)
    return attend(q, summarize_block_linformer(k, v, **options, block_size=block_size, kv_mask=kv_mask))


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
    """Summarise every block of keys by its slots.

    Shared arguments: see `approx_attention.methods`.

    Args:
        slots_per_block: as in `block_linformer`.
        projection_k: as in `block_linformer`.
        projection_v: as in `block_linformer`.
        block_size: the number b of tokens per block.

    Returns:
        A `WeightedKV` of R tokens per block.

    Raises:
        ValueError: shapes that do not match, counts below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import summarize_block_linformer
        >>> k = jnp.array([[1.0], [3.0], [5.0], [7.0]])
        >>> slots = summarize_block_linformer(k, k, slots_per_block=1, block_size=2)
        >>> slots.k[:, 0].tolist(), slots.mass.tolist()
        ([2.0, 6.0], [2.0, 2.0])

    Reference:
        :cite:p:`wang2020linformer`; the form by blocks is this library's.
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
    """The slots of a growing prefix of at most ``max_length`` tokens.

    Shared arguments: see `approx_attention.methods`.

    Args:
        slots_per_block: as in `block_linformer`.
        projection_k: as in `block_linformer`.
        projection_v: as in `block_linformer`.
        block_size: the number b of tokens per block, equal to that of the `Decoder`.
        max_length: capacity in tokens. Blocks beyond it are averaged into the last one, slot by slot.

    Returns:
        The `RunningSummary`, for a `Decoder` with blocks of this size.

    Raises:
        ValueError: counts below 1, projections that do not fit the block.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.methods import running_block_linformer
        >>> running = running_block_linformer(1, slots_per_block=2, block_size=4, max_length=8)
        >>> k, prefix = jnp.arange(4.0)[:, None], running.init(1, jnp.float32)
        >>> slots = running.read(running.append(prefix, jnp.int32(0), k, k, jnp.ones(4, bool)))
        >>> slots.k[:, 0].tolist(), slots.mass.tolist()
        ([0.5, 2.5, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0])

    Reference:
        :cite:p:`wang2020linformer`; the form by blocks is this library's.
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

    def append(slots: WeightedKV, start: Array, k: Array, v: Array, kv_mask: Array) -> WeightedKV:
        new = slots_of(k, v, kv_mask)
        number = new.mass.shape[0]
        # A block beyond the capacity goes into the last one.
        at = jnp.minimum(start // k.shape[0], slots.mass.shape[0] // number - 1) * number
        old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, number), slots)
        mass = old.mass + new.mass
        middle = (old.mass[:, None] * old.k + new.mass[:, None] * new.k) / jnp.where(mass > 0, mass, 1)[:, None]
        both = WeightedKV(middle, old.value_sum + new.value_sum, mass)
        return jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, at, 0), slots, both)

    def of_sequence(k: Array, v: Array, kv_mask: Array) -> Callable[[Array], WeightedKV] | None:
        if k.shape[0] > blocks:
            return None
        return jax.tree_util.Partial(first_blocks, jax.vmap(slots_of)(k, v, kv_mask))

    return RunningSummary(init, append, read=lambda slots: slots, of_sequence=of_sequence)


def _check_projections(projection_k: Any, projection_v: Any) -> None:
    check_floats(projection_k=projection_k, projection_v=projection_v)
    if projection_v is not None and projection_k is None:
        raise ValueError("projection_v needs a projection_k")


def _block_slots(
    k: Array,
    v: Array,
    real: Array,
    slots_per_block: int,
    projection_k: Array | None,
    projection_v: Array | None,
    places: Array | None = None,
) -> WeightedKV:
    """The slots of a block, by default means of segments: of all its places, or of those in the mask ``places``."""
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
    slots_k, present = projected_slots("projection_k", k, projection_k, slots_per_block, real, False)
    slots_v, _ = projected_slots("projection_v", v, projection_v, slots_per_block, real, False)
    # All slots of a block have the same mass.
    share = jnp.sum(real).astype(k.dtype) / jnp.maximum(jnp.sum(present), 1).astype(k.dtype)
    mass = jnp.where(present, share, 0)
    return WeightedKV(slots_k, mass[:, None] * slots_v, mass)
