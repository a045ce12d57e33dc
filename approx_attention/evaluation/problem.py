"""The attention to approximate: tensors, and the arguments common to all methods."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from approx_attention.evaluation.files import Tensors
from approx_attention.evaluation.real_tokens import key_mask, query_mask


class Problem(NamedTuple):
    """The attention to approximate.

    Attributes:
        tensors: query, key and value.
        is_causal: whether query t sees keys j <= t only.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        kv_mask: mask of real keys ``[B, S]``, if some are padding.
    """

    tensors: Tensors
    is_causal: bool = False
    scale: float | None = None
    kv_mask: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        tensors: Tensors,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        lengths: Any = None,
        mask: Any = None,
    ) -> "Problem":
        """Make a problem from tensors with padding, which is set to zero.

        Args:
            tensors: query, key and value.
            is_causal: whether query t sees keys j <= t only.
            scale: factor of the logits, ``1/sqrt(D)`` by default.
            lengths: real tokens of each sequence, integers ``[B]``.
            mask: true where a key is real, ``[B, S]``, in place of ``lengths`` or with them.

        Returns:
            The `Problem`.

        Raises:
            InputError: lengths or mask do not match the tensors.
        """
        kv_mask = key_mask(tensors.key.shape, lengths=lengths, mask=mask)
        real = (query_mask(kv_mask, tensors.query.shape[1]), kv_mask, kv_mask)
        # In a file padding may contain any values, and 0 times infinity is NaN.
        cleaned = (
            x if rows is None else jnp.where(rows[:, :, None, None], x, jnp.zeros_like(x))
            for x, rows in zip(tensors, real, strict=True)
        )
        return cls(Tensors(*cleaned), is_causal, scale, kv_mask)

    @property
    def mask(self) -> jnp.ndarray | None:
        """The mask of `attention` that hides the padding, ``[B, 1, 1, S]``."""
        return None if self.kv_mask is None else jnp.asarray(self.kv_mask[:, None, None, :])
