r"""Sparse attention patterns: the visible keys of each query and their weights, as padded indices.

A pattern represents a row-stochastic matrix A with few entries per row. Softmax is invariant to a constant added to a
row of logits, so weights are stored as logarithms up to such a constant. Patterns are made and checked on the host.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray

from approx_attention.core import check_count, check_key

# The largest number of rows named in an error message.
NAMED_ROWS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparsePattern:
    r"""A sparse attention matrix in padded index form.

    .. math:: A_{ts} = w_{ts} \Big/ \sum_{s' \in S_t} w_{ts'}\ (s \in S_t), \qquad A_{ts} = 0\ (s \notin S_t).

    Every row has at least one key, and no key twice. Keys ascend, followed by padding (key 0, not valid). The fields
    are not checked: make patterns with the constructors below.

    Attributes:
        indices: the keys of each row, int32 ``[T, K]``.
        log_weights: natural logarithms of their weights ``[T, K]``, up to a constant in each row; ``-inf`` on padding.
        valid: false on padding ``[T, K]``.
        num_keys: the number S of keys.

    Example:
        >>> from approx_attention import SparsePattern
        >>> print(SparsePattern.banded(4, [-1, 0]).to_dense())
        [[1.  0.  0.  0. ]
         [0.5 0.5 0.  0. ]
         [0.  0.5 0.5 0. ]
         [0.  0.  0.5 0.5]]
    """

    indices: Array
    log_weights: Array
    valid: Array
    num_keys: int = dataclasses.field(metadata={"static": True})

    @property
    def num_queries(self) -> int:
        """The number T of rows."""
        return self.indices.shape[0]

    @property
    def keys_per_row(self) -> int:
        """The largest number K of keys in a row."""
        return self.indices.shape[1]

    @classmethod
    def from_dense(cls, weights: Any, atol: float = 0.0) -> Self:
        """Make the pattern of a matrix.

        Args:
            weights: a matrix ``[T, S]`` of non-negative weights; rows need not sum to 1.
            atol: entries up to this are treated as zeros.

        Returns:
            The pattern.

        Raises:
            ValueError: not a matrix, negative or infinite weights or limit, rows without a key.

        Example:
            >>> import jax.numpy as jnp
            >>> SparsePattern.from_dense(jnp.eye(3)).indices.tolist()
            [[0], [1], [2]]
        """
        weights = np.asarray(weights)
        if weights.ndim != 2:
            raise ValueError(f"weights must be [T, S], got shape {weights.shape}")
        _check_weights(weights)
        if not 0 <= atol < math.inf:
            raise ValueError(f"atol must be finite and not negative, got {atol}")
        rows, keys = np.nonzero(weights > atol)
        return cls._of_entries(rows, keys, _log(weights[rows, keys]), *weights.shape)

    @classmethod
    def from_indices(cls, indices: Any, weights: Any = None, *, num_keys: int) -> Self:
        """Make the pattern of given keys.

        Args:
            indices: the keys of each row, an array ``[T, K]`` or a sequence of sequences of any lengths.
            weights: weights in the same form; equal weights by default. An entry with weight 0 is padding.
            num_keys: the number S of keys.

        Returns:
            The pattern.

        Raises:
            ValueError: keys outside ``[0, S)`` or twice in a row, weights that are negative or infinite or do not match
                the keys, rows without a key.
            TypeError: keys that are not integers.

        Example:
            >>> SparsePattern.from_indices([[0], [0, 2]], num_keys=3).valid.tolist()
            [[True, False], [True, True]]
        """
        num_keys = check_count("num_keys", num_keys)
        rows, keys = _ragged("indices", indices)
        if keys.dtype.kind not in "iu":
            raise TypeError(f"indices must be integers, got dtype {keys.dtype}")
        log_weights = np.zeros(keys.shape, np.float32)
        if weights is not None:
            weight_rows, values = _ragged("weights", weights)
            if not np.array_equal(rows, weight_rows):
                raise ValueError(
                    "weights must have one entry for each of indices in every row, got "
                    f"{len(values)} in {len(weights)} rows for {len(keys)} in {len(indices)} rows"
                )
            _check_weights(values)
            present = values > 0
            rows, keys, log_weights = rows[present], keys[present], _log(values[present])
        return cls._of_entries(rows, keys, log_weights, len(indices), num_keys)

    @classmethod
    def banded(
        cls, num_tokens: int, offsets: Sequence[int], weights: Sequence[float] | None = None, is_causal: bool = False
    ) -> Self:
        """Make a pattern of diagonals: query t sees the keys t + o for the given offsets o, within the sequence.

        Args:
            num_tokens: the number T of queries, and of keys.
            offsets: the offsets; ``range(-w, w + 1)`` is a window.
            weights: a weight for each offset; equal weights by default.
            is_causal: leave out offsets above 0.

        Returns:
            The pattern.

        Raises:
            ValueError: repeated offsets, weights that do not match the offsets, rows without a key.
            TypeError: offsets that are not integers.

        Example:
            >>> SparsePattern.banded(4, range(-1, 2), is_causal=True).indices.tolist()
            [[0, 0], [0, 1], [1, 2], [2, 3]]
        """
        num_tokens = check_count("num_tokens", num_tokens)
        steps = _integers("offsets", offsets)
        sizes = np.ones(len(steps), np.float32) if weights is None else np.asarray(weights)
        if sizes.shape != steps.shape:
            raise ValueError(f"weights must be one for each of {len(steps)} offsets, got shape {sizes.shape}")
        _check_weights(sizes)
        keys = np.arange(num_tokens)[:, None] + steps[None, :]
        seen = (keys >= 0) & (keys < num_tokens) & (sizes > 0)[None, :] & ((steps <= 0) | (not is_causal))[None, :]
        rows, which = np.nonzero(seen)
        return cls._of_entries(rows, keys[seen], _log(sizes)[which], num_tokens, num_tokens)

    @classmethod
    def block(cls, num_tokens: int, block_size: int, block_map: Any = None, *, num_keys: int | None = None) -> Self:
        """Make a pattern of blocks: blocks of queries see whole blocks of keys, with equal weights.

        Args:
            num_tokens: the number T of queries.
            block_size: tokens per block b; the last block may be shorter.
            block_map: boolean ``[ceil(T/b), ceil(S/b)]``, the visible blocks of keys of each block of queries; by
                default its own block.
            num_keys: the number S of keys, T by default.

        Returns:
            The pattern.

        Raises:
            ValueError: a map of another shape, rows without a key.

        Example:
            >>> SparsePattern.block(4, 2).indices.tolist()
            [[0, 1], [0, 1], [2, 3], [2, 3]]
        """
        num_tokens = check_count("num_tokens", num_tokens)
        num_keys = num_tokens if num_keys is None else check_count("num_keys", num_keys)
        block_size = check_count("block_size", block_size)
        shape = -(-num_tokens // block_size), -(-num_keys // block_size)
        block_map = np.eye(*shape, dtype=bool) if block_map is None else np.asarray(block_map)
        if block_map.shape != shape or block_map.dtype != bool:
            raise ValueError(f"block_map must be boolean {list(shape)}, got {block_map.dtype} {block_map.shape}")
        columns = np.repeat(block_map, block_size, axis=1)[:, :num_keys]
        rows, keys = np.nonzero(np.repeat(columns, block_size, axis=0)[:num_tokens])
        return cls._of_entries(rows, keys, np.zeros(keys.shape, np.float32), num_tokens, num_keys)

    @classmethod
    def strided(cls, num_tokens: int, stride: int, is_causal: bool = False) -> Self:
        """Make a strided pattern: query t sees keys at multiples of a stride from t, with equal weights.

        Args:
            num_tokens: the number T of queries, and of keys.
            stride: the distance between keys; its `union` with `banded` is the pattern of sparse transformers.
            is_causal: leave out keys after t.

        Returns:
            The pattern.

        Raises:
            ValueError: counts below 1.

        Example:
            >>> SparsePattern.strided(4, 2).indices.tolist()
            [[0, 2], [1, 3], [0, 2], [1, 3]]

        Reference:
            :cite:p:`child2019sparse`, section 4.2.
        """
        num_tokens = check_count("num_tokens", num_tokens)
        stride = check_count("stride", stride)
        reach = num_tokens - 1 - (num_tokens - 1) % stride
        return cls.banded(num_tokens, range(-reach, reach + 1, stride), is_causal=is_causal)

    @classmethod
    def random(cls, key: PRNGKeyArray, num_tokens: int, keys_per_row: int) -> Self:
        r"""Sample k-sparse rows and columns: k disjoint permutations, each uniformly distributed.

        With uniform permutations :math:`\pi, \sigma` and distinct random shifts :math:`r_j`, row t sees the keys
        :math:`\pi((\sigma(t) + r_j) \bmod T)`: every row is a uniform set of k keys, with equal weights.

        Args:
            key: typed PRNG key. It may be traced.
            num_tokens: the number T of queries, and of keys.
            keys_per_row: the number k.

        Returns:
            The pattern.

        Raises:
            ValueError: more keys per row than tokens.

        Example:
            >>> import jax
            >>> pattern = SparsePattern.random(jax.random.key(0), 6, 2)
            >>> (pattern.to_dense() > 0).sum(axis=0).tolist()
            [2, 2, 2, 2, 2, 2]
        """
        keys_per_row = check_count("keys_per_row", keys_per_row)
        num_tokens = check_count("num_tokens", num_tokens)
        if keys_per_row > num_tokens:
            raise ValueError(f"keys_per_row must be at most num_tokens = {num_tokens}, got {keys_per_row}")
        key_rows, key_columns, key_shifts = jax.random.split(check_key("SparsePattern.random", key), 3)
        rows, columns, shifts = (
            jax.random.permutation(key, jnp.arange(num_tokens, dtype=jnp.int32))
            for key in (key_rows, key_columns, key_shifts)
        )
        # Distinct shifts make the k permutations disjoint, without rejection: the key may be traced.
        indices = columns[(rows[:, None] + shifts[None, :keys_per_row]) % num_tokens]
        shape = num_tokens, keys_per_row
        return cls(jnp.sort(indices, axis=1), jnp.zeros(shape, jnp.float32), jnp.ones(shape, bool), num_tokens)

    @classmethod
    def _of_entries(
        cls, rows: np.ndarray, keys: np.ndarray, log_weights: np.ndarray, num_tokens: int, num_keys: int
    ) -> Self:
        """Check entries in any order, and sort them into the padded form."""
        outside = (keys < 0) | (keys >= num_keys)
        if outside.any():
            raise ValueError(f"indices must lie in [0, {num_keys}), got {keys[outside][0]} in {_named(rows[outside])}")
        order = np.lexsort((keys, rows))
        rows, keys, log_weights = rows[order], keys[order], log_weights[order]
        twice = (rows[1:] == rows[:-1]) & (keys[1:] == keys[:-1])
        if twice.any():
            raise ValueError(f"a row must not contain a key twice, got duplicates in {_named(rows[1:][twice])}")
        counts = np.bincount(rows, minlength=num_tokens)
        if (counts == 0).any():
            raise ValueError(f"every row needs at least one key, got none in {_named(np.flatnonzero(counts == 0))}")
        place = rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        shape = num_tokens, int(counts.max())
        indices, padded_weights = np.zeros(shape, np.int32), np.full(shape, -np.inf, log_weights.dtype)
        indices[place], padded_weights[place] = keys, log_weights
        valid = np.arange(shape[1])[None, :] < counts[:, None]
        return cls(jnp.asarray(indices), jnp.asarray(padded_weights), jnp.asarray(valid), int(num_keys))

    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, keys and log-weights of all entries, on the host."""
        valid = np.asarray(self.valid)
        return np.nonzero(valid)[0], np.asarray(self.indices)[valid], np.asarray(self.log_weights)[valid]

    def union(self, other: Self) -> Self:
        """Join the entries of two patterns, with the larger weight where both have one.

        Args:
            other: a pattern with the same numbers of queries and keys.

        Returns:
            The pattern of both.

        Raises:
            ValueError: different numbers of queries or keys.

        Example:
            >>> SparsePattern.banded(4, [0]).union(SparsePattern.strided(4, 3)).indices.tolist()
            [[0, 3], [1, 0], [2, 0], [0, 3]]
        """
        if (other.num_queries, other.num_keys) != (self.num_queries, self.num_keys):
            raise ValueError(
                f"union needs patterns of equal shape, got [{self.num_queries}, {self.num_keys}] and "
                f"[{other.num_queries}, {other.num_keys}]"
            )
        return self._joined(other._entries())

    def with_global(self, tokens: Sequence[int], *, only_columns: bool = False) -> Self:
        """Add global tokens: every query sees them, and they see every key, with weight 1 or their larger weight.

        Args:
            tokens: positions of the global tokens.
            only_columns: leave out their rows, since a full row makes the padded form as large as A.

        Returns:
            The pattern with them.

        Raises:
            ValueError: positions outside the sequence.
            TypeError: positions that are not integers.

        Example:
            >>> SparsePattern.banded(3, [0]).with_global([0]).to_dense().tolist()[1]
            [0.5, 0.5, 0.0]

        Reference:
            :cite:p:`beltagy2020longformer`, section 3.1.
        """
        held = _integers("tokens", tokens)
        limit = self.num_keys if only_columns else min(self.num_keys, self.num_queries)
        if ((held < 0) | (held >= limit)).any():
            raise ValueError(f"global tokens must lie in [0, {limit}), got {held.tolist()}")
        pairs = [np.meshgrid(np.arange(self.num_queries), held)]
        if not only_columns:
            pairs.append(np.meshgrid(held, np.arange(self.num_keys)))
        rows, keys = (np.concatenate([np.ravel(pair[axis]) for pair in pairs]) for axis in range(2))
        return self._joined((rows, keys, np.zeros(len(rows), self.log_weights.dtype)))

    def _joined(self, entries: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Self:
        """The pattern with further entries; of two entries at one place the larger weight is kept."""
        rows, keys, log_weights = (np.concatenate(x) for x in zip(self._entries(), entries, strict=True))
        order = np.lexsort((-log_weights, keys, rows))
        rows, keys, log_weights = rows[order], keys[order], log_weights[order]
        first = np.append(True, (rows[1:] != rows[:-1]) | (keys[1:] != keys[:-1]))
        return self._of_entries(rows[first], keys[first], log_weights[first], self.num_queries, self.num_keys)

    def causal(self) -> Self:
        """Remove the entries above the diagonal.

        Returns:
            The causal pattern.

        Raises:
            ValueError: rows without a remaining key.

        Example:
            >>> SparsePattern.block(4, 2).causal().to_dense().tolist()[0]
            [1.0, 0.0, 0.0, 0.0]
        """
        rows, keys, log_weights = self._entries()
        kept = keys <= rows
        return self._of_entries(rows[kept], keys[kept], log_weights[kept], self.num_queries, self.num_keys)

    def normalized_log_weights(self, dtype: Any = None) -> Float[Array, "T K"]:
        """The logarithms of the entries of A, whose rows sum to 1 ``[T, K]``; ``-inf`` on padding."""
        log_weights = self.log_weights if dtype is None else self.log_weights.astype(dtype)
        return log_weights - jax.nn.logsumexp(log_weights, axis=1, keepdims=True)

    def to_dense(self) -> Float[Array, "T S"]:
        """The matrix A ``[T, S]``, whose rows sum to 1."""
        rows = jnp.arange(self.num_queries, dtype=jnp.int32)[:, None]
        # Added instead of set: padding has index 0 and weight 0, and must not overwrite that key.
        matrix = jnp.zeros((self.num_queries, self.num_keys), self.log_weights.dtype)
        return matrix.at[rows, self.indices].add(jnp.exp(self.normalized_log_weights()))

    def block_mask(self, block_size: int) -> Bool[Array, "Tb Sb"]:
        """The blocks with an entry.

        Args:
            block_size: tokens per block b.

        Returns:
            Booleans ``[ceil(T/b), ceil(S/b)]``.

        Raises:
            ValueError: a size below 1.

        Example:
            >>> SparsePattern.banded(4, [0, 1]).block_mask(2).tolist()
            [[True, True], [False, True]]
        """
        block_size = check_count("block_size", block_size)
        rows = jnp.arange(self.num_queries, dtype=jnp.int32)[:, None] // block_size
        shape = math.ceil(self.num_queries / block_size), math.ceil(self.num_keys / block_size)
        return jnp.zeros(shape, bool).at[rows, self.indices // block_size].max(self.valid)


def check_pattern(pattern: Any) -> None:
    """Raise ``TypeError`` unless given a `SparsePattern`."""
    if not isinstance(pattern, SparsePattern):
        raise TypeError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")


def _ragged(name: str, lists: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows and entries of a sequence of sequences."""
    if len(lists) == 0 or any(np.ndim(row) != 1 for row in lists):
        axes = [np.ndim(row) for row in lists]
        raise ValueError(
            f"{name} must be [T, K] or a sequence per row, got {len(axes)} rows with {sorted(set(axes))} axes"
        )
    counts = [len(row) for row in lists]
    held = [np.asarray(row) for row in lists if len(row)]
    entries = np.concatenate(held) if held else np.zeros(0, int)
    return np.repeat(np.arange(len(counts)), counts), entries


def _integers(name: str, values: Sequence[int]) -> np.ndarray:
    held = np.asarray(list(values))
    if held.size and held.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got dtype {held.dtype}")
    return held.astype(int)


def _check_weights(weights: np.ndarray) -> None:
    if np.isnan(weights).any():
        raise ValueError("weights must not be NaN")
    if (weights < 0).any() or np.isinf(weights).any():
        raise ValueError(f"weights must be finite and not negative, got {weights.min()} to {weights.max()}")


def _log(weights: np.ndarray) -> np.ndarray:
    """Logarithms, in float64 if the weights are and JAX supports it, else in float32."""
    wide = weights.dtype == np.float64 and jax.config.read("jax_enable_x64")
    # Always in float64 on the host, for a single rounding to the final dtype. The logarithm of 0 is -inf.
    with np.errstate(divide="ignore"):
        return np.log(weights.astype(np.float64)).astype(np.float64 if wide else np.float32)


def _named(rows: np.ndarray) -> str:
    named = np.unique(rows)
    more = ", ..." if len(named) > NAMED_ROWS else ""
    return f"row {', '.join(str(row) for row in named[:NAMED_ROWS])}{more}"
