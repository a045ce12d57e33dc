"""Linformer: softmax attention over a few slots, projections of keys and values along the sequence."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from approx_attention import kernels
from approx_attention.core import (
    RealFirst,
    TokenSums,
    averaging_matrix,
    check_choice,
    check_count,
    check_flag,
    check_floating,
    head_inputs,
    in_blocks,
    mask_bias,
    mean,
    real_keys,
    segments_of,
)
from approx_attention.methods.linformer_prefix import Rows, causal_outputs, share


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Convolution:
    r"""A convolution of kernel and stride w, channel by channel: :math:`\sum_i \mathrm{weight}_i \odot x_{cw + i}`.

    Attributes:
        weight: ``[w, D]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import linformer
        >>> from approx_attention.methods import Convolution
        >>> x = jnp.ones((6, 2))
        >>> linformer(x, x, x, projection_k=Convolution(jnp.full((3, 2), 1 / 3))).shape
        (6, 2)

    Reference:
        :cite:p:`wang2020linformer`, section 4.
    """

    weight: Array


Projection = Array | Convolution | Literal["mean", "max"]
_WEIGHT = "the weight of a convolution"


def linformer(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_slots: int = 256,
    projection_k: Projection = "mean",
    projection_v: Projection | None = None,
    renormalize: bool = False,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> Array:
    r"""Softmax attention over R projected keys and values.

    .. math:: \mathrm{out} = \mathrm{softmax}\!\big(s\, q\, (E k)^T\big)\, F v, \qquad E, F \in \mathbb{R}^{R \times S}.

    A model learns E and F and adapts to them. With random E and F this does not approximate softmax attention for any
    R, because the softmax is over mixtures of keys; the theorem of the paper is about `unreduced_jlt`. With
    segment means it is `mean_pool` without counts.

    Segments cover all real keys, also in the causal form, so decoding needs a matrix. Means, maxima and convolutions
    are over the real keys. Column j of a matrix belongs to position j: padding is removed together with its columns, so
    it should be on the right. A slot without a visible key is left out.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_slots: the number R of segments, for ``"mean"`` and ``"max"``; with R >= S the output is exact.
        projection_k: E ``[R, S_max]``, of which the first S columns are used; or ``"mean"`` or ``"max"`` over R
            segments whose lengths differ by at most 1; or a `Convolution`.
        projection_v: F, by default the same as E.
        renormalize: scale each slot by the sum of its row over the sum of the visible part, so that padding, shorter
            inputs and (causally) the future do not change its scale; for rows without negative entries. Means always
            renormalise.
        is_causal: the slots of query t are :math:`\sum_{j \le t} E_{rj} k_j`; only for a matrix or ``"mean"``. Outputs
            of a prefix equal those of the whole sequence only for a matrix.
        block_size: tokens per step of the causal form; the result does not depend on it.

    Raises:
        ValueError: shapes that do not match, more keys than columns, an unknown pooling.
        TypeError: dtypes that are not floating point.
        NotImplementedError: a maximum or convolution that is causal or renormalised.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, linformer
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> projection = jax.random.normal(jax.random.key(3), (16, 64)) / 8
        >>> linformer(q, k, v, projection_k=projection).shape
        (64, 8)
        >>> bool(jnp.allclose(linformer(q, k, v, projection_k=jnp.eye(64)), exact(q, k, v), atol=1e-5))
        True

    Reference:
        :cite:p:`wang2020linformer`, section 4; causal form: :cite:p:`peng2022abc`.
    """
    dtype = v.dtype
    num_slots = check_count("num_slots", num_slots)
    block_size, renormalize = check_count("block_size", block_size), check_flag("renormalize", renormalize)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    if projection_v is None:
        projection_v = projection_k
    if is_causal:
        of_keys = _rows("projection_k", projection_k, k, num_slots, renormalize, kv_mask)
        of_values = _rows("projection_v", projection_v, k, num_slots, renormalize, kv_mask)
        _check_slots(of_keys.matrix, of_values.matrix)
        return causal_outputs(q, k, v, of_keys, of_values, kv_mask, block_size).astype(dtype)
    slots_k, present = projected_slots("projection_k", k, projection_k, num_slots, kv_mask, renormalize)
    slots_v, _ = projected_slots("projection_v", v, projection_v, num_slots, kv_mask, renormalize)
    _check_slots(slots_k, slots_v)
    return kernels.state(q, slots_k, slots_v, mask_bias(present, q.dtype)).out.astype(dtype)


def _columns(name: str, projection: Any, num_keys: int) -> Array:
    check_floating(name, projection)
    if projection.ndim != 2:
        raise ValueError(f"{name} must be [R, S_max], got shape {projection.shape}; use per_head for one per head")
    if projection.shape[1] < num_keys:
        raise ValueError(f"{name} has columns for {projection.shape[1]} keys, got {num_keys}")
    return projection[:, :num_keys]


def projected_slots(
    name: str, x: Array, projection: Projection, num_slots: int, kv_mask: Array | None, renormalize: bool
) -> tuple[Array, Array]:
    """The slots ``[R, D]`` of rows ``x [S, D]`` (zero in padding), and a mask of the slots with a real row."""
    if isinstance(projection, Convolution):
        if renormalize:
            raise NotImplementedError("method 'linformer' does not support renormalize with a convolution")
        return _convolved(name, x, projection, kv_mask)
    if isinstance(projection, str):
        check_choice(name, projection, ("mean", "max"))
        if renormalize and projection == "max":
            raise NotImplementedError("method 'linformer' does not support renormalize with a maximum")
        return _pooled(x, projection, num_slots, kv_mask)
    matrix = _columns(name, projection, x.shape[0]).astype(x.dtype)
    visible = jnp.where(real_keys(kv_mask, x.shape[0])[None, :], matrix, 0)
    slots = visible @ x
    if renormalize:
        slots = slots * share(jnp.sum(projection.astype(x.dtype), axis=1), jnp.sum(visible, axis=1))[:, None]
    return slots, jnp.any(visible != 0, axis=1)


def _convolved(name: str, x: Array, projection: Convolution, kv_mask: Array | None) -> tuple[Array, Array]:
    check_floating(_WEIGHT, projection.weight)
    if projection.weight.ndim != 2:
        raise ValueError(f"{_WEIGHT} must be [w, D], got shape {projection.weight.shape}")
    width, channels = projection.weight.shape
    if channels != x.shape[1]:
        raise ValueError(f"{name} convolves {channels} channels, got {x.shape[1]}")
    real = real_keys(kv_mask, x.shape[0])
    if kv_mask is not None:
        tokens = RealFirst.of(kv_mask)
        x, real = tokens.front(x), tokens.real
    slots = jnp.sum(in_blocks(x, width) * projection.weight.astype(x.dtype)[None], axis=1)
    return slots, jnp.any(in_blocks(real, width), axis=1)


def _pooled(x: Array, kind: str, num_slots: int, kv_mask: Array | None) -> tuple[Array, Array]:
    parts = segments_of(x.shape[0], min(num_slots, x.shape[0]), kv_mask)
    if kind == "mean":
        # Sums and counts of the rows; there are no values here.
        sums = TokenSums.of_tokens(x, x[:, :0], kv_mask).pooled(parts)
        return mean(sums.k, sums.count), sums.count > 0
    present = parts.sums(real_keys(kv_mask, x.shape[0]).astype(jnp.int32)) > 0
    return jnp.where(present[:, None], parts.maxima(x), 0), present


def _check_slots(of_keys: Array, of_values: Array) -> None:
    if of_keys.shape[0] != of_values.shape[0]:
        raise ValueError(
            f"projection_k and projection_v must give the same number of slots, got {of_keys.shape[0]} and "
            f"{of_values.shape[0]}"
        )


def _rows(
    name: str, projection: Projection, k: Array, num_slots: int, renormalize: bool, kv_mask: Array | None
) -> Rows:
    """The matrix of a causal projection."""
    num_keys = k.shape[0]
    if isinstance(projection, Convolution) or (isinstance(projection, str) and projection == "max"):
        raise NotImplementedError(f"method 'linformer' does not support is_causal with {name} {projection!r}")
    if isinstance(projection, str):
        check_choice(name, projection, ("mean", "max"))
        # A causal mean is over the visible part of its segment, so the row is always rescaled.
        projection, renormalize = averaging_matrix(num_keys, num_slots, k.dtype, kv_mask), True
    matrix = _columns(name, projection, num_keys).astype(k.dtype)
    return Rows(matrix, jnp.sum(projection.astype(k.dtype), axis=1) if renormalize else None)
