"""Nystrom attention: the attention matrix from its rows and columns at landmarks."""

from typing import Literal

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import Array
from jaxtyping import Bool, Float

from approx_attention import kernels
from approx_attention.core import (
    check_choice,
    check_count,
    check_number,
    check_positive,
    head_inputs,
    in_float32,
    mask_bias,
    paired_means,
    query_mask,
)


def nystrom(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_landmarks: int = 64,
    inverse: Literal["iterations", "ridge", "svd"] = "iterations",
    num_iterations: int = 6,
    ridge: float | Array = 1e-4,
    rcond: float | Array = 1e-2,
    kv_mask: Bool[Array, " S"] | None = None,
    q_mask: Bool[Array, " T"] | None = None,
    scale: float | Array | None = None,
) -> Float[Array, "T Dv"]:
    r"""Nystrom attention: three softmax kernels between tokens and the means of M segments of queries and of keys.

    With segment means :math:`\tilde q, \tilde k` ``[M, D]`` over real tokens and logits scaled by s,

    .. math:: \mathrm{out} = \tilde F\, \tilde A^+\, (\tilde B v), \quad
              \tilde F = \mathrm{softmax}(q \tilde k^T), \quad
              \tilde A = \mathrm{softmax}(\tilde q \tilde k^T), \quad
              \tilde B = \mathrm{softmax}(\tilde q k^T).

    With the true pseudo-inverse the output is exact if every token is a landmark (M = T = S), and the weights of a
    query sum to 1 where :math:`\tilde A` is regular. But it amplifies the components of small singular values: with few
    landmarks its error is often many times that of an inverse that cuts them. Weights may be negative with every
    inverse. There is no causal form: every query landmark reads all keys.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_landmarks: the number M of segments, whose sizes differ by at most 1; at most the number of real queries and
            of real keys.
        inverse: how each matrix :math:`\tilde A` is inverted:

            - ``"iterations"``: the published third-order iteration. A few steps cut small singular values softly: after
              6 steps a singular value near :math:`0.025\, \|\tilde A\|_1^{1/2}` is half inverted, one four times as
              large almost fully. More steps are not better, and many steps diverge where :math:`\tilde A` is singular
              to working precision.
            - ``"ridge"``: :math:`(\tilde A^T \tilde A + \gamma I)^{-1} \tilde A^T`.
            - ``"svd"``: singular values below ``rcond`` times the largest are set to 0. The derivative treats the rank
              as fixed and ignores the cut part; it is exact if the cut values are 0.
        num_iterations: steps of the iteration.
        ridge: :math:`\gamma`, in units of squared singular values; the largest of :math:`\tilde A` is from 1 to
            :math:`\sqrt M`.
        rcond: the relative cut of ``"svd"``.

    Raises:
        ValueError: shapes that do not match, counts below 1, an unknown inverse, a ridge or cut that is not positive.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, nystrom
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> out = nystrom(q, k, v, inverse="svd", rcond=1e-6)
        >>> bool(jnp.allclose(out, exact(q, k, v), atol=1e-4))
        True

    Reference:
        :cite:p:`xiong2021nystromformer`, section 3, without its convolution of the values, which belongs in a layer.
    """
    dtype, num_queries, num_keys = v.dtype, q.shape[0], k.shape[0]
    check_choice("inverse", inverse, ("iterations", "ridge", "svd"))
    num_iterations = check_count("num_iterations", num_iterations)
    for name, number in (("ridge", ridge), ("rcond", rcond)):
        check_number(name, number)
        check_positive(name, number)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    num_landmarks = min(check_count("num_landmarks", num_landmarks), num_queries, num_keys)
    q_bar, k_bar, present = paired_means(q, k, num_landmarks, query_mask(q_mask, kv_mask, num_queries), kv_mask)
    key_bias = None if kv_mask is None else mask_bias(kv_mask, q.dtype)
    landmark_bias = None if present is None else mask_bias(present, q.dtype)

    averages = kernels.state(q_bar, k, v, key_bias).out
    # An inverse amplifies rounding by the condition number, so products of M x M matrices use full precision.
    with in_float32():
        # An absent landmark is a row or column of zeros; it becomes a column or row of zeros in every inverse.
        both = None if present is None else present[:, None] & present[None, :]
        a = jax.nn.softmax(q_bar @ k_bar.T, where=both)
        if inverse == "iterations":
            z = _iterated_inverse(a, num_iterations)
        elif inverse == "ridge":
            z = solve_positive(a.T @ a + ridge * jnp.eye(num_landmarks, dtype=a.dtype), a.T)
        else:
            z = jnp.linalg.pinv(a, rtol=rcond)
        values = z @ averages
    return kernels.state(q, k_bar, values, landmark_bias).out.astype(dtype)


def _iterated_inverse(a: Array, num_iterations: int) -> Array:
    """The pseudo-inverse of one matrix by the third-order iteration of section 3."""
    # From this start every singular value of A Z is in (0, 1], where the iteration converges. The norms are those of
    # each matrix; the authors' code takes the largest of a batch, which couples its members.
    norms = jnp.max(jnp.sum(jnp.abs(a), axis=0)) * jnp.max(jnp.sum(jnp.abs(a), axis=1))
    z = a.T / jnp.where(norms == 0, 1, norms)
    identity = jnp.eye(a.shape[0], dtype=a.dtype)
    for _ in range(num_iterations):
        az = a @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z


def solve_positive(matrix: Array, rhs: Array) -> Array:
    """The solution of a system with a positive definite matrix."""
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), rhs)
