"""Exact attention over part of the keys, by visited blocks.

Logits are plain dot products, as in `approx_attention.core`. A block is computed if one of its queries sees one of its
keys; its other pairs are hidden. Visited blocks are known when tracing, or given by lists.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from approx_attention import kernels
from approx_attention.core import (
    HIDDEN,
    KEY_BLOCK,
    AttentionState,
    by_platform,
    check_count,
    check_counts,
    dense_state,
    in_blocks,
    mask_bias,
    merge,
    out_of_blocks,
    pad_rows,
    real_keys,
)
from approx_attention.sparse.patterns import SparsePattern, check_pattern

# Blocks are batched up to this number of logits, so that on a CPU (1 MB in float32) their gathered keys and values stay
# in cache, and on accelerators (32 MB for each head) there are few sequential steps.
LOGITS, ACCELERATOR_LOGITS = 2**18, 2**23


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMap:
    """A block-sparse mask, hashable as a static argument of compiled programs.

    Attributes:
        num_queries: the number T of queries.
        num_keys: the number S of keys.
        block_size: the number of queries, and of keys, of a block.
        kinds: the index of the tile of each pair of blocks, int32 ``[ceil(T / block_size), ceil(S / block_size)]``;
            0 if the pair is not visited.
        tiles: true where a query of a block sees a key ``[kinds, block_size, block_size]``; tile 0 is all false.

    Example:
        >>> import numpy as np
        >>> blocks = BlockMap.from_blocks(np.eye(4, dtype=bool), block_size=8, num_queries=32, num_keys=32)
        >>> blocks.density, blocks.causal().density
        (0.25, 0.25)
    """

    num_queries: int
    num_keys: int
    block_size: int
    kinds: np.ndarray
    tiles: np.ndarray

    # Compared by content, so that equal maps share compiled programs; as bytes, because arrays are not hashable.
    @functools.cached_property
    def _content(self) -> tuple[Any, ...]:
        return self.num_queries, self.num_keys, self.block_size, self.kinds.tobytes(), self.tiles.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMap) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @classmethod
    def from_blocks(cls, visited: Any, *, block_size: int, num_queries: int, num_keys: int) -> Self:
        """Make the map in which every query of a block sees every key of the visited blocks.

        Args:
            visited: boolean ``[ceil(T / block_size), ceil(S / block_size)]``.
            block_size: tokens of a block.
            num_queries: the number T of queries.
            num_keys: the number S of keys.

        Returns:
            The map.

        Raises:
            ValueError: a mask of another shape, counts below 1.
            TypeError: a mask that is not boolean, counts that are not integers.
        """
        visited = np.asarray(visited)
        num_queries, num_keys, block_size = check_counts(
            num_queries=num_queries, num_keys=num_keys, block_size=block_size
        )
        shape = _num_blocks(num_queries, num_keys, block_size)
        if visited.dtype != bool:
            raise TypeError(f"visited must be boolean, got dtype {visited.dtype}")
        if visited.shape != shape:
            raise ValueError(f"visited must be [T, S] in blocks of {block_size} = {list(shape)}, got {visited.shape}")
        tiles = np.stack([np.full((block_size, block_size), seen) for seen in (False, True)])
        return cls(num_queries, num_keys, block_size, visited.astype(np.int32), tiles)

    @classmethod
    def banded(cls, before: int, after: int, *, block_size: int, num_queries: int, num_keys: int) -> Self:
        """Make the map in which every block sees itself and its neighbours.

        block_size, num_queries and num_keys: as in `from_blocks`.

        Args:
            before: the number of visited blocks of keys before a query's own block.
            after: the number of visited blocks of keys after it.

        Returns:
            The map.

        Raises:
            TypeError: sizes or numbers that are not integers.
            ValueError: sizes below 1, numbers below 0.
        """
        before, after = (check_count(name, x, least=0) for name, x in (("before", before), ("after", after)))
        num_queries, num_keys, block_size = check_counts(
            num_queries=num_queries, num_keys=num_keys, block_size=block_size
        )
        rows, columns = np.indices(_num_blocks(num_queries, num_keys, block_size))
        visited = (columns - rows >= -before) & (columns - rows <= after)
        return cls.from_blocks(visited, block_size=block_size, num_queries=num_queries, num_keys=num_keys)

    @classmethod
    def from_pattern(cls, pattern: SparsePattern, block_size: int = 64) -> Self:
        """Make the map of a pattern's support, key by key.

        Args:
            pattern: a `SparsePattern` whose arrays are known when tracing.
            block_size: tokens of a block.

        Returns:
            The map.

        Raises:
            TypeError: a traced pattern, or no `SparsePattern`; a block size that is not an integer.
            ValueError: a block size below 1.
        """
        check_pattern(pattern)
        block_size = check_count("block_size", block_size)
        if is_traced(pattern):
            raise TypeError("a BlockMap is made when tracing: its pattern must be concrete, not a traced argument")
        rows, keys = _entries(pattern)
        visited, place = np.unique(pairs_of_blocks(pattern, block_size), return_inverse=True)
        tiles = np.zeros((len(visited), block_size, block_size), bool)
        tiles[place, rows % block_size, keys % block_size] = True
        return cls._of_tiles(pattern.num_queries, pattern.num_keys, block_size, visited, tiles)

    @classmethod
    def _of_tiles(
        cls, num_queries: int, num_keys: int, block_size: int, visited: np.ndarray, tiles: np.ndarray
    ) -> Self:
        """The map of given pairs of blocks, by index, with a tile for each; equal tiles are shared."""
        shape = _num_blocks(num_queries, num_keys, block_size)
        tiles = np.concatenate([np.zeros((1, block_size, block_size), bool), tiles])
        packed = np.packbits(tiles.reshape(len(tiles), -1), axis=1)
        # Equal tiles are equal rows of packed bits. Tile 0, all zeros, sorts first.
        _, first, kind = np.unique(packed, axis=0, return_index=True, return_inverse=True)
        kinds = np.zeros(shape, np.int32)
        kinds.reshape(-1)[visited] = kind.reshape(-1)[1:]
        return cls(num_queries, num_keys, block_size, kinds, tiles[first])

    def causal(self) -> Self:
        """The map without keys after the query: blocks above the diagonal are not visited."""
        rows, columns = np.indices(self.kinds.shape)
        kinds = np.where(columns <= rows, self.kinds, 0)
        # Tiles on the diagonal lose their upper half: new tiles are appended, and equal ones are merged again.
        diagonal = self.tiles & np.tri(self.block_size, dtype=bool)
        kinds = np.where((columns == rows) & (kinds > 0), kinds + len(self.tiles), kinds)
        visited = np.flatnonzero(kinds)
        tiles = np.concatenate([self.tiles, diagonal])[kinds.reshape(-1)[visited]]
        return self._of_tiles(self.num_queries, self.num_keys, self.block_size, visited, tiles)

    @property
    def visited(self) -> np.ndarray:
        """The mask of visited blocks, boolean ``[ceil(T / block_size), ceil(S / block_size)]``."""
        return self.kinds > 0

    @property
    def density(self) -> float:
        """The share of pairs of a query and a key in visited blocks."""
        rows, columns = (
            np.minimum(self.block_size, n - self.block_size * np.arange(-(-n // self.block_size)))
            for n in (self.num_queries, self.num_keys)
        )
        return float(rows @ self.visited @ columns / (self.num_queries * self.num_keys))

    def to_mask(self) -> np.ndarray:
        """The mask of keys that each query sees, boolean ``[T, S]``."""
        mask = self.tiles[self.kinds].transpose(0, 2, 1, 3)
        rows, columns = (n * self.block_size for n in self.kinds.shape)
        return mask.reshape(rows, columns)[: self.num_queries, : self.num_keys]


def is_traced(pattern: SparsePattern) -> bool:
    """Whether the arrays of a pattern are traced."""
    return any(isinstance(x, Tracer) for x in (pattern.indices, pattern.valid))


def pairs_of_blocks(pattern: SparsePattern, block_size: int) -> np.ndarray:
    """The pair of blocks of each entry of a concrete pattern.

    Computed on the host, inside a compiled function too.

    Args:
        pattern: a pattern whose arrays are known when tracing.
        block_size: the number b of queries, and of keys, per block.

    Returns:
        Numbers ``i * ceil(S / b) + j`` of blocks i of queries and j of keys, one for each entry, row by row.

    Example:
        >>> from approx_attention import SparsePattern
        >>> from approx_attention.sparse import pairs_of_blocks
        >>> pairs_of_blocks(SparsePattern.from_indices([[0], [0, 3], [2], [1]], num_keys=4), 2).tolist()
        [0, 0, 1, 3, 2]
    """
    rows, keys = _entries(pattern)
    _, num_columns = _num_blocks(pattern.num_queries, pattern.num_keys, block_size)
    return rows // block_size * num_columns + keys // block_size


def _entries(pattern: SparsePattern) -> tuple[np.ndarray, np.ndarray]:
    rows, places = np.nonzero(np.asarray(pattern.valid))
    return rows, np.asarray(pattern.indices)[rows, places]


def _num_blocks(num_queries: int, num_keys: int, block_size: int) -> tuple[int, int]:
    return -(-num_queries // block_size), -(-num_keys // block_size)


class _Group(NamedTuple):
    """Blocks of queries that visit similar numbers of blocks of keys.

    Attributes:
        rows: the indices of the blocks of queries ``[n]``.
        lists: the visited blocks of keys of each ``[n, steps, width]``, padded with block 0.
        mask: the index of each list's mask ``[n]``, or None if every query sees every listed key.
        masks: true where the query sees the key ``[masks, steps, block_size, width * block_size]``.
    """

    rows: np.ndarray
    lists: np.ndarray
    mask: np.ndarray | None
    masks: np.ndarray | None


def _groups(blocks: BlockMap) -> list[_Group]:
    """Group blocks of queries by the number of visited blocks, and pad lists to the longest of a group.

    Lengths in a group differ by less than a factor of two, so the full rows of global tokens do not lengthen all lists.
    """
    kinds, size = blocks.kinds, blocks.block_size
    width = np.count_nonzero(kinds, axis=1)
    is_full = np.all(blocks.tiles, axis=(1, 2))
    groups = []
    for octave in np.unique(np.ceil(np.log2(width[width > 0]))):
        rows = np.flatnonzero((width > 2.0 ** (octave - 1)) & (width <= 2.0**octave))
        most = width[rows].max()
        # Long lists in steps of at most KEY_BLOCK keys, whose states merge, so that tiles stay in cache.
        steps = -(-most * size // KEY_BLOCK)
        per_step = -(-most // steps)
        # Sorted by kind instead of position, lists of the same kinds share one mask. Padding has kind 0 and comes last.
        own = np.where(kinds[rows] > 0, kinds[rows], len(blocks.tiles))
        lists = np.argsort(own, axis=1, kind="stable")[:, : steps * per_step]
        own = np.take_along_axis(kinds[rows], lists, axis=1)
        lists = np.where(own > 0, lists, 0)
        missing = steps * per_step - lists.shape[1]
        lists, own = (np.pad(x, ((0, 0), (0, missing))) for x in (lists, own))
        mask = masks = None
        if not is_full[own].all():
            distinct, mask = np.unique(own, axis=0, return_inverse=True)
            mask = mask.reshape(-1).astype(np.int32)
            masks = blocks.tiles[distinct].reshape(len(distinct), steps, per_step, size, size)
            masks = masks.swapaxes(2, 3).reshape(len(distinct), steps, size, per_step * size)
        groups.append(_Group(rows, lists.reshape(len(rows), steps, per_step).astype(np.int32), mask, masks))
    return groups


def block_sparse_state(
    q: Array,
    k: Array,
    v: Array,
    blocks: BlockMap,
    *,
    kv_mask: Array | None = None,
    logits_soft_cap: float | None = None,
) -> AttentionState:
    """Exact attention over the keys in a block map; blocks that are not visited are not computed.

    Args:
        q: queries ``[T, D]`` in scaled space.
        k: keys ``[S, D]``, without NaN in padding.
        v: values ``[S, Dv]``.
        blocks: the map.
        kv_mask: true where a key is real ``[S]``.
        logits_soft_cap: that of `kernels.state`.

    Returns:
        The `AttentionState` of the queries.
    """
    size, num_queries = blocks.block_size, q.shape[0]
    tokens = _key_blocks(k, v, size, kv_mask)
    q_blocks = in_blocks(q, size)
    groups = _groups(blocks)
    # Blocks of queries without visited blocks are not computed: their state is empty.
    unseen = np.flatnonzero(~blocks.visited.any(axis=1))
    states = []
    for group in groups:
        bias = None
        if group.mask is not None:
            assert group.masks is not None
            bias = group.mask, np.where(group.masks, 0.0, HIDDEN).astype(q.dtype)
        states.append(_attend_lists(q_blocks[group.rows], tokens, group.lists, bias, logits_soft_cap))
    if len(unseen):
        nothing = AttentionState.empty(len(unseen) * size, v.shape[-1], q.dtype)
        states.append(jax.tree.map(lambda x: x.reshape(len(unseen), size, *x.shape[1:]), nothing))
    rows = np.concatenate([*(group.rows for group in groups), unseen])
    state = jax.tree.map(lambda *x: jnp.concatenate(x), *states)
    if np.any(np.diff(rows) < 0):
        order = np.argsort(rows)
        state = jax.tree.map(lambda x: x[order], state)
    return out_of_blocks(state, num_queries)


def block_lists_state(
    q: Array,
    k: Array,
    v: Array,
    lists: Array,
    present: Array,
    *,
    block_size: int,
    kv_mask: Array | None = None,
    logits_soft_cap: float | None = None,
) -> AttentionState:
    """Exact attention of every block of queries over the blocks of keys in its list, which may be traced.

    Args:
        q: queries ``[T, D]`` in scaled space.
        k: keys ``[S, D]``, without NaN in padding.
        v: values ``[S, Dv]``.
        lists: indices of blocks of keys, int32 ``[ceil(T / block_size), W]``.
        present: mask of valid entries ``[ceil(T / block_size), W]``; no block twice.
        block_size: tokens of a block.
        kv_mask: true where a key is real ``[S]``.
        logits_soft_cap: that of `kernels.state`.

    Returns:
        The `AttentionState` of the queries.
    """
    if lists.shape[1] == 0:
        return AttentionState.empty(q.shape[0], v.shape[-1], q.dtype)
    steps = -(-lists.shape[1] * block_size // KEY_BLOCK)
    padding = -lists.shape[1] % steps
    tokens = _key_blocks(k, v, block_size, kv_mask)
    # Invalid entries refer to a hidden block after the last one.
    k_blocks, v_blocks, _ = tokens
    hidden = jnp.zeros(k_blocks.shape[:2], q.dtype) if tokens[2] is None else tokens[2]
    tokens = pad_rows(k_blocks, 1), pad_rows(v_blocks, 1), jnp.pad(hidden, ((0, 1), (0, 0)), constant_values=HIDDEN)
    lists = jnp.where(present, lists, k_blocks.shape[0])
    lists = jnp.pad(lists, ((0, 0), (0, padding)), constant_values=k_blocks.shape[0])
    lists = lists.reshape(lists.shape[0], steps, -1)
    state = _attend_lists(in_blocks(q, block_size), tokens, lists, None, logits_soft_cap)
    return out_of_blocks(state, q.shape[0])


def _key_blocks(k: Array, v: Array, block_size: int, kv_mask: Array | None) -> tuple[Array, Array, Array | None]:
    """Keys, values and biases that hide padding, in blocks; without padding biases are None."""
    if kv_mask is None and k.shape[0] % block_size == 0:
        return in_blocks(k, block_size), in_blocks(v, block_size), None
    bias = mask_bias(in_blocks(real_keys(kv_mask, k.shape[0]), block_size), k.dtype)
    return in_blocks(k, block_size), in_blocks(v, block_size), bias


def _attend_lists(
    q_blocks: Array,
    tokens: tuple[Array, Array, Array | None],
    lists: Array | np.ndarray,
    bias: tuple[np.ndarray, np.ndarray] | None,
    logits_soft_cap: float | None,
) -> AttentionState:
    """Attention of blocks of queries ``[n, b, D]`` over blocks of keys, ``lists [n, steps, width]``, in batches."""
    in_turns = functools.partial(_lists_in_turns, logits_soft_cap=logits_soft_cap)
    forms = (functools.partial(in_turns, logits=logits) for logits in (LOGITS, ACCELERATOR_LOGITS))
    cpu, default = forms
    return by_platform(q_blocks, tokens, lists, bias, cpu=cpu, default=default)


def _lists_in_turns(
    q_blocks: Array,
    tokens: tuple[Array, Array, Array | None],
    lists: Array,
    bias: tuple[Array, Array] | None,
    *,
    logits: int,
    logits_soft_cap: float | None,
) -> AttentionState:
    number, size = q_blocks.shape[:2]
    _, steps, width = lists.shape
    reach = width * size
    # Small blocks are batched to use the machine; batches run one after the other, to stay in cache.
    together = max(1, min(number, logits // (size * reach)))
    turns = -(-number // together)
    filling = turns * together - number

    def in_turns(x: Any) -> Array:
        return pad_rows(jnp.asarray(x), filling).reshape(turns, together, *x.shape[1:])

    @jax.checkpoint
    def tile(q: Array, listed: Array, masks: Array | None) -> AttentionState:
        """Blocks of queries ``[m, b, D]`` over the blocks of keys in ``listed [m, width]``."""
        k, v, key_bias = jax.tree.map(lambda x: x[listed].reshape(together, reach, *x.shape[2:]), tokens)
        if masks is None:
            return jax.vmap(functools.partial(kernels.state, logits_soft_cap=logits_soft_cap))(q, k, v, key_bias)
        masked = functools.partial(dense_state, logits_soft_cap=logits_soft_cap)
        if key_bias is not None:
            masks = jnp.where(key_bias[:, None, :] <= HIDDEN / 2, HIDDEN, masks)
        if len(masks) == 1:
            # A common mask is not copied for each block.
            return jax.vmap(masked, in_axes=(0, 0, 0, None))(q, k, v, masks[0])
        return jax.vmap(masked)(q, k, v, masks)

    def turn(args: tuple[Array, Array, Array | None]) -> AttentionState:
        q, listed, mask = args
        listed = jnp.swapaxes(listed, 0, 1)
        masks = None
        if bias is not None:
            table = jnp.asarray(bias[1])
            masks = jnp.swapaxes(table if len(table) == 1 else table[mask], 0, 1)
        first = jax.tree.map(lambda x: x[0], (listed, masks))
        state = tile(q, *first)
        if steps == 1:
            return state
        rest = jax.tree.map(lambda x: x[1:], (listed, masks))
        return lax.scan(lambda state, part: (merge(state, tile(q, *part)), None), state, rest)[0]

    state = lax.map(
        jax.checkpoint(turn), (in_turns(q_blocks), in_turns(lists), None if bias is None else in_turns(bias[0]))
    )
    return out_of_blocks(state, number)
