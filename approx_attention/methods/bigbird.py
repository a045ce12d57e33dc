"""BigBird: a sliding window, global tokens and random keys, by blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from approx_attention.core import (
    AttentionState,
    check_array,
    check_count,
    check_key,
    checked_soft_cap,
    head_inputs,
    in_blocks,
    merge,
    output_or_state,
    over_real_tokens,
)
from approx_attention.sparse import BlockMap, block_lists_state, block_sparse_state


@output_or_state
def bigbird(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_random_blocks: int = 3,
    num_window_blocks: int = 3,
    num_global_blocks: int = 1,
    block_size: int = 64,
    blocks: Int[Array, "Tb R"] | None = None,
    is_causal: bool = False,
    logits_soft_cap: float | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""A sliding window, global tokens and random keys, all by blocks.

    A query of block i sees the blocks of

    .. math:: \{j : |i - j| \le (w - 1) / 2\} \cup \{0, \dots, g - 1\} \cup R_i,

    and one of the first g blocks sees every block. The r blocks :math:`R_i` are a uniform sample without replacement of
    the others. Blocks contain real tokens only, of which the first are the global ones (the published internal variant
    takes the last block too). Causally a query sees of all these the keys j <= t: the window lies before it, and the
    random blocks are earlier ones.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_random_blocks: the number r; where fewer blocks are left, all are seen, and if that is so everywhere the
            output is exact. Without random blocks no key is needed.
        num_window_blocks: the number w of blocks, odd, of which the query's own is the middle one (the last if causal,
            where there are (w + 1) / 2).
        num_global_blocks: the number g.
        block_size: tokens per block.
        blocks: numbers of the random blocks (of real tokens) ``[ceil(T / block_size), R]``; by default a random sample.
            Numbers count for nothing if the query sees the block anyhow, if they repeat, if a causal query may not see
            the block, or if there is no such block, as with -1.

    Raises:
        ValueError: shapes that do not fit, a window of an even number of blocks, neither key nor blocks.
        TypeError: dtypes that are not floating point, blocks that are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import bigbird, exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (32, 4)) for i in range(3))
        >>> out = bigbird(q, k, v, jax.random.key(3), block_size=4, num_random_blocks=6)
        >>> bool(jnp.allclose(out, exact(q, k, v), atol=1e-5))
        True

    Reference:
        :cite:p:`zaheer2020bigbird`, section 2 and appendix D.
    """
    # Three random blocks, of 64 tokens, are the published defaults.
    block_size = check_count("block_size", block_size)
    num_random_blocks = check_count("num_random_blocks", num_random_blocks, least=0)
    num_global_blocks = check_count("num_global_blocks", num_global_blocks, least=0)
    num_window_blocks = check_count("num_window_blocks", num_window_blocks)
    if num_window_blocks % 2 == 0:
        raise ValueError(f"num_window_blocks must be odd, the same to both sides, got {num_window_blocks}")
    cap = checked_soft_cap(logits_soft_cap)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    block_size = min(block_size, max(q.shape[0], k.shape[0]))
    sizes = {"block_size": block_size, "num_queries": q.shape[0], "num_keys": k.shape[0]}
    rows, columns = np.indices([-(-n // block_size) for n in (q.shape[0], k.shape[0])])
    near = abs(rows - columns) <= num_window_blocks // 2
    fixed = BlockMap.from_blocks(near | (columns < num_global_blocks) | (rows < num_global_blocks), **sizes)
    fixed = fixed.causal() if is_causal else fixed
    # The random blocks come from these: a block that is visited anyhow would count twice.
    free = ~fixed.visited & ((columns < rows) | (not is_causal))
    # Shapes are static: as many places as the row with the most free blocks can fill.
    count = min(num_random_blocks, int(free.sum(axis=1).max()))
    if blocks is not None:
        check_array("blocks", blocks, "integers")
        if blocks.ndim != 2 or blocks.shape[0] != len(free):
            raise ValueError(f"blocks must be [ceil(T / block_size), R] with {len(free)} rows, got {blocks.shape}")
        blocks = jnp.asarray(blocks)

    def by_blocks(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        state = block_sparse_state(q, k, v, fixed, kv_mask=kv_mask, logits_soft_cap=cap)
        if blocks is not None:
            lists = _given_lists(free, blocks)
        elif num_random_blocks:
            present = None if kv_mask is None else jnp.any(in_blocks(kv_mask, block_size), axis=1)
            lists = _random_lists(free, count, check_key("bigbird", key), present)
        else:
            return state
        options: Any = {"block_size": block_size, "kv_mask": kv_mask, "logits_soft_cap": cap}
        return merge(state, block_lists_state(q, k, v, *lists, **options))

    return over_real_tokens(by_blocks, q, k, v, kv_mask, is_causal=is_causal)


def _random_lists(free: np.ndarray, count: int, key: Array, present: Array | None) -> tuple[Array, Array]:
    """A uniform sample of ``count`` free columns for each row, and which of them exist.

    Columns that are not ``present``, blocks of nothing but padding, are not sampled.
    """
    # A random number has a key by its row and column, not a place in an array: the sample of a row depends neither on
    # the other rows nor on the number of columns, so a prefix of a sequence has the sample of the whole.
    numbers = jnp.arange(free.shape[1], dtype=jnp.int32)
    may_be_sampled = jnp.asarray(free) if present is None else free & present[None, :]

    def of_row(args: tuple[Array, Array]) -> tuple[Array, Array]:
        row, free = args
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, row), numbers)
        noise = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
        # The columns of largest noise are a uniform sample without replacement; noise is at least 0.
        priority = jnp.where(free, noise, -1)
        best, chosen = lax.top_k(priority, count)
        return chosen.astype(jnp.int32), best >= 0

    return lax.map(of_row, (jnp.arange(len(free), dtype=jnp.int32), may_be_sampled))


def _given_lists(free: np.ndarray, blocks: Array) -> tuple[Array, Array]:
    """Given columns for each row, and which are free and listed for the first time."""
    # Sorted, a repeated number stands behind its like.
    lists = jnp.sort(blocks.astype(jnp.int32), axis=1)
    again = jnp.pad(lists[:, 1:] == lists[:, :-1], ((0, 0), (1, 0)))
    inside = (lists >= 0) & (lists < free.shape[1])
    lists = jnp.where(inside, lists, 0)
    is_free = jnp.take_along_axis(jnp.asarray(free), lists, axis=1)
    return lists, inside & is_free & ~again
