r"""Match3 by one unit of third-order attention with explicit weights.

Tokens are residues modulo M. A token matches if it and some pair of tokens sum to 0 modulo M. With
:math:`\theta = 2 \pi x / M` a trilinear form of sines and cosines is the cosine of the sum of three angles,

.. math:: \cos(\theta_1 + \theta_2 + \theta_3) = c_1 c_2 c_3 - c_1 s_2 s_3 - s_1 c_2 s_3 - s_1 s_2 c_3,

which is 1 for a match and at most :math:`1 - \Delta` otherwise. A null token, whose pair with itself has a logit in
between, takes the weight if there is no match.

The logits of Match3 are too large for the fast method. They reach :math:`\lambda = (2 / \Delta) \ln(4 N^2)`, with
:math:`\Delta = 1 - \cos(2 \pi / M)` for one frequency and about 1 for some :math:`4 \ln M` random ones: at best of
order :math:`\ln N`, in about :math:`\ln N` channels. So entries are of order :math:`(\ln N)^{1/3}`. From this threshold
on no algorithm is faster than cubic by a power of N, unless the strong exponential time hypothesis fails, and the
certificate of `tensor_polynomial` is vacuous. So an exact Match3 head cannot run in near-linear time; use
`tensor_attention`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from approx_attention.core import check_count, in_float32
from approx_attention.tensor import tensor_attention


class Match3(NamedTuple):
    r"""Weights of a unit that decides Match3 with F frequencies: E = 2 F + 2 and D = 4 F + 1.

    Attributes:
        embedding: embeddings of the residues, :math:`(c, s, 1, 0)`, and of the null token, :math:`(0, 0, 0, 1)`, in
            the last row: ``[M + 1, E]``.
        w_q: projection of embeddings to queries, ``[E, D]``, with the scale :math:`\lambda` of the logits.
        w_k1: projection to the first set of keys, ``[E, D]``.
        w_k2: projection to the second set of keys, ``[E, D]``.
        w_v: projection to values of both sets, 1 for a residue and 0 for the null token, ``[E, 1]``.
        threshold: outputs above it are matches.
    """

    embedding: Float[Array, "M+1 E"]
    w_q: Float[Array, "E D"]
    w_k1: Float[Array, "E D"]
    w_k2: Float[Array, "E D"]
    w_v: Float[Array, "E 1"]
    threshold: float = 0.5

    @property
    def null_token(self) -> Float[Array, " E"]:
        """The embedding of the null token, which is appended to the keys."""
        return self.embedding[-1]


def match3_weights(
    modulus: int,
    num_tokens: int,
    *,
    frequencies: Sequence[int] = (1,),
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Match3:
    r"""Make weights with which one unit of third-order attention decides Match3 for up to N tokens.

    .. math:: \Delta = 1 - \max_{r \not\equiv 0} \frac1F \sum_f \cos \frac{2 \pi f r}{M}, \qquad
              \tau = 1 - \frac{\Delta}{2}, \qquad \lambda = \frac{2}{\Delta} \ln(4 N^2).

    The logit of a pair of tokens is :math:`\lambda` for a match and at most :math:`\lambda (1 - \Delta)` otherwise. It
    is :math:`\lambda \tau` for the null pair, and 0 for mixed pairs. So outputs are at least
    :math:`1 / (1 + e^{-\lambda \Delta / 2} + 2 N e^{-\lambda})` with a match, and at most
    :math:`N^2 e^{-\lambda \Delta / 2} = 1/4` without.

    Args:
        modulus: M, at least 5: with fewer residues the logit of the null pair is at most half of that of a match.
        num_tokens: N, the largest number of tokens.
        frequencies: f, integers without a common divisor with M. About :math:`4 \ln M` random ones make
            :math:`\Delta` about 1 and logits small, but need more channels.
        dtype: dtype of the weights. The rounding error of a logit grows with :math:`\lambda`: float32 is enough up to
            about :math:`\lambda = 10^6`.

    Returns:
        The `Match3`.

    Raises:
        ValueError: a modulus below 5, no token, no frequency, frequencies that do not separate all residues from 0.

    Example:
        >>> from approx_attention.realization import match3_weights
        >>> weights = match3_weights(11, 8)
        >>> weights.w_q.shape, round(float(weights.w_q[0, 0]))
        ((4, 5), 70)

    Reference:
        :cite:p:`sanford2023representational`, on Match3 and third-order self-attention; these weights are a
        derivation of this library.
    """
    modulus, num_tokens = check_count("modulus", modulus, 5), check_count("num_tokens", num_tokens)
    factors = np.array([check_count("frequencies", f) for f in frequencies])
    if not factors.size:
        raise ValueError("frequencies must contain at least one integer, got none")
    if math.gcd(modulus, *factors.tolist()) > 1:
        raise ValueError(f"frequencies must have no common divisor with modulus {modulus}, got {tuple(frequencies)}")
    size = factors.size
    # Products modulo M before the angle: integers are exact, and large angles lose digits.
    angles = 2 * np.pi / modulus * (np.arange(modulus)[:, None] * factors % modulus)
    gap = 1 - np.max(np.mean(np.cos(angles[1:]), axis=1))
    largest = 2 / gap * math.log(4 * num_tokens**2)
    embedding = np.zeros((modulus + 1, 2 * size + 2))
    embedding[:-1] = np.concatenate([np.cos(angles), np.sin(angles), np.ones((modulus, 1)), np.zeros((modulus, 1))], 1)
    embedding[-1, -1] = 1
    each, none = np.eye(size), np.zeros((size, size))
    cosine, sine = np.concatenate([each, none]), np.concatenate([none, each])

    def projection(blocks: Sequence[np.ndarray], real: float, null: float) -> Array:
        matrix = np.zeros((2 * size + 2, 4 * size + 1))
        matrix[:-2, :-1] = np.concatenate(blocks, axis=1)
        matrix[-2:, -1] = real, null
        return jnp.asarray(matrix, dtype)

    # Frequencies are averaged. The scale of the logits is in the queries; their last channel, where only the null token
    # has keys, contains the logit of the null pair.
    share = largest / size
    return Match3(
        jnp.asarray(embedding, dtype),
        projection([share * cosine, -share * cosine, -share * sine, -share * sine], largest * (1 - gap / 2), 0),
        projection([cosine, sine, cosine, sine], 0, 1),
        projection([cosine, sine, sine, cosine], 0, 1),
        jnp.asarray(np.eye(2 * size + 2)[:, -2:-1], dtype),
    )


def match3_outputs(x: Int[Array, " N"], weights: Match3) -> Float[Array, " N"]:
    """Compute the output of the unit for each token: near 1 with a match, and at most 1/4 without.

    Args:
        x: residues ``[N]``.
        weights: `match3_weights` for at least N tokens.

    Returns:
        Outputs between 0 and 1, ``[N]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.realization import match3_outputs, match3_weights
        >>> weights = match3_weights(11, 3)
        >>> (match3_outputs(jnp.array([1, 2, 8]), weights) > weights.threshold).tolist()
        [True, True, True]
    """
    modulus = weights.embedding.shape[0] - 1
    x = x if x.dtype.itemsize >= 4 else x.astype(jnp.int32)  # the modulus may not fit in a narrower dtype
    tokens = weights.embedding[x % jnp.asarray(modulus, x.dtype)]
    keys = jnp.concatenate([tokens, weights.null_token[None, :]])
    # The gap of a match is a small part of the logits, which TF32 products of a GPU would lose.
    with in_float32():
        v = keys @ weights.w_v
        k = keys @ weights.w_k1, keys @ weights.w_k2
        return tensor_attention(tokens @ weights.w_q, k, (v, v), scale=1.0)[:, 0]


def match3(x: Int[Array, " N"], modulus: int, *, frequencies: Sequence[int] = (1,)) -> Bool[Array, " N"]:
    r"""Decide for each token whether it and some pair of tokens sum to 0 modulo M; tokens may repeat.

    .. math:: \mathrm{Match3}_i = 1\{\exists j, l : x_i + x_j + x_l \equiv 0 \pmod M\}

    by one unit of third-order attention (`match3_weights`).

    Args:
        x: residues ``[N]``.
        modulus: M, at least 5.
        frequencies: as in `match3_weights`.

    Returns:
        The decisions ``[N]``.

    Raises:
        ValueError: as in `match3_weights`, or tokens that are not a vector.
        TypeError: tokens that are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.realization import match3
        >>> match3(jnp.array([1, 2, 8, 4]), 11).tolist()  # 1 + 2 + 8 = 11
        [True, True, True, False]

    Reference:
        As for `match3_weights`.
    """
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"x must be integers, got {x.dtype}")
    if x.ndim != 1:
        raise ValueError(f"x must be [N], got shape {x.shape}")
    weights = match3_weights(modulus, x.shape[0], frequencies=frequencies)
    return match3_outputs(x, weights) > weights.threshold
