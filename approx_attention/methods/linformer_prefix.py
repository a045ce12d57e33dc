"""The causal form of `linformer`: the slots of a query are those of the tokens so far."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    GROUP_NUMBERS,
    HIDDEN,
    along_with,
    by_platform,
    even_split,
    in_blocks,
    out_of_blocks,
    pad_rows,
    real_keys,
    sums_so_far,
)


class LinformerPrefix(NamedTuple):
    """The slots of the tokens so far: the decoding cache of `linformer`.

    Attributes:
        k: projected keys ``[R, D]``.
        v: projected values ``[R, Dv]``.
        row_k: sums of the rows of E over the tokens so far ``[R]``.
        row_v: sums of the rows of F ``[R]``.
        entered: whether the slot contains any token ``[R]``.
    """

    k: Array
    v: Array
    row_k: Array
    row_v: Array
    entered: Array

    @classmethod
    def empty(cls, num_slots: int, head_dim: int, value_dim: int, dtype: Any = jnp.float32) -> "LinformerPrefix":
        """Slots without tokens: zeros, which no token has entered.

        Args:
            num_slots: the number R of slots.
            head_dim: the number D of channels of keys.
            value_dim: the number Dv of channels of values.
            dtype: float32 or wider.
        """
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
    r"""Causal Linformer attention for the next b tokens, usually one when decoding.

    .. math:: q_i \cdot \bar k_{r,i} = q_i \cdot \bar k_r + \sum_{j \le i} (q_i \cdot k_j)\, E_{rj}, \qquad
              \mathrm{out}_i = \sum_r p_{ir}\, \bar v_r + \sum_{j \le i} \Big(\sum_r p_{ir} F_{rj}\Big) v_j.

    Args:
        prefix: the slots before these tokens.
        q: queries of the tokens ``[b, D]`` in scaled space (`fold_scale`).
        k: keys ``[b, D]`` in scaled space.
        v: values ``[b, Dv]``.
        columns_k: the tokens' columns of E ``[R, b]``.
        columns_v: the tokens' columns of F ``[R, b]``.
        kv_mask: true where a token is real ``[b]``.
        row_sums: the sums of all rows of E and of F ``[R]``, if slots are renormalised.

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
    # Slots for each query would be an array [b, R, D]; products of the queries with this step's tokens avoid it.
    so_far = jnp.tri(q.shape[0], dtype=q.dtype)
    # Not a product with `so_far`: 0 times the NaN of a later key would be NaN.
    logits = q @ prefix.k.T + jnp.where(so_far > 0, q @ k.T, 0) @ columns_k.T
    entered = prefix.entered[None, :] | (so_far @ jnp.abs(columns_k.T) > 0)
    visible_k = prefix.row_k[None, :] + so_far @ columns_k.T
    visible_v = prefix.row_v[None, :] + so_far @ columns_v.T
    if row_sums[0] is not None:
        logits = logits * share(row_sums[0][None, :], visible_k)
    weights = jnp.where(entered, jax.nn.softmax(jnp.where(entered, logits, HIDDEN), axis=-1), 0)
    if row_sums[1] is not None:
        weights = weights * share(row_sums[1][None, :], visible_v)
    out = weights @ prefix.v + (so_far * (weights @ columns_v)) @ v
    after = LinformerPrefix(
        prefix.k + columns_k @ k, prefix.v + columns_v @ v, visible_k[-1], visible_v[-1], entered[-1]
    )
    return out.astype(dtype), after


class Rows(NamedTuple):
    """A projection's matrix ``[R, S]`` and, if slots are renormalised, the sums of its rows ``[R]``."""

    matrix: Array
    sums: Array | None


def causal_outputs(
    q: Array, k: Array, v: Array, of_keys: Rows, of_values: Rows, kv_mask: Array | None, block_size: int
) -> Array:
    """Outputs of causal Linformer attention, ``block_size`` tokens per step: sequential on a CPU, else parallel.

    `causal_state` does not apply. It merges attention over nearby tokens with attention over a summary of the other
    keys. Slots are not disjoint sets of keys: each token up to the query's own changes the key of every slot, and
    with it every logit.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    num_seen = min(num_queries, num_keys)
    tokens = (k, v, of_keys.matrix.T, of_values.matrix.T, real_keys(kv_mask, num_keys))
    tokens = tuple(pad_rows(x[:num_seen], num_queries - num_seen) for x in tokens)
    blocks = jax.tree.map(lambda x: in_blocks(x, min(block_size, num_queries)), (q, *tokens))
    row_sums = of_keys.sums, of_values.sums

    def attend(prefix: LinformerPrefix, block: Any) -> tuple[Array, LinformerPrefix]:
        q, k, v, rows_k, rows_v, real = block
        return linformer_step(prefix, q, k, v, rows_k.T, rows_v.T, kv_mask=real, row_sums=row_sums)

    empty = LinformerPrefix.empty(of_keys.matrix.shape[0], k.shape[1], v.shape[1], k.dtype)
    in_turn, together = functools.partial(_in_turn, attend, empty), functools.partial(_together, attend, empty)
    return out_of_blocks(by_platform(blocks, cpu=in_turn, default=together), num_queries)


def _in_turn(attend: Callable[..., Any], empty: LinformerPrefix, blocks: Any) -> Array:
    """The outputs of blocks, one after the other."""

    @jax.checkpoint
    def step(prefix: LinformerPrefix, block: Any) -> tuple[LinformerPrefix, Array]:
        out, prefix = attend(prefix, block)
        return prefix, out

    return lax.scan(step, along_with(empty, blocks), blocks)[1]


def _together(attend: Callable[..., Any], empty: LinformerPrefix, blocks: Any) -> Array:
    """The outputs of groups of blocks at once, from the slots before each block: sums over earlier blocks."""
    num_blocks = blocks[0].shape[0]
    groups, size = even_split(num_blocks, max(1, GROUP_NUMBERS // (3 * sum(x.size for x in empty))))
    padded = jax.tree.map(lambda x: pad_rows(x, groups * size - num_blocks), blocks)
    grouped = jax.tree.map(lambda x: x.reshape(groups, size, *x.shape[1:]), padded)

    @jax.checkpoint
    def group(prefix: LinformerPrefix, blocks: Any) -> tuple[LinformerPrefix, Array]:
        _, k, v, rows_k, rows_v, real = blocks
        of_block = jax.vmap(_slots_of_block)(k.astype(prefix.k.dtype), v, rows_k, rows_v, real)
        parts = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), prefix, of_block)
        entered = sums_so_far(parts.entered.astype(prefix.k.dtype)) > 0.5
        prefixes = LinformerPrefix(*(sums_so_far(x) for x in parts[:4]), entered=entered)
        before = jax.tree.map(lambda x: x[:-1], prefixes)
        out = jax.vmap(lambda prefix, block: attend(prefix, block)[0])(before, blocks)
        return jax.tree.map(lambda x: x[-1], prefixes), out

    _, out = lax.scan(group, along_with(empty, blocks), grouped)
    return out_of_blocks(out, num_blocks)


def _slots_of_block(k: Array, v: Array, rows_k: Array, rows_v: Array, real: Array) -> LinformerPrefix:
    """The contribution of one block to the slots, from rows of the transposed matrices ``[b, R]``."""
    k, v, rows_k, rows_v = (jnp.where(real[:, None], x.astype(k.dtype), 0) for x in (k, v, rows_k, rows_v))
    entered = jnp.any(rows_k != 0, axis=0)
    return LinformerPrefix(rows_k.T @ k, rows_v.T @ v, jnp.sum(rows_k, axis=0), jnp.sum(rows_v, axis=0), entered)


def share(whole: Array, visible: Array) -> Array:
    """The sum of a row over the sum of its visible part; 1 where the latter is 0."""
    return jnp.where(visible == 0, 1, whole / jnp.where(visible == 0, 1, visible))
