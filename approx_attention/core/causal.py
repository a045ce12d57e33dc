"""The causal form of every method with a summary: exact attention to nearby tokens, a running summary of the past.

Tokens are grouped in blocks. A query attends exactly (and causally) to its own block and the block before it, and to
earlier blocks through a summary that grows block by block. This definition serves training, prefill and decoding.
It has two executions. On a CPU a scan takes one block after the other, so that the data of a block stays in cache. On
accelerators, which a chain of small steps would leave idle, the summaries of all prefixes are made first, and then
all blocks attend in parallel. A prefix that keeps every token is a mask of the sequence, made where a block attends to
it, on CPUs for one block after the other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core.checks import (
    accumulation_dtype,
    check_count,
    check_key_value_fit,
    check_rows,
    check_tokens,
    logit_scale,
    real_keys,
)
from approx_attention.core.choices import keeping_choices
from approx_attention.core.padding import over_real_tokens
from approx_attention.core.quantized import Summary
from approx_attention.core.reading import attend
from approx_attention.core.softmax import SoftmaxNear, joined_state
from approx_attention.core.summaries import ChosenTokens, WeightedKV, require_scaled_space
from approx_attention.kernels import (
    AttentionState,
    along_with,
    by_platform,
    even_split,
    in_blocks,
    mask_bias,
    merge,
    out_of_blocks,
    pad_rows,
)

# Largest number of array entries per head that an accelerator holds at once: summaries of prefixes, and logits. It sets
# the size of a group of blocks, 16,384 tokens or more with 256 features of 64 values: enough to fill the device, and no
# more memory than the tokens of a long sequence. Groups smaller than the least group would leave the device idle. With
# `ChosenTokens` they may be smaller, because each query gathers other tokens.
GROUP_NUMBERS = 13_000_000
LEAST_GROUP = 6144
_OWNER = "a running summary"


def _same(x: Array) -> Array:
    return x


class RunningSummary(NamedTuple):
    """The summary of a growing prefix in bounded memory, as pure functions.

    Attributes:
        init: ``(value_dim, dtype) -> state`` of the empty prefix.
        append: ``(state, start, k, v, kv_mask) -> state`` after one more full block ``k [b, D]``, ``v [b, Dv]``, whose
            first token is at position ``start`` (int32). Every block is appended once, in order and without gaps.
        read: ``state -> summary`` of the prefix, for `attend`.
        near: ``(q, k, v, bias) -> AttentionState`` over nearby tokens, with the kernel that the summary estimates;
            softmax by default.
        space: maps queries and keys to those whose softmax attention the method estimates, before the scale is folded
            in; the identity unless the method normalises them.
        append_all: ``(state, starts [m], k [m, b, D], v, kv_mask) -> states`` after 0, 1, ..., m more blocks, stacked
            ``[m + 1, ...]``; for accelerators, where it should use a few large operations. By default blocks are
            appended one after the other. A block with a negative start contains no real token.
        of_sequence: ``(k [n, b, D], v, kv_mask) -> at``, with ``at(count)`` the state after the first ``count`` blocks
            of a sequence. It replaces ``append_all`` where each state can be computed independently of the others, and
            on CPUs ``append`` where a summary keeps every token. Arrays that do not depend on ``count`` are shared.
            ``at`` is a pytree (`jax.tree_util.Partial`) of all arrays that it uses, or None if there is no such form.
        quantized: ``(bits, block_size) -> RunningSummary``: the same summary with quantised tokens, for blocks of this
            size. None if appending changes tokens, which would be rounded again at every block.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import RunningSummary, WeightedKV, attend
        >>> def add(total, start, k, v, kv_mask):  # one token with the mean key and the summed values
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
    near: Callable[[Array, Array, Array, Array], AttentionState] = SoftmaxNear()
    space: Callable[[Array], Array] = _same
    append_all: Callable[[Any, Array, Array, Array, Array], Any] | None = None
    of_sequence: Callable[[Array, Array, Array], Callable[[Array], Any] | None] | None = None
    quantized: Callable[[int, int], "RunningSummary"] | None = None

    @property
    def logits_soft_cap(self) -> float | None:
        """The soft cap of the logits of nearby tokens and of the summary."""
        return self.near.logits_soft_cap if isinstance(self.near, SoftmaxNear) else None


class Block(NamedTuple):
    """Consecutive tokens that are attended exactly.

    Attributes:
        k: keys ``[b, D]``.
        v: values ``[b, Dv]``.
        kv_mask: true where a key is real ``[b]``.
    """

    k: Array
    v: Array
    kv_mask: Array

    @classmethod
    def empty(cls, block_size: int, head_dim: int, value_dim: int, dtype: Any) -> Self:
        """A block without real tokens: zeros, and a mask that is false.

        Args:
            block_size: the number b of tokens.
            head_dim: the number D of channels of keys.
            value_dim: the number Dv of channels of values.
            dtype: dtype of keys and values.
        """
        zeros = jnp.zeros((block_size, head_dim), dtype), jnp.zeros((block_size, value_dim), dtype)
        return cls(*zeros, jnp.zeros((block_size,), bool))


class Past(NamedTuple):
    """The tokens before a block of queries: the block just before, and the prefix before that block.

    Attributes:
        before: the `Block` just before; without real tokens if there is none.
        prefix: the state of the `RunningSummary` for all blocks before that. None if it is known to be empty when
            tracing: the queries are in the first or second block of a sequence.
    """

    before: Block
    prefix: Any

    @classmethod
    def empty(cls, running: RunningSummary, block_size: int, head_dim: int, value_dim: int, dtype: Any) -> Self:
        """The past of the first block: no tokens, and the summary of an empty prefix.

        Args:
            running: the summary of the prefix.
            block_size: the number b of tokens per block.
            head_dim: the number D of channels of keys.
            value_dim: the number Dv of channels of values.
            dtype: dtype of keys, values and the summary.
        """
        before = Block.empty(block_size, head_dim, value_dim, dtype)
        return cls(before, running.init(value_dim, dtype))


def causal_state(
    q: Array,
    k: Array,
    v: Array,
    running: RunningSummary,
    *,
    block_size: int,
    kv_mask: Array | None = None,
    scale: float | Array = 1.0,
) -> AttentionState:
    """Compute causal attention of query t over keys j <= t: exact within two blocks, summarised before them.

    The cost is linear in T for a summary of bounded size. A CPU keeps only the current summary; accelerators keep those
    of a bounded number of blocks. Memory is linear too where a summary keeps every token. Blocks are cut over real
    tokens, so that padding does not change them (``over_real_tokens``).

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        running: the summary of the prefix.
        block_size: tokens per block; larger blocks are more accurate.
        kv_mask: true where a key is real, ``[S]``. The query of a hidden key gives 0 if a real key comes after it.
        scale: factor of the logits, folded into queries and keys; 1 for tokens in scaled space (`fold_scale`). Tokens
            are scaled and cast to the accumulation dtype block by block, without a full copy.

    Returns:
        The `AttentionState` of the queries.

    Raises:
        TypeError: tensors that are not floating point, ``running`` is not a `RunningSummary`.
        ValueError: shapes that do not match, a block size below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact
        >>> from approx_attention.core import causal_state
        >>> from approx_attention.methods import running_exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (8, 4)) for i in range(3))
        >>> state = causal_state(q, k, v, running_exact(4, max_length=8), block_size=2, scale=0.5)
        >>> bool(jnp.allclose(state.out, exact(q, k, v, is_causal=True), atol=1e-5))
        True
    """
    check_rows("q", q, "[T, D]")
    check_tokens(k, v, kv_mask)
    check_key_value_fit(q, k, v)
    if not isinstance(running, RunningSummary):
        raise TypeError(f"running must be a RunningSummary, got {type(running).__name__}")
    block_size = min(check_count("block_size", block_size), q.shape[0])

    def state(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        return causal_state_by_place(q, k, v, running, block_size=block_size, kv_mask=kv_mask, scale=scale)

    return over_real_tokens(state, q, k, v, kv_mask, is_causal=True)


def causal_state_by_place(
    q: Array,
    k: Array,
    v: Array,
    running: RunningSummary,
    *,
    block_size: int,
    kv_mask: Array | None = None,
    scale: float | Array = 1.0,
) -> AttentionState:
    """`causal_state` with blocks over all positions, including padding: for patterns, which are over positions.

    Arguments and result are those of `causal_state`. Only the scale is checked. Padding takes positions in blocks, and
    queries at these positions attend like others.

    Raises:
        TypeError: a scale that is not one number.
        ValueError: a concrete scale that is not positive and finite.
    """
    num_queries, num_keys = q.shape[0], min(q.shape[0], k.shape[0])
    # Scaled keys vary over mapped axes where the scale does, and so do their summaries.
    k = along_with(k, scale) if isinstance(scale, Array) else k
    tokens = k, v, real_keys(kv_mask, k.shape[0])
    q_blocks = in_blocks(q, block_size)
    blocks = Block(*(in_blocks(pad_rows(x[:num_keys], num_queries - num_keys), block_size) for x in tokens))
    running = _of_unscaled(running, logit_scale(scale, k.shape[-1]), accumulation_dtype(q, k, v))
    none = jax.tree.map(lambda x: jnp.zeros_like(x[0]), blocks)
    return out_of_blocks(causal_blocks(running, none, 0, q_blocks, blocks), num_queries)


def _of_unscaled(running: RunningSummary, scale: float | Array, dtype: Any) -> RunningSummary:
    """The same summary for unscaled keys and values, which are cast and scaled block by block, without a full copy."""
    root = jnp.sqrt(jnp.asarray(scale, dtype))

    def in_space(x: Array) -> Array:
        return x.astype(dtype) * root

    def tokens(k: Array, v: Array, kv_mask: Array) -> tuple[Array, Array, Array]:
        return in_space(k), v.astype(dtype), kv_mask

    def read(state: Any) -> Summary:
        summary: Any = require_scaled_space(_OWNER, running.read(state))
        # Queries are unscaled too; the summary carries the scale.
        return dataclasses.replace(summary, scale=jnp.asarray(scale, dtype))

    def near(q: Array, k: Array, v: Array, bias: Array) -> AttentionState:
        return running.near(in_space(q), in_space(k), v.astype(dtype), bias.astype(dtype))

    if isinstance(running.near, SoftmaxNear):
        near = SoftmaxNear(scale, running.logits_soft_cap)
    append_all: Any = running.append_all
    of_sequence: Any = running.of_sequence
    return running._replace(
        init=lambda value_dim, _: running.init(value_dim, dtype),
        append=lambda state, start, *block: running.append(state, start, *tokens(*block)),
        read=read,
        near=near,
        append_all=append_all and (lambda state, starts, *blocks: append_all(state, starts, *tokens(*blocks))),
        of_sequence=of_sequence and (lambda *blocks: of_sequence(*tokens(*blocks))),
    )


def causal_blocks(running: RunningSummary, before: Block, first: int, q_blocks: Array, blocks: Block) -> AttentionState:
    """The attention states of the blocks of a sequence, each over itself and its past.

    Args:
        running: the summary of the prefix.
        before: the block before the first one.
        first: the number of the first block, 0 or 1: there is at most one block before it.
        q_blocks: queries ``[n, b, D]``.
        blocks: keys, values and masks of the blocks, stacked.

    Returns:
        The states ``[n, b]``.
    """
    past = Past(before, None)
    length = q_blocks.shape[0] * q_blocks.shape[1]
    keeps_tokens = _keeps_tokens(running, before)

    def in_turn(q: Array, blocks: Block) -> AttentionState:
        if keeps_tokens:
            # A gradient would store the prefix, all tokens, again at every step of a loop that carries it.
            return _together(running, past, first, q, blocks, None, at_once=1)[1]
        return _in_turn(running, past, first, q, blocks, length)[1]

    def together(q: Array, blocks: Block) -> AttentionState:
        return _together(running, past, first, q, blocks, None)[1]

    return by_platform(q_blocks, blocks, cpu=in_turn, default=together)


def _keeps_tokens(running: RunningSummary, block: Block) -> bool:
    """Whether summaries keep every token, and each can be computed from the sequence without the one before."""
    if running.of_sequence is None:
        return False
    empty = functools.partial(running.init, block.v.shape[-1], block.v.dtype)
    return isinstance(jax.eval_shape(lambda: running.read(empty())), ChosenTokens)


def scan_blocks(
    running: RunningSummary, past: Past, first: Array | int, q_blocks: Array, blocks: Block, length: Array | int
) -> tuple[Past, AttentionState]:
    """Process more blocks of tokens in order, each attending to itself and its past.

    Args:
        running: the summary of the prefix.
        past: the past of the first block.
        first: the number of the first block in its sequence; ``past.before`` is block ``first - 1``.
        q_blocks: queries ``[n, b, D]`` in scaled space.
        blocks: keys, values and masks of the blocks, stacked.
        length: number of tokens; blocks after the last token are not added to the past.

    Returns:
        The past of the block with the last token, and the states ``[n, b]``.
    """
    length = jnp.asarray(length, jnp.int32)
    running = running._replace(read=lambda state, read=running.read: require_scaled_space(_OWNER, read(state)))
    in_turn = lambda past, *args: _in_turn(running, past, first, *args)  # noqa: E731
    together = lambda past, *args: _together(running, past, first, *args)  # noqa: E731
    return by_platform(past, q_blocks, blocks, length, cpu=in_turn, default=together)


def state_of_blocks(running: RunningSummary, blocks: Block) -> Any:
    """The state of the running summary after the first blocks of a sequence.

    Args:
        running: the summary of the prefix.
        blocks: keys, values and masks of n full blocks, stacked: ``[n, b, D]``, ``[n, b, Dv]`` and ``[n, b]``.

    Returns:
        The state after all n blocks, for `RunningSummary.read`.
    """
    starts = jnp.arange(blocks.kv_mask.shape[0], dtype=jnp.int32) * blocks.kv_mask.shape[1]
    empty = running.init(blocks.v.shape[-1], blocks.v.dtype)

    def in_turn(blocks: Block) -> Any:
        step = keeping_choices(lambda state, args: (running.append(state, *args), None))
        return lax.scan(step, along_with(empty, *blocks), (starts, *blocks))[0]

    def together(blocks: Block) -> Any:
        at = None if running.of_sequence is None else running.of_sequence(*blocks)
        if at is not None:
            return at(jnp.asarray(starts.shape[0], jnp.int32))
        if running.append_all is None:
            return in_turn(blocks)
        append_all: Any = running.append_all
        groups, size = even_split(starts.shape[0], _least_blocks(blocks.kv_mask.shape[1]))
        padding = groups * size - starts.shape[0]
        grouped = jax.tree.map(lambda x: pad_rows(x, padding).reshape(groups, size, *x.shape[1:]), (starts, *blocks))
        step = keeping_choices(lambda state, args: (jax.tree.map(lambda x: x[-1], append_all(state, *args)), None))
        return lax.scan(step, along_with(empty, *blocks), grouped)[0]

    return by_platform(blocks, cpu=together if _keeps_tokens(running, blocks) else in_turn, default=together)


def _in_turn(
    running: RunningSummary,
    past: Past,
    first: Array | int,
    q_blocks: Array,
    blocks: Block,
    length: Array | int,
) -> tuple[Past, AttentionState]:
    """The sequential execution: one block after the other, storing only the current prefix."""
    block_size = q_blocks.shape[1]
    past = _started(running, past)

    @keeping_choices
    def step(past: Past, args: tuple[Array, Array, Block]) -> tuple[Past, AttentionState]:
        index, q, block = args
        state = _attend_block(running, q, past.before, block, past.prefix)
        return move_on(running, past, first + index, block, more=(index + 1) * block_size < length), state

    past, blocks = _varying_alike(past, blocks)
    return lax.scan(step, past, (jnp.arange(q_blocks.shape[0], dtype=jnp.int32), q_blocks, blocks))


def _together(
    running: RunningSummary,
    past: Past,
    first: Array | int,
    q_blocks: Array,
    blocks: Block,
    length: Array | None,
    at_once: int | None = None,
) -> tuple[Past, AttentionState]:
    """The parallel execution: the attention of many blocks at once, with a prefix for each.

    Blocks are processed in groups, of ``at_once`` blocks or as many as memory allows, so that memory is linear in the
    sequence. Without a length no past is returned.
    """
    num_blocks, block_size = q_blocks.shape[:2]
    at = None
    if past.prefix is None and running.of_sequence is not None and num_blocks + first > 1:
        # The last block only attends; earlier blocks enter prefixes.
        earlier = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y[:-1]])[1 - first :], past.before, blocks)
        at = jax.checkpoint(running.of_sequence)(*earlier)
    if at is None:
        past = _started(running, past)

    def attended(prefix: Any, numbers: Array, q: Array, before: Block, block: Block) -> tuple[AttentionState, Any]:
        """The attention of these blocks, and the states before each and after the last, if they are needed."""
        if at is not None:

            def of_block(at: Any, number: Array, q: Array, before: Block, block: Block) -> AttentionState:
                return _attend_block(running, q, before, block, at(jnp.maximum(number - 1, 0)))

            # Within one map: arrays that all prefixes share, such as the keys of `LiftedKV`, are not copied.
            return jax.vmap(functools.partial(of_block, at))(numbers, q, before, block), None
        states = append_all_of(running)(prefix, (numbers - 1) * block_size, *before)
        prefixes = jax.tree.map(lambda x: x[:-1], states)
        return jax.vmap(functools.partial(_attend_block, running))(q, before, block, prefixes), states

    groups, size = even_split(num_blocks, at_once or _blocks_at_once(running, at, past, q_blocks))
    padding = groups * size - num_blocks
    grouped = jax.tree.map(lambda x: pad_rows(x, padding).reshape(groups, size, *x.shape[1:]), (q_blocks, blocks))

    @keeping_choices
    def group(past: Past, args: tuple[Array, Array, Block]) -> tuple[Past, AttentionState]:
        index, q, block = args
        around = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), past.before, block)
        before, block = (jax.tree.map(lambda x, part=part: x[part], around) for part in (slice(-1), slice(1, None)))
        numbers = first + index * size + jnp.arange(size, dtype=jnp.int32)
        state, states = attended(past.prefix, numbers, q, before, block)
        if length is None:
            return Past(*jax.tree.map(lambda x: x[-1], (block, states))), state
        # The block with the last token is not part of the past.
        passed = jnp.clip((length - 1) // block_size - index * size, 0, size)
        moved = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, passed, keepdims=False), (around, states))
        return Past(*moved), state

    past, blocks = _varying_alike(past, grouped[1])
    past, state = lax.scan(group, past, (jnp.arange(groups, dtype=jnp.int32), grouped[0], blocks))
    return past, jax.tree.map(lambda x: out_of_blocks(x, num_blocks), state)


def _started(running: RunningSummary, past: Past) -> Past:
    """The past with the state of an empty prefix in place of None."""
    if past.prefix is not None:
        return past
    v = past.before.v
    return past._replace(prefix=running.init(v.shape[-1], v.dtype))


def append_all_of(running: RunningSummary) -> Callable[..., Any]:
    """`RunningSummary.append_all`, by default one block after the other.

    Args:
        running: the summary of the prefix.

    Returns:
        ``(state, starts [m], k [m, b, D], v, kv_mask) -> states``, stacked ``[m + 1, ...]``. A block with a negative
        start leaves the state unchanged.
    """

    def append(state: Any, start: Array, *block: Array) -> Any:
        return lax.cond(start >= 0, lambda state: running.append(state, start, *block), lambda state: state, state)

    return running.append_all or appended_in_turn(append)


def appended_in_turn(append: Callable[..., Any]) -> Callable[..., Any]:
    """A `RunningSummary.append_all` that appends one block after the other.

    Args:
        append: ``(state, start, k, v, kv_mask) -> state``, as in `RunningSummary`.

    Returns:
        ``(state, starts [m], k [m, b, D], v, kv_mask) -> states``, stacked ``[m + 1, ...]``, the first of which is the
        given state.
    """

    def append_all(state: Any, starts: Array, *blocks: Array) -> Any:
        @keeping_choices
        def step(state: Any, args: Any) -> tuple[Any, Any]:
            state = append(state, *args)
            return state, state

        state = along_with(state, *blocks)
        _, states = lax.scan(step, state, (starts, *blocks))
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, states)

    return append_all


def _blocks_at_once(running: RunningSummary, at: Any, past: Past, q_blocks: Array) -> int:
    """The number of blocks whose prefixes and logits `GROUP_NUMBERS` allows."""
    block_size = q_blocks.shape[1]
    prefix = past.prefix if at is None else jax.eval_shape(at, jnp.zeros((), jnp.int32))
    # Reading the prefix of each block takes another array of its size.
    copies = 2 * sum(x.size for x in jax.tree.leaves(prefix))

    def read(prefix: Any) -> tuple[Summary, Array]:
        summary = running.read(prefix)
        return summary, summary.mass

    summary, mass = jax.eval_shape(read, prefix)
    if isinstance(summary, ChosenTokens):
        # Prefixes of one sequence share their tokens.
        return max(GROUP_NUMBERS // (summary.numbers_at_once(block_size) + (copies if at is None else 0)), 1)
    return max(GROUP_NUMBERS // (block_size * (2 * block_size + mass.size) + copies), _least_blocks(block_size))


def _least_blocks(block_size: int) -> int:
    """The number of blocks in the smallest group: at most 128, because every block has a prefix."""
    return min(-(-LEAST_GROUP // block_size), 128)


def _varying_alike(past: Past, blocks: Any) -> tuple[Past, Any]:
    """Make the initial carry of a loop vary over the same mapped axes as its result, which depends on tokens.

    Only over those of tokens: a cache must not depend on queries. Scalar integers count tokens and are equal for all;
    if mapped, they would turn conditions into selections, which JAX cannot differentiate there.
    """
    leaves, structure = jax.tree.flatten(past)
    counts = [x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) for x in leaves]
    arrays = [x for x, is_count in zip(leaves, counts, strict=True) if not is_count]
    blocks, varying = along_with((blocks, arrays), arrays, blocks)
    varying = iter(varying)
    past = structure.unflatten([x if is_count else next(varying) for x, is_count in zip(leaves, counts, strict=True)])
    return past, blocks


def move_on(running: RunningSummary, past: Past, number: Array, block: Block, more: Array | bool = True) -> Past:
    """The past of the next block, from a block and its past.

    Args:
        running: the summary of the prefix.
        past: the past of the block.
        number: the number of the block in its sequence, int32.
        block: keys, values and mask of the block.
        more: false if no token follows the block; then its past is returned.

    Returns:
        The past of block ``number + 1``: this block, and the prefix to which the block before it was appended.
    """
    start = (number - 1) * block.k.shape[0]
    # One condition instead of two nested ones: each stores residuals for its derivatives.
    prefix = lax.cond(
        (number > 0) & more,
        lambda prefix: running.append(prefix, start, *past.before),
        lambda prefix: prefix,
        past.prefix,
    )
    return Past(jax.tree.map(lambda own, before: jnp.where(more, own, before), block, past.before), prefix)


def _attend_block(running: RunningSummary, q: Array, before: Block, current: Block, prefix: Any) -> AttentionState:
    """Attend over the previous block, causally over the queries' own block, and over the summarised prefix."""
    near = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), before, current)
    # In float16 the bias of a hidden key would be infinite, and a row of hidden keys NaN.
    dtype, summary = accumulation_dtype(q), running.read(prefix)
    if isinstance(running.near, SoftmaxNear):
        key_bias = mask_bias(near.kv_mask, dtype)
        apart = functools.partial(_apart, running.near)
        if not isinstance(summary, WeightedKV) or summary.value_range is not None:
            return apart(q, near.k, near.v, key_bias, summary)
        as_one = functools.partial(_as_one, running.near)
        return by_platform(q, near.k, near.v, key_bias, summary, cpu=apart, default=as_one)
    block_size = q.shape[0]
    visible = near.kv_mask[None, :] & jnp.tri(block_size, 2 * block_size, block_size, dtype=bool)
    nearby = running.near(q, near.k, near.v, mask_bias(visible, dtype))
    return merge(nearby, attend(q.astype(nearby.lse.dtype), summary))


def _apart(near: SoftmaxNear, q: Array, k: Array, v: Array, key_bias: Array, summary: Summary) -> AttentionState:
    """Attend over nearby tokens and over a summary, and merge both states."""
    nearby = near.causal(q, k, v, key_bias)
    return merge(nearby, attend(q.astype(nearby.lse.dtype), summary, logits_soft_cap=near.logits_soft_cap))


def _as_one(near: SoftmaxNear, q: Array, k: Array, v: Array, key_bias: Array, summary: WeightedKV) -> AttentionState:
    """Attend over nearby tokens and the tokens of a summary as one set of keys."""
    dtype = accumulation_dtype(q, k, v)
    # Both in the space of the summary, whose keys are already scaled.
    root = jnp.sqrt(jnp.asarray(near.scale, dtype))
    far, nearby = (summary.k, summary.values, summary.log_mass), (k.astype(dtype) * root, v.astype(dtype), key_bias)
    last, logits_soft_cap = k.shape[0] - q.shape[0], near.logits_soft_cap
    return joined_state(q.astype(dtype) * root, far, nearby, last=last, logits_soft_cap=logits_soft_cap)
