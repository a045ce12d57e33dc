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
    r"""BigBird: softmax attention over a sliding window, global tokens and random keys, by blocks.

    A query of block i sees the blocks of

    .. math:: \{j : |i - j| \le (w - 1) / 2\} \cup \{0, \dots, g - 1\} \cup R_i,

    and a query of the first g blocks sees every block. The r blocks :math:`R_i` are a uniform sample without
    replacement of the remaining blocks. Blocks contain real tokens only. The first tokens are global (the published
    internal variant also makes the last block global). In the causal form a query sees the keys j <= t among these:
    the window lies before the query, and random blocks are earlier blocks.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_random_blocks: the number r. A query with at most r remaining blocks sees all of them; if this holds for
            every query, the output is exact. With r = 0 no PRNG key is needed.
        num_window_blocks: the odd number w of blocks, centred on the query's own block; in the causal form the
            (w + 1) / 2 blocks up to its own.
        num_global_blocks: the number g.
        block_size: tokens per block.
        blocks: indices of the random blocks (of real tokens) ``[ceil(T / block_size), R]``; by default a random sample.
            An index is ignored if the query already sees the block, if it repeats, if the block is hidden from
            a causal query, or if the block does not exist, as for -1.

    Raises:
        ValueError: shapes that do not match, a window of an even number of blocks, neither key nor blocks.
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
        raise ValueError(f"num_window_blocks must be odd (equal on both sides), got {num_window_blocks}")
    cap = checked_soft_cap(logits_soft_cap)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    block_size = min(block_size, max(q.shape[0], k.shape[0]))
    sizes = {"block_size": block_size, "num_queries": q.shape[0], "num_keys": k.shape[0]}
    rows, columns = np.indices([-(-n // block_size) for n in (q.shape[0], k.shape[0])])
    near = abs(rows - columns) <= num_window_blocks // 2
    fixed = BlockMap.from_blocks(near | (columns < num_global_blocks) | (rows < num_global_blocks), **sizes)
    fixed = fixed.causal() if is_causal else fixed
    # Random blocks are sampled from the free ones: a block that is already visited would count twice.
    free = ~fixed.visited & ((columns < rows) | (not is_causal))
    # Shapes are static: the number of places is that of the row with the most free blocks.
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
    # The PRNG key of each number follows from its row and column, not from a place in an array: the sample of a row
    # depends neither on other rows nor on the number of columns, so a prefix has the samples of the whole sequence.
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
    """The given columns of each row, and a mask of those that are free and not repeated."""
    # After sorting, repeated numbers are adjacent.
    lists = jnp.sort(blocks.astype(jnp.int32), axis=1)
    again = jnp.pad(lists[:, 1:] == lists[:, :-1], ((0, 0), (1, 0)))
    inside = (lists >= 0) & (lists < free.shape[1])
    lists = jnp.where(inside, lists, 0)
    is_free = jnp.take_along_axis(jnp.asarray(free), lists, axis=1)
    return lists, inside & is_free & ~again
