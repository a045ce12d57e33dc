"""EVA and LARA with learned parameters, and the known variants of EVA."""

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from approx_attention.core import (
    as_pair,
    check_count,
    check_counts,
    paired_means,
)
from approx_attention.methods import OFFICIAL_EVA, chunk_means, eva, lara
from approx_attention.nnx.learned import Adaptor, LearnedAttention


class Eva(LearnedAttention):
    r"""EVA with learned chunk keys and proposals, pooling vectors, or local biases.

    `eva_official`, `eva_official_causal`, `evabyte` and `eva_dropin` make the known variants.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        options: static arguments of `approx_attention.eva`, such as ``window_size``.
        adaptors: learn the chunk keys :math:`\tilde k = A_k(\bar k)` and proposals from :math:`A_q(\bar q) + \tilde k`.
        half: use half of this sum as the proposal, like the authors' bidirectional code.
        pooling_vectors: learn EvaByte's two vectors per key head.
        local_bias: learn a bias of the logits within a window, one per pair of positions, or per offset in an image.
        rngs: streams for adaptors and pooling vectors; not needed without them.

    Raises:
        ValueError: adaptors or pooling vectors without ``rngs``.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import ApproxAttention, Eva
        >>> module = Eva(8, 4, options={"window_size": 16}, adaptors=True, rngs=nnx.Rngs(0))
        >>> layer = nnx.MultiHeadAttention(
        ...     num_heads=4, in_features=32, attention_fn=ApproxAttention(module), decode=False, rngs=nnx.Rngs(1)
        ... )
        >>> layer(jnp.ones((1, 64, 32))).shape
        (1, 64, 32)

    Reference:
        :cite:p:`zheng2023efficient`, section 4; :cite:p:`evabyte2025`, for pooling vectors.
    """

    def __init__(
        self,
        head_dim: int,
        num_kv_heads: int,
        *,
        options: Mapping[str, Any],
        adaptors: bool = False,
        half: bool = False,
        pooling_vectors: bool = False,
        local_bias: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        if rngs is None and (adaptors or pooling_vectors):
            raise ValueError("Eva needs rngs for adaptors and pooling vectors: pass rngs=nnx.Rngs(0); got None")
        head_dim, num_kv_heads = check_counts(head_dim=head_dim, num_kv_heads=num_kv_heads)
        self.options, self.half = dict(options), half
        self.adapt_queries, self.adapt_keys = (
            Adaptor(head_dim, rngs=rngs) if adaptors and rngs is not None else None for _ in range(2)
        )
        drawn = None
        if pooling_vectors and rngs is not None:
            drawn = jnp.clip(jax.random.normal(rngs.params(), (num_kv_heads, 2, head_dim), jnp.float32), -1, 1)
        self.pooling_vectors = None if drawn is None else nnx.Param(drawn * head_dim**-0.5)
        self.bias = nnx.Param(jnp.zeros(self._bias_shape(), jnp.float32)) if local_bias else None

    def _bias_shape(self) -> tuple[int, ...]:
        side, overlap = check_counts(0, window_size=self.options["window_size"], overlap=self.options.get("overlap", 0))
        if self.options.get("spatial_shape") is not None:
            return (2 * side - 1, 2 * side - 1)
        return (side, side + overlap * (1 if self.options.get("is_causal") else 2))

    def local_bias(self) -> Array | None:
        """The learned bias ``[window, keys]`` of the logits within a window."""
        if self.bias is None or self.options.get("spatial_shape") is None:
            return None if self.bias is None else self.bias[...]
        side = np.arange(int(self.options["window_size"]))
        offset = side[:, None] - side[None, :] + len(side) - 1
        rows, columns = np.broadcast_arrays(offset[:, None, :, None], offset[None, :, None, :])
        return self.bias[...][rows, columns].reshape(len(side) ** 2, len(side) ** 2)

    def _arguments(self) -> dict[str, Any]:
        """The arguments of `approx_attention.attention`."""
        return self._by_head(None if self.pooling_vectors is None else self.pooling_vectors[...])

    def _head(self, q: Array, k: Array, v: Array, key: Array | None, kv_mask: Array | None, own: Array | None) -> Array:
        """EVA of one head, with learned arrays computed from its means of queries and keys."""
        layout = {
            name: self.options[name]
            for name in (
                "window_size", "chunk_size", "num_chunks", "is_causal", "exclude_local", "overlap", "spatial_shape",
            )
            if name in self.options
        }  # fmt: skip
        root, bias = math.sqrt(1 / math.sqrt(q.shape[-1])), self.local_bias()
        learned: dict[str, Any] = {} if bias is None else {"local_bias": bias}
        if own is not None:
            learned["pooling_vectors"] = (own[0] / root, own[1] * root)
        if self.adapt_queries is not None and self.adapt_keys is not None:
            q_mean, k_mean = chunk_means(q, k, kv_mask=kv_mask, **layout)
            chunk_keys = self.adapt_keys(k_mean)
            learned["chunk_keys"] = root * chunk_keys
            learned["proposal_mean"] = root * (self.adapt_queries(q_mean) + chunk_keys) * (0.5 if self.half else 1)
        return cast(Array, eva(q, k, v, key, kv_mask=kv_mask, **self.options, **learned))


def eva_official(
    head_dim: int,
    num_kv_heads: int,
    *,
    window_size: int,
    num_chunks: int,
    overlap: bool = False,
    spatial_shape: tuple[int, int] | None = None,
    local_bias: bool = False,
    rngs: nnx.Rngs,
) -> Eva:
    """Make EVA as in the authors' bidirectional code: every token in a chunk, no counts, half proposals.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        window_size: queries per window; of an image, its side.
        num_chunks: the requested number of chunks.
        overlap: extend windows and chunks by half a window on each side.
        spatial_shape: height and width of an image.
        local_bias: learn a bias within windows.
        rngs: streams for the parameters.

    Returns:
        The `Eva` module, with adaptors.

    Raises:
        ValueError: ``head_dim``, ``num_kv_heads`` or ``num_chunks`` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import eva_official
        >>> module = eva_official(8, 2, window_size=4, num_chunks=2, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((1, 16, 2, 8))
        >>> module(x, x, x).shape
        (1, 16, 2, 8)

    Reference:
        :cite:p:`zheng2023efficient`, section 4.
    """
    num_chunks = check_count("num_chunks", num_chunks)
    size: dict[str, Any] = {"num_chunks": num_chunks}
    if spatial_shape is not None:  # square chunks, about as many as requested
        size = {"chunk_size": max(1, math.isqrt(math.prod(as_pair("spatial_shape", spatial_shape)) // num_chunks))}
    options = {
        "window_size": window_size,
        **size,
        "overlap": max(1, window_size // 2) if overlap else 0,
        "spatial_shape": spatial_shape,
        **OFFICIAL_EVA,
    }
    return Eva(head_dim, num_kv_heads, options=options, adaptors=True, half=True, local_bias=local_bias, rngs=rngs)


def eva_official_causal(
    head_dim: int,
    num_kv_heads: int,
    *,
    window_size: int,
    chunk_size: int,
    overlap: bool = False,
    local_bias: bool = False,
    rngs: nnx.Rngs,
) -> Eva:
    """Make EVA as in the authors' causal code: a query sees its window so far and every chunk before its own.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        window_size: queries per window.
        chunk_size: keys per chunk.
        overlap: whether a window sees the window before.
        local_bias: learn a bias within windows.
        rngs: streams for the parameters.

    Returns:
        The causal `Eva` module, with adaptors.

    Raises:
        ValueError: ``head_dim`` or ``num_kv_heads`` below 1.

    Reference:
        :cite:p:`zheng2023efficient`, section 4.
    """
    options = {
        "window_size": window_size,
        "chunk_size": chunk_size,
        "overlap": window_size if overlap else 0,
        "is_causal": True,
        **OFFICIAL_EVA,
    }
    return Eva(head_dim, num_kv_heads, options=options, adaptors=True, local_bias=local_bias, rngs=rngs)


def evabyte(head_dim: int, num_kv_heads: int, *, window_size: int, chunk_size: int, rngs: nnx.Rngs) -> Eva:
    """Make EvaByte: chunks pooled by two learned vectors, causal and streamable.

    A query also sees the window before its own exactly, as in every causal form of this library.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        window_size: tokens per window.
        chunk_size: tokens per chunk.
        rngs: streams for the parameters.

    Returns:
        The causal `Eva` module, with two pooling vectors per key head, ``[K, 2, D]``.

    Raises:
        ValueError: ``head_dim`` or ``num_kv_heads`` below 1.

    Reference:
        :cite:p:`evabyte2025`.
    """
    options = {"window_size": window_size, "chunk_size": chunk_size, "is_causal": True, "count_correction": False}
    return Eva(head_dim, num_kv_heads, options=options, pooling_vectors=True, rngs=rngs)


def eva_dropin(head_dim: int, num_kv_heads: int, **options: Any) -> Eva:
    """Make EVA without learned parameters, to replace the attention of a trained model.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        **options: arguments of `approx_attention.eva`.

    Returns:
        The `Eva` module, without parameters.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from approx_attention.nnx import eva_dropin
        >>> module = eva_dropin(8, 2, window_size=4, num_chunks=2)
        >>> jax.tree.leaves(nnx.state(module, nnx.Param)), module.options["num_chunks"]
        ([], 2)

    Reference:
        :cite:p:`zheng2023efficient`, section 4.
    """
    return Eva(head_dim, num_kv_heads, options=options)


class Lara(LearnedAttention):
    r"""LARA with learned proposals :math:`\mu = A_q(\bar q) + A_k(\bar k)`.

    Args:
        head_dim: the number D of channels of a head.
        num_landmarks: the number C of proposals.
        spatial_shape: height and width of an image, as in `approx_attention.lara`.
        options: further static arguments of `approx_attention.lara`.
        rngs: streams for the parameters.

    Raises:
        ValueError: counts below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import Lara
        >>> x = jnp.ones((1, 16, 2, 8))
        >>> Lara(8, num_landmarks=4, rngs=nnx.Rngs(0))(x, x, x).shape
        (1, 16, 2, 8)

    Reference:
        :cite:p:`zheng2022linear`, section 4.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        num_landmarks: int = 49,
        spatial_shape: tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        head_dim, self.num_landmarks = check_counts(head_dim=head_dim, num_landmarks=num_landmarks)
        self.spatial_shape, self.options = spatial_shape, dict(options or {})
        self.adapt_queries, self.adapt_keys = (Adaptor(head_dim, rngs=rngs) for _ in range(2))

    def _arguments(self) -> dict[str, Any]:
        """The arguments of `approx_attention.attention`."""
        return self._by_head()

    def _head(self, q: Array, k: Array, v: Array, key: Array | None, kv_mask: Array | None, own: Array | None) -> Array:
        """LARA of one head, with proposals computed from its means of queries and keys."""
        root = math.sqrt(1 / math.sqrt(q.shape[-1]))
        count = min(self.num_landmarks, q.shape[0], k.shape[0])
        q_mask = kv_mask if q.shape[0] == k.shape[0] else None
        q_mean, k_mean, _present = paired_means(q, k, count, q_mask, kv_mask, self.spatial_shape)
        q_bar = self.adapt_queries(q_mean)
        mu = q_bar + self.adapt_keys(k_mean)
        learned = {"proposal_mean": root * mu, "query_landmarks": root * q_bar}
        return cast(Array, lara(q, k, v, key, kv_mask=kv_mask, **learned, **self.options))
