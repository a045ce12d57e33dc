"""Exact attention states of one head, with the softmax kernel and with other kernels.

Logits are plain dot products here: the scale is already folded into ``q`` and ``k``. A bias is added to the logits; the
bias `HIDDEN` hides a key with any logit.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from approx_attention import kernels
from approx_attention.core.features import FeatureMap
from approx_attention.kernels import HIDDEN, AttentionState, accumulation_dtype, dense_state, finite_peak, normalise

Keys = tuple[Array, Array, Array]


def joined_state(
    q: Array, far: Keys, near: Keys, *, last: int | None = None, logits_soft_cap: float | None = None
) -> AttentionState:
    """Attention over two sets of keys, values and biases as one set, by one kernel without a merge.

    Args:
        q: queries ``[T, D]`` in scaled space.
        far: keys ``[F, D]``, values ``[F, Dv]`` and biases ``[F]`` that every query sees.
        near: the same for S nearby tokens.
        last: query t sees nearby keys up to index ``last + t``; all if None.
        logits_soft_cap: as in `kernels.state`.

    Returns:
        The `AttentionState` of the queries.
    """
    k, v, key_bias = (jnp.concatenate(x) for x in zip(far, near, strict=True))
    if last is None:
        return kernels.state(q, k, v, key_bias, logits_soft_cap=logits_soft_cap)
    offset = far[0].shape[0] + last
    return kernels.state(q, k, v, key_bias, offset=offset, right=0, logits_soft_cap=logits_soft_cap)


@dataclasses.dataclass(frozen=True)
class SoftmaxNear:
    """Softmax attention to nearby tokens.

    Attributes:
        scale: factor of the logits; 1 for tokens in scaled space.
        logits_soft_cap: cap of the logits as in `kernels.state`; it also applies to tokens of the summary.
    """

    scale: float | Array = 1.0
    logits_soft_cap: float | None = None

    def __call__(self, q: Array, k: Array, v: Array, bias: Array) -> AttentionState:
        """The state of queries over all keys.

        Args:
            q: queries ``[T, D]``.
            k: keys ``[S, D]``.
            v: values ``[S, Dv]``.
            bias: bias of the logits ``[1 or T, S]``, ``HIDDEN`` for hidden keys.

        Returns:
            The `AttentionState` in the accumulation dtype.
        """
        dtype = accumulation_dtype(q, k, v)
        root = jnp.sqrt(jnp.asarray(self.scale, dtype))
        tensors = q.astype(dtype) * root, k.astype(dtype) * root, v.astype(dtype), bias.astype(dtype)
        return dense_state(*tensors, self.logits_soft_cap)

    def causal(self, q: Array, k: Array, v: Array, key_bias: Array) -> AttentionState:
        """The causal state of queries that are the last T of S tokens.

        Args:
            q: queries ``[T, D]``; query t sees keys j <= t + S - T.
            k: keys ``[S, D]``.
            v: values ``[S, Dv]``.
            key_bias: bias of the logits of each key ``[S]``.

        Returns:
            The `AttentionState` of the queries.
        """
        options: Any = {"scale": self.scale, "logits_soft_cap": self.logits_soft_cap}
        return kernels.state(q, k, v, key_bias, offset=k.shape[0] - q.shape[0], right=0, **options)


def kernel_state(features: FeatureMap, q: Array, k: Array, v: Array, bias: Array) -> AttentionState:
    r"""Attention with the kernel of a feature map over all pairs of queries and keys, in T S products of features.

    .. math:: \mathrm{out}_t = \sum_j \phi(q_t) \cdot \phi(k_j)\, v_j \Big/ \sum_j \phi(q_t) \cdot \phi(k_j)

    Args:
        features: a non-negative feature map :math:`\phi`.
        q: queries ``[T, D]``, rows of the feature map.
        k: keys ``[S, D]``, rows of the feature map.
        v: values ``[S, Dv]``.
        bias: ``[1 or T, S]``; it only hides keys, where it is ``HIDDEN``.

    Returns:
        The `AttentionState` with the log-normalisers of this kernel. A query without a positive weight gives 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.core import ReLUFeatures
        >>> q, k = jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0], [6.0, 1.0]])
        >>> kernel_state(ReLUFeatures(jnp.eye(2), offset=0.0), q, k, jnp.eye(2), jnp.zeros((1, 2))).out.tolist()
        [[0.25, 0.75]]
    """
    (phi_q, log_scale_q), (phi_k, log_scale_k) = features(q), features(k)
    # Hidden keys do not take part: theirs may be larger by so much that all others vanish, or NaN.
    seen = jnp.any(bias > HIDDEN / 2, axis=0)
    log_scale_k = jnp.where(seen[:, None], log_scale_k, -jnp.inf)
    peak_q, peak_k = (finite_peak(jnp.max(x, axis=-1)) for x in (log_scale_q, log_scale_k))
    # A maximum per query cancels in its normaliser; keys share one, so that their weights stay comparable. NaN shows in
    # the weight of that key alone.
    peak = finite_peak(jnp.max(peak_k, where=~jnp.isnan(peak_k), initial=-jnp.inf))
    phi_q = phi_q * jnp.exp(log_scale_q - peak_q[:, None])
    phi_k = phi_k * jnp.exp(log_scale_k - peak)
    # Compared with half of HIDDEN, because sums of biases may move it; no other bias is near.
    weights = jnp.where(bias <= HIDDEN / 2, 0, phi_q @ phi_k.T)
    return normalise(weights @ v, jnp.sum(weights, axis=-1), peak_q + peak)
