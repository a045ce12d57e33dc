r"""The low-rank bottleneck: the attention weights that a head with D channels can express.

Logits :math:`q k^T` have rank at most D, and softmax is invariant to a constant added to a row. So D channels can
express a positive row-stochastic P if and only if the rank of :math:`\log P\,(I - \tfrac1S 1 1^T)` is at most D. Causal
heads may need fewer, because their hidden logits are free. This is about the rank of logits; the rank of P itself,
which matters for `linformer` and `svd`, may be full.
"""

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention.core import accumulation_dtype, check_count, check_floating


def needed_head_dim(weights: Float[Array, "T S"], *, tolerance: float = 1e-5) -> Array:
    r"""Compute the smallest number of channels with which a head can express given attention weights.

    Args:
        weights: positive weights ``[T, S]`` with rows that sum to 1.
        tolerance: singular values of the centred logarithms below this, or below this share of the largest, are
            treated as 0.

    Returns:
        The rank, int32, at most ``min(T, S - 1)``; 0 for uniform weights, -1 if a weight is not positive, which is
        impossible for softmax.

    Example:
        >>> import jax
        >>> from approx_attention.realization import needed_head_dim
        >>> q, k = (jax.random.normal(jax.random.key(i), (16, 3)) for i in range(2))
        >>> int(needed_head_dim(jax.nn.softmax(q @ k.T)))
        3

    Reference:
        Sharper than :cite:p:`bhojanapalli2020bottleneck`, theorem 1.
    """
    sizes = jnp.linalg.svd(_centred_logits(weights), compute_uv=False)
    # Relative to the largest, but to at least 1: with logits below the tolerance weights are equal up to rounding.
    rank = jnp.sum(sizes > tolerance * jnp.maximum(sizes[0], 1), dtype=jnp.int32)
    return jnp.where(jnp.all(weights > 0), rank, -1)


def realize_attention(
    weights: Float[Array, "T S"], head_dim: int | None = None
) -> tuple[Float[Array, "T D"], Float[Array, "S D"]]:
    r"""Make queries and keys of a head with given softmax attention weights.

    With :math:`\log P\,(I - \tfrac1S 1 1^T) = U \Sigma V^T`,

    .. math:: q = D^{1/4}\, U \Sigma^{1/2}, \qquad k = D^{1/4}\, V \Sigma^{1/2}, \qquad
              \mathrm{softmax}(q k^T / \sqrt D) = P.

    Args:
        weights: positive, with rows that sum to 1 ``[T, S]``.
        head_dim: the number D of channels; by default ``min(T, S - 1)``, which always suffices. With fewer than
            `needed_head_dim` the logits are the nearest of rank D in the Frobenius norm.

    Returns:
        Queries ``[T, D]`` and keys ``[S, D]`` for the default scale; NaN if a weight is not positive.

    Raises:
        ValueError: ``head_dim`` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact
        >>> from approx_attention.realization import realize_attention
        >>> weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (8, 8)))
        >>> q, k = realize_attention(weights)
        >>> q.shape, bool(jnp.allclose(exact(q, k, jnp.eye(8)), weights, atol=1e-5))
        ((8, 7), True)

    Reference:
        :cite:p:`bhojanapalli2020bottleneck`, theorem 1, with S - 1 channels instead of S.
    """
    num_queries, num_keys = weights.shape
    if head_dim is None:
        head_dim = max(1, min(num_queries, num_keys - 1))
    head_dim = check_count("head_dim", head_dim)
    q, k = nearest_factors(_centred_logits(weights), head_dim)
    # D^(1/4) in each cancels the default scale 1 / sqrt(D).
    root = math.sqrt(math.sqrt(head_dim))
    return root * q, root * k


def nearest_factors(logits: Float[Array, "T S"], head_dim: int) -> tuple[Float[Array, "T D"], Float[Array, "S D"]]:
    r"""Factorise the matrix of rank D that is nearest to given logits in the Frobenius norm.

    .. math:: \min_{q, k} \|q k^T - x\|_F

    Args:
        logits: x ``[T, S]``.
        head_dim: the rank D.

    Returns:
        q ``[T, D]`` and k ``[S, D]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.realization import nearest_factors
        >>> logits = jnp.outer(jnp.arange(3.0), jnp.arange(4.0))
        >>> q, k = nearest_factors(logits, 1)
        >>> bool(jnp.allclose(q @ k.T, logits, atol=1e-5))
        True
    """
    left, sizes, right = jnp.linalg.svd(logits, full_matrices=False)
    rank = min(head_dim, sizes.shape[0])
    # The spectrum is split equally, so that neither queries nor keys are large.
    root = jnp.sqrt(sizes[:rank])[None, :]
    unused = ((0, 0), (0, head_dim - rank))
    return jnp.pad(root * left[:, :rank], unused), jnp.pad(root * right[:rank].T, unused)


def _centred_logits(weights: Array) -> Array:
    """Logarithms of attention weights minus their mean in each row."""
    check_floating("weights", weights)
    if weights.ndim != 2:
        raise ValueError(f"weights must be [T, S], got shape {weights.shape}")
    return row_centred(jnp.log(weights.astype(accumulation_dtype(weights))))


def row_centred(logits: Float[Array, "T S"]) -> Float[Array, "T S"]:
    """Subtract the mean of each row of logits, to which softmax is invariant.

    Args:
        logits: ``[T, S]``.

    Returns:
        Logits ``[T, S]`` with row means 0, in the same dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.realization import row_centred
        >>> row_centred(jnp.array([[1.0, 3.0]])).tolist()
        [[-1.0, 1.0]]
    """
    return logits - jnp.mean(logits, axis=1, keepdims=True)
