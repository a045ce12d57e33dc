"""A layer of tensor attention."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from approx_attention.core import (
    accumulation_dtype,
    check_counts,
)
from approx_attention.tensor import tensor_attention


class TensorAttention(nnx.Module):
    r"""A layer of tensor attention: projections to one query, m - 1 keys and m - 1 values per head, and back.

    With a learned null token in every set of keys, which means "no such token", the layer contains attention of all
    lower orders. For order 3 and more, the biases of values and the values of null tokens are initialised to 1.

    With ``logit_bound``, queries and keys are divided by their root mean square and logits scaled by
    :math:`\beta / D^{m/2}`, so that no logit exceeds :math:`\beta`. The polynomial method then has a certificate that
    holds throughout training, but typical logits are far below the bound.

    Args:
        model_dim: channels of the input and of the output.
        num_heads: the number N of heads.
        head_dim: the number D of channels of a head.
        order: m, at least 2.
        method: `approx_attention.tensor_attention` or `approx_attention.tensor_polynomial`, or a `functools.partial` of
            them.
        null_token: whether to add null tokens.
        logit_bound: :math:`\beta`, or None for unbounded logits.
        is_causal: ``"both"``, ``"ordered"`` or None, as in `approx_attention.tensor_attention`.
        rngs: streams for the parameters.

    Raises:
        ValueError: a count that is too small, a bound that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from approx_attention.nnx import TensorAttention
        >>> layer = TensorAttention(8, num_heads=2, head_dim=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 5, 8))).shape
        (3, 5, 8)

    Reference:
        :cite:p:`clift2020logic`; :cite:p:`roy2025simplex`, for the biases.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        order: int = 3,
        method: Callable[..., Array] = tensor_attention,
        null_token: bool = True,
        logit_bound: float | None = None,
        is_causal: Literal["both", "ordered"] | None = None,
        rngs: nnx.Rngs,
    ):
        sets = check_counts(2, order=order)[0] - 1
        if logit_bound is not None and not logit_bound > 0:
            raise ValueError(f"logit_bound must be positive, got {logit_bound}")
        self.method, self.logit_bound, self.is_causal = method, logit_bound, is_causal
        model_dim, *shape = check_counts(model_dim=model_dim, num_heads=num_heads, head_dim=head_dim)
        value_bias = nnx.initializers.ones if order > 2 else nnx.initializers.zeros
        self.query = nnx.LinearGeneral(model_dim, shape, rngs=rngs)
        self.keys = nnx.List([nnx.LinearGeneral(model_dim, shape, rngs=rngs) for _ in range(sets)])
        self.values = nnx.List(
            [nnx.LinearGeneral(model_dim, shape, bias_init=value_bias, rngs=rngs) for _ in range(sets)]
        )
        self.null = nnx.data(None)
        if null_token:
            keys = 0.02 * jax.random.normal(rngs.params(), (sets, *shape), jnp.float32)
            values = jnp.full((sets, *shape), float(order > 2), jnp.float32)
            self.null = nnx.data(nnx.Dict(keys=nnx.Param(keys), values=nnx.Param(values)))
        self.out = nnx.LinearGeneral(shape, model_dim, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: Array, *, kv_mask: Array | None = None) -> Array:
        """Self-attention over tuples of tokens.

        Args:
            x: tokens ``[B, T, C]``, C the ``model_dim``.
            kv_mask: true where a token is real ``[B, T]``; by default all are.

        Returns:
            ``[B, T, C]``.
        """
        q = self.query(x)
        keys, values = ([project(x) for project in projections] for projections in (self.keys, self.values))
        mask = jnp.ones(x.shape[:2], bool) if kv_mask is None else kv_mask
        if self.null is not None:
            # It precedes the first token, where causal queries see it; an extra query keeps positions aligned.
            keys, values = (
                [_before(token, y) for token, y in zip(self.null[name][...], ys, strict=True)]
                for name, ys in (("keys", keys), ("values", values))
            )
            mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
            q = jnp.pad(q, ((0, 0), (1, 0), (0, 0), (0, 0)))
        options: dict[str, Any] = {"is_causal": self.is_causal}
        if self.logit_bound is not None:
            q, *keys = (_unit_rms(y) for y in (q, *keys))
            options["scale"] = self.logit_bound / q.shape[-1] ** ((len(keys) + 1) / 2)

        def head(q: Array, keys: tuple[Array, ...], values: tuple[Array, ...], mask: Array) -> Array:
            return self.method(q, keys, values, None, kv_mask=mask, **options)

        over_heads = jax.vmap(head, (1, 1, 1, None), 1)
        out = jax.vmap(over_heads)(q, tuple(keys), tuple(values), mask)
        return self.out(out[:, -x.shape[1] :])


def _before(token: Array, x: Array) -> Array:
    """Prepend a token ``[N, D]`` to the tokens ``[B, T, N, D]`` of every sequence."""
    return jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, *token.shape)), x], axis=1)


def _unit_rms(x: Array) -> Array:
    """Rows divided by their root mean square, computed in float32 or wider; a row of zeros stays zero."""
    wide = x.astype(accumulation_dtype(x))
    square = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.where(square > 0, square, 1))).astype(x.dtype)
