"""The keys within reach of a query, by position, and the visited blocks of keys of a block of queries."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


class Reach(NamedTuple):
    """Query t is at position ``t + offset`` and sees keys from ``left`` before it to ``right`` after it.

    Attributes:
        offset: the position of the first query.
        left: number of earlier keys; None for all.
        right: number of later keys; None for all.
    """

    offset: int = 0
    left: int | None = None
    right: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether every query sees all keys."""
        return self.left is None and self.right is None

    def seen(self, query: Any, key: Any) -> Any:
        """Whether a query sees a key, by index."""
        distance = key - query - self.offset
        seen = True
        if self.left is not None:
            seen = distance >= -self.left
        if self.right is not None:
            seen = seen & (distance <= self.right)
        return seen

    def within(self, num_queries: int, num_keys: int) -> "Reach":
        """The same pairs for given lengths, without bounds that exclude nothing."""
        left = None if self.left is not None and self.left >= num_queries - 1 + self.offset else self.left
        right = None if self.right is not None and self.right >= num_keys - 1 - self.offset else self.right
        return Reach(0 if left is right is None else self.offset, left, right)

    def of_keys(self) -> "Reach":
        """The reach of keys over queries: the same pairs with the two exchanged."""
        return Reach(-self.offset, self.right, self.left)

    def first(self, block: Any, rows: int, columns: int) -> Any:
        """The first block of ``columns`` keys that a block of ``rows`` queries visits."""
        if self.left is None:
            return 0
        return _larger(_floor_quotient(block, rows, self.offset - self.left, columns), 0)

    def end(self, block: Any, rows: int, columns: int, key_blocks: int) -> Any:
        """The block after the last visited one of ``key_blocks``; none is visited if it is not after `first`."""
        if self.right is None:
            return key_blocks
        last = _floor_quotient(block, rows, rows - 1 + self.offset + self.right, columns)
        return -_larger(-(last + 1), -key_blocks)

    def most_blocks(self, blocks: int, rows: int, columns: int, key_blocks: int) -> int:
        """The largest number of key blocks that a block of queries visits."""
        return max(self.end(i, rows, columns, key_blocks) - self.first(i, rows, columns) for i in range(blocks))

    def is_whole(self, i: Any, j: Any, rows: int, columns: int) -> Any:
        """Whether every query of block i sees every key of block j, as a bool or an array."""
        is_whole = True
        if self.left is not None:
            is_whole = j * columns >= (i + 1) * rows - 1 + self.offset - self.left
        if self.right is not None:
            is_whole = is_whole & ((j + 1) * columns - 1 <= i * rows + self.offset + self.right)
        return is_whole


def _larger(a: Any, b: int) -> Any:
    return max(a, b) if isinstance(a, int) else jnp.maximum(a, b)


def _floor_quotient(block: Any, rows: int, shift: int, columns: int) -> Any:
    """``(block * rows + shift) // columns``, also for a traced block.

    The operator would query the default device, which may not exist when a kernel is compiled for another machine.
    """
    if isinstance(block, int):
        return (block * rows + shift) // columns
    # The quotient of non-negative numbers needs no correction.
    above = max(0, (columns - 1 - shift) // columns)
    return lax.div(block * rows + (shift + above * columns), jnp.int32(columns)) - above
