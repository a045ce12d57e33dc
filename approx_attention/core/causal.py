"""The causal form of every method that has a summary: exact attention nearby, a running summary of what came before.

Tokens are taken in blocks. A query sees its own block and the one before it exactly (causally), and every earlier
block through a summary that grows block by block. One scan serves training, prefill and decoding, so they agree.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core.checks import check_count, check_rows, check_tokens, real_keys
from approx_attention.core.choices import keeping_choices
from approx_attention.core.features import FeatureMap
from approx_attention.core.padding import over_real_tokens
from approx_attention.core.rows import along_with, in_blocks, out_of_blocks, pad_rows
from approx_attention.core.softmax import dense_state, mask_bias
from approx_attention.core.states import AttentionState, merge
from approx_attention.core.summaries import FeatureMoments, Summary, attend, require_scaled_space


def _same(x: Array) -> Array:
    return x


class RunningSummary(NamedTuple):
    """The summary of a growing prefix in bounded space, as pure functions.

    Attributes:
        init: ``(value_dim, dtype) -> state`` of the empty prefix.
        append: ``(state, start, k, v, kv_mask) -> state`` after one more full block ``k [b, D]``, ``v [b, Dv]``, whose
            first token stands at position ``start`` (int32); blocks come in order, without gaps, each once.
        read: ``state -> summary`` of the prefix, for `attend`.
        near: ``(q, k, v, bias) -> AttentionState`` over tokens that are kept exactly: the kernel that the summary
            estimates, softmax by default.
        space: maps queries and keys to those whose softmax attention the method estimates, before the scale is folded
            in: the identity unless the method normalises them.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import RunningSummary, WeightedKV, attend
        >>> def add(total, start, k, v, kv_mask):  # one token with the mean key, and the values summed
        ...     count = jnp.sum(kv_mask, dtype=jnp.float32)
        ...     return total[0] + jnp.sum(k, axis=0), total[1] + jnp.sum(v, axis=0), total[2] + count
        >>> running = RunningSummary(
        ...     init=lambda value_dim, dtype: (jnp.zeros(2), jnp.zeros(value_dim), jnp.zeros(())),
        ...     append=add,
        ...     read=lambda total: WeightedKV(total[0][None] / total[2], total[1][None], total[2][None]),
        ... )
        >>> prefix = running.init(1, jnp.float32)
        >>> for start, value in ((0, 1.0), (4, 5.0)):
        ...     prefix = running.append(prefix, start, jnp.ones((4, 2)), jnp.full((4, 1), value), jnp.ones(4, bool))
        >>> float(attend(jnp.ones((1, 2)), running.read(prefix)).out[0, 0])
        3.0
    """

    init: Callable[[int, Any], Any]
    append: Callable[[Any, Array, Array, Array, Array], Any]
    read: Callable[[Any], Summary]
    near: Callable[[Array, Array, Array, Array], AttentionState] = dense_state
    space: Callable[[Array], Array] = _same


class Block(NamedTuple):
    """Consecutive tokens that are still attended exactly: ``k [b, D]``, ``v [b, Dv]`` and which of them are real."""

    k: Array
    v: Array
    kv_mask: Array

    @classmethod
    def empty(cls, block_size: int, head_dim: int, value_dim: int, dtype: Any) -> Self:
        """A block without any real token."""
        zeros = jnp.zeros((block_size, head_dim), dtype), jnp.zeros((block_size, value_dim), dtype)
        return cls(*zeros, jnp.zeros((block_size,), bool))


class Past(NamedTuple):
    """The tokens before a block of queries: the block just before, and the summary of the prefix before that."""

    before: Block
    prefix: Any

    @classmethod
    def empty(cls, running: RunningSummary, block_size: int, head_dim: int, value_dim: int, dtype: Any) -> Self:
        """The past of the first block."""
        before = Block.empty(block_size, head_dim, value_dim, dtype)
        return cls(before, running.init(value_dim, dtype))


def running_moments(features: FeatureMap) -> RunningSummary:
    """Moments of a growing prefix: those of each further block are added.

    Args:
        features: the feature map, such as `PositiveFeatures`.

    Returns:
        The `RunningSummary` whose summary is a `FeatureMoments`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.core import PositiveFeatures, running_moments
        >>> running = running_moments(PositiveFeatures(jax.random.normal(jax.random.key(0), (16, 4))))
        >>> empty, ones = running.init(2, jnp.float32), jnp.ones((3, 4))
        >>> moments = running.append(empty, jnp.int32(0), ones, ones[:, :2], jnp.ones(3, bool))
        >>> running.read(moments).value_sum.shape
        (16, 2)
    """

    # The map is not part of the state: it never changes, and a donated cache must not take its arrays along.
    def bare(moments: FeatureMoments) -> Any:
        return dataclasses.replace(moments, features=None)

    def read(moments: Any) -> FeatureMoments:
        return dataclasses.replace(moments, features=features)

    return RunningSummary(
        init=lambda value_dim, dtype: bare(FeatureMoments.empty(features, value_dim, dtype)),
        append=lambda moments, _, k, v, kv_mask: bare(
            merge(read(moments), FeatureMoments.of_tokens(features, k, v, kv_mask))
        ),
        read=read,
    )


def causal_state(
    q: Array, k: Array, v: Array, running: RunningSummary, *, block_size: int, kv_mask: Array | None = None
) -> AttentionState:
    """Causal attention of query t over keys j <= t: exact in two blocks, summarised before them.

    The cost is linear in T for a summary of bounded size, and only the current summary is kept, not one per position.
    Blocks are those of the real tokens, so that padding moves nothing from one block to another (``over_real_tokens``).

    Args:
        q: queries ``[T, D]`` in scaled space (`fold_scale`).
        k: keys ``[S, D]`` in scaled space.
        v: values ``[S, Dv]``.
        running: how the prefix is summarised.
        block_size: tokens per block.
        kv_mask: true where a key is real, ``[S]``. The query of a hidden key gives 0 if a real key comes after it.

    Returns:
        The `AttentionState` of the queries.

    Raises:
        TypeError: tensors that are not floating point, what is no `RunningSummary`.
        ValueError: shapes that do not fit, a block size below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, fold_scale
        >>> from approx_attention.core import causal_state
        >>> from approx_attention.methods import running_exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (8, 4)) for i in range(3))
        >>> state = causal_state(*fold_scale(q, k), v, running_exact(4, max_length=8), block_size=2)
        >>> bool(jnp.allclose(state.out, exact(q, k, v, is_causal=True), atol=1e-5))
        True
    """
    check_rows("q", q, "[T, D]")
    check_tokens(k, v, kv_mask)
    if not isinstance(running, RunningSummary):
        raise TypeError(f"running must be a RunningSummary, got {type(running).__name__}")
    block_size = min(check_count("block_size", block_size), q.shape[0])

    def state(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        return causal_state_by_place(q, k, v, running, block_size=block_size, kv_mask=kv_mask)

    return over_real_tokens(state, q, k, v, kv_mask, is_causal=True)


def causal_state_by_place(
    q: Array, k: Array, v: Array, running: RunningSummary, *, block_size: int, kv_mask: Array | None = None
) -> AttentionState:
    """`causal_state` with blocks of all places, padding included: for patterns, which count places too."""
    num_queries, num_keys = q.shape[0], min(q.shape[0], k.shape[0])
    tokens = k, v, real_keys(kv_mask, k.shape[0])
    q_blocks = in_blocks(q, block_size)
    blocks = Block(*(in_blocks(pad_rows(x[:num_keys], num_queries - num_keys), block_size) for x in tokens))
    past = Past.empty(running, block_size, k.shape[-1], v.shape[-1], k.dtype)
    _, state = scan_blocks(running, past, 0, q_blocks, blocks, num_queries)
    return out_of_blocks(state, num_queries)


def scan_blocks(
    running: RunningSummary, past: Past, first: Array | int, q_blocks: Array, blocks: Block, length: Array | int
) -> tuple[Past, AttentionState]:
    """Takes blocks of tokens in order, each of which attends to itself and its past.

    Args:
        running: how the prefix is summarised.
        past: the past of the first block.
        first: the number of the first block in its sequence; ``past.before`` is block ``first - 1``.
        q_blocks: queries ``[blocks, b, D]``.
        blocks: their tokens, stacked.
        length: number of tokens; blocks after that of the last token are not taken into the past.

    Returns:
        The past of the block of the last token, and the states ``[blocks, b]``.
    """
    block_size = q_blocks.shape[1]

    @keeping_choices
    def step(past: Past, args: tuple[Array, Array, Block]) -> tuple[Past, AttentionState]:
        index, q, block = args
        state = _attend_block(running, q, past.before, block, past.prefix)
        more = (index + 1) * block_size < length
        return lax.cond(more, lambda past: move_on(running, past, first + index, block), lambda past: past, past), state

    # Of tokens only: a cache must not come to depend on queries. Integers without axes count tokens, the same for all;
    # mapped, they would make selections of conditions, which JAX cannot differentiate there.
    leaves, structure = jax.tree.flatten(past)
    counts = [x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) for x in leaves]
    arrays = [x for x, is_count in zip(leaves, counts, strict=True) if not is_count]
    blocks, varying = along_with((blocks, arrays), arrays, blocks)
    varying = iter(varying)
    past = structure.unflatten([x if is_count else next(varying) for x, is_count in zip(leaves, counts, strict=True)])
    return lax.scan(step, past, (jnp.arange(q_blocks.shape[0], dtype=jnp.int32), q_blocks, blocks))


def move_on(running: RunningSummary, past: Past, number: Array, block: Block) -> Past:
    """The past of the block after number ``number``, from that block and its own past."""
    start = (number - 1) * block.k.shape[0]
    prefix = lax.cond(
        number > 0,
        lambda prefix: running.append(prefix, start, *past.before),
        lambda prefix: prefix,
        past.prefix,
    )
    return Past(block, prefix)


def _attend_block(running: RunningSummary, q: Array, before: Block, current: Block, prefix: Any) -> AttentionState:
    """Queries over the block before theirs, over their own causally, and over the summarised prefix."""
    block_size = q.shape[0]
    near = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), before, current)
    visible = near.kv_mask[None, :] & jnp.tri(block_size, 2 * block_size, block_size, dtype=bool)
    summary = require_scaled_space("a running summary", running.read(prefix))
    return merge(running.near(q, near.k, near.v, mask_bias(visible, q.dtype)), attend(q, summary))
