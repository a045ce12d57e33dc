"""Linear attention by a learned feature map."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from approx_attention.core import (
    FeatureMoments,
    Features,
    accumulation_dtype,
    check_counts,
    check_flag,
    running_kernel_moments,
    state_by_summary,
)
from approx_attention.nnx.learned import LearnedAttention


class Hedgehog(LearnedAttention):
    r"""Linear attention with a learned feature map for each key head, in O((T + S) D) time.

    .. math:: \phi(x) = [\mathrm{softmax}(x), \mathrm{softmax}(-x)], \qquad
              \mathrm{out}_t = \frac{\sum_j \phi(A q_t) \cdot \phi(B k_j)\, v_j}{\sum_j \phi(A q_t) \cdot \phi(B k_j)}

    with queries and keys scaled by :math:`D^{-1/4}` and learned A and B ``[D, D]``, initialised to the identity. Fit
    them by `distill_attention`; before, this is a different kernel that does not estimate softmax.

    Args:
        head_dim: the number D of channels of a head.
        num_kv_heads: the number K of key heads.
        is_causal: query t sees keys j <= t.
        block_size: tokens per block of the causal form, which does not change the output.

    Raises:
        ValueError: counts below 1.
        TypeError: ``is_causal`` that is not a bool.

    Example:
        >>> import jax
        >>> from approx_attention.nnx import Hedgehog
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (2, 10, 4, 8)) for i in range(3))
        >>> Hedgehog(8, 4)(q, k, v).shape
        (2, 10, 4, 8)

    Reference:
        :cite:p:`zhang2024hedgehog`.
    """

    def __init__(self, head_dim: int, num_kv_heads: int, *, is_causal: bool = False, block_size: int = 128):
        head_dim, num_kv_heads, block_size = check_counts(
            head_dim=head_dim, num_kv_heads=num_kv_heads, block_size=block_size
        )
        self.options = {"is_causal": check_flag("is_causal", is_causal), "block_size": block_size}
        self.maps = nnx.Param(
            jnp.broadcast_to(jnp.eye(head_dim, dtype=jnp.float32), (num_kv_heads, 2, head_dim, head_dim))
        )

    def _arguments(self) -> dict[str, Any]:
        """The arguments of `approx_attention.attention`."""
        return self._by_head(self.maps[...])

    def _head(self, q: Array, k: Array, v: Array, key: Array | None, kv_mask: Array | None, own: Array | None) -> Array:
        """Linear attention of one head with the maps A and B in ``own [2, D, D]``."""
        assert own is not None
        features = SignedSoftmaxFeatures(q.shape[-1])
        # In half precision a small step of training would not change a map near the identity.
        dtype, wide = v.dtype, accumulation_dtype(q, k, v)
        q, k, v = (x.astype(wide) for x in (q, k, v))
        running = running_kernel_moments(features)
        return state_by_summary(
            q @ own[0].astype(q.dtype).T,
            k @ own[1].astype(k.dtype).T,
            v,
            lambda k, v, kv_mask: FeatureMoments.of_tokens(features, k, v, kv_mask),
            lambda head_dim: running,
            kv_mask=kv_mask,
            scale=None,
            **self.options,
        ).out.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignedSoftmaxFeatures:
    r"""The features :math:`[\mathrm{softmax}(x), \mathrm{softmax}(-x)]`.

    Attributes:
        head_dim: the number D of channels of x.
    """

    head_dim: int = dataclasses.field(metadata={"static": True})

    @property
    def num_features(self) -> int:
        """The number 2 D of features."""
        return 2 * self.head_dim

    def __call__(self, x: Array, /) -> Features:
        """Log-features ``[N, 2 D]`` of rows ``[N, D]``."""
        log_scale = jnp.concatenate([jax.nn.log_softmax(x), jax.nn.log_softmax(-x)], axis=-1)
        return Features(jnp.ones((), x.dtype), log_scale)
