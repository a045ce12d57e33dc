r"""Exact tensor attention of any order: attention over pairs, triples and so on of keys.

The logit of a pair is :math:`\sum_t q_t k^1_t k^2_t = (q \odot k^1) \cdot k^2`: given the first key, ordinary attention
with the query :math:`q \odot k^1` over the second keys. So attention of order m is attention over the first keys, whose
logits are the log-normalisers of order m - 1 and whose values are multiplied by the outputs of order m - 1. It consists
of matrix products only.
"""

import math
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from approx_attention.core import AttentionState, check_floating, finite_peak, output_or_state
from approx_attention.tensor.inputs import check_causal, scaled, sets, tensor_inputs, tensor_state

Causal = Literal["both", "ordered"]


@output_or_state
def tensor_attention(
    q: Float[Array, "T D"],
    k: Any,
    v: Any,
    key: Array | None = None,
    *,
    is_causal: Causal | None = None,
    window: int | tuple[int, ...] | None = None,
    kv_mask: Any = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Exact attention over all tuples of m - 1 keys, whose values are multiplied channel by channel.

    .. math:: \mathrm{out}_i = \frac{\sum_{j, l} e^{x_{ijl}}\, v^1_j \odot v^2_l}{\sum_{j, l} e^{x_{ijl}}}, \qquad
              x_{ijl} = s \sum_t q_{it}\, k^1_{jt}\, k^2_{lt}

    for order 3. It takes :math:`2 T S^{m-1} (D + D_v)` operations, and memory linear in T and S, also for gradients.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[m-1, S, D]``, or a tuple of m - 1 arrays ``[S_a, D]``; one array ``[S, D]`` is ordinary attention.
        v: values ``[m-1, S, Dv]``, or a tuple.
        key: ignored; exact attention is deterministic.
        is_causal: ``"both"``: query i sees keys at positions up to i in every set; ``"ordered"``: positions also do
            not increase from set to set (l <= j <= i). Aligned top left if T != S.
        window: the number of visible positions, the query's own and those before it, for all sets or for each.
        kv_mask: true where a key is real: ``[S]``, ``[m-1, S]`` or a tuple. A query that sees no tuple gives 0.
        scale: factor of the logits, of any sign; ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, with the normaliser over tuples, in the accumulation dtype.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of the values, or the state.

    Raises:
        ValueError: shapes that do not match, an unknown ``is_causal``, a window without ``is_causal``.
        TypeError: dtypes that are not floating point (or boolean, for masks).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import tensor_attention
        >>> q, k, l, v, w = (jax.random.normal(jax.random.key(i), (5, 4)) for i in range(5))
        >>> logits = jnp.einsum("id,jd,ld->ijl", q, k, l) / 2
        >>> weights = jax.nn.softmax(logits.reshape(5, 25)).reshape(5, 5, 5)
        >>> expected = jnp.einsum("ijl,jc,lc->ic", weights, v, w)
        >>> bool(jnp.allclose(jax.jit(tensor_attention)(q, (k, l), (v, w)), expected, atol=1e-6))
        True

    Reference:
        :cite:p:`alman2024capture`, definition of tensor attention; :cite:p:`roy2025simplex`, for windows.
    """
    inputs = tensor_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    widths = check_causal(is_causal, window, len(inputs.keys))
    state = tensor_state(inputs, is_causal, widths)
    return state


def determinant_attention(
    q: Float[Array, "T D"],
    k: Any,
    v: Any,
    key: Array | None = None,
    *,
    scale: float | Array | None = None,
    **options: Any,
) -> Any:
    r"""Third-order attention whose logits are signed volumes, invariant under rotations of three channels.

    .. math:: x_{ijl} = s \sum_g \det\big[\, q_{ig},\ k^1_{jg},\ k^2_{lg} \,\big]

    over groups g of three channels: a rotation of all three tokens by one angle cancels. Each determinant is a sum of
    two trilinear forms, so this is `tensor_attention` with twice the channels (``determinant_channels``).

    Args:
        q: queries ``[T, D]``, D a multiple of 3.
        k: keys ``[2, S, D]``, or a tuple of two arrays.
        v: values ``[2, S, Dv]``, likewise.
        key: ignored.
        scale: factor of the logits, of any sign; ``1/sqrt(D)`` by default.
        options: other arguments of `tensor_attention`.

    Returns:
        As `tensor_attention`.

    Raises:
        ValueError: the order is not 3, or the number of channels is not a multiple of 3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import determinant_attention
        >>> x = jnp.ones((4, 3))  # three equal vectors have volume 0, so all weights are equal
        >>> v = jnp.arange(4.0)[:, None]
        >>> jax.jit(determinant_attention)(x, (x, x), (v, v))[0].tolist()
        [2.25]

    Reference:
        :cite:p:`roy2025simplex`, section on rotation invariant trilinear forms.
    """
    # The default scale is that of the D given channels, not of the 2 D computed ones.
    channels = determinant_channels(q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return tensor_attention(*channels, v, key, scale=scale, **options)


def determinant_channels(q: Array, k: Any) -> tuple[Array, tuple[Array, Array]]:
    r"""Make queries and keys ``[., 2 D]`` whose trilinear form is the sum of determinants of groups of three channels.

    .. math:: \det[a, b, c] = \sum_t a_t b_{t+1} c_{t+2} - \sum_t a_t b_{t+2} c_{t+1}, \quad t \bmod 3.

    Args:
        q: queries ``[T, D]``.
        k: two sets of keys ``[S, D]``.

    Returns:
        Queries ``[T, 2 D]`` and two sets of keys ``[S, 2 D]``, for any tensor attention.

    Raises:
        ValueError: there are not two sets of keys, or the number of channels is not a multiple of 3.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.tensor.exact import determinant_channels
        >>> q, (k, l) = determinant_channels(jnp.eye(3)[:1], (jnp.eye(3)[1:2], jnp.eye(3)[2:]))
        >>> float(jnp.sum(q * k * l))  # the volume of the unit cube
        1.0

    Reference:
        As `determinant_attention`.
    """
    check_floating("q", q)
    k = sets("k", k)
    if len(k) != 2 or q.shape[-1] % 3:
        raise ValueError(f"determinants need two sets of keys and 3 n channels, got {len(k)} and {q.shape[-1]}")

    def rolled(x: Array, by: int) -> Array:
        return jnp.roll(x.reshape(x.shape[0], -1, 3), -by, axis=-1).reshape(x.shape)

    first = jnp.concatenate([rolled(k[0], 1), rolled(k[0], 2)], axis=-1)
    second = jnp.concatenate([rolled(k[1], 2), rolled(k[1], 1)], axis=-1)
    return jnp.concatenate([q, -q], axis=-1), (first, second)


def strassen_attention(
    f: Float[Array, "T D"],
    k: Any,
    v: Any,
    key: Array | None = None,
    *,
    kv_mask: Any = None,
    scale: float | Array | None = None,
) -> Array:
    r"""Third-order attention whose logits are sums over the three pairs, by matrix products only.

    .. math:: x_{ijl} = s\, (f_i \cdot g_j + g_j \cdot h_l + h_l \cdot f_i), \quad
              X = e^{s f g^T},\ Y = e^{s g h^T},\ Z = e^{s f h^T}, \quad
              \mathrm{den} = ((X Y) \odot Z)\, 1, \quad
              \mathrm{num}_c = \big((X\, \mathrm{diag}(v^1_c)\, Y\, \mathrm{diag}(v^2_c)) \odot Z\big)\, 1.

    It stores and multiplies T x S and S x S matrices, Dv + 1 times, instead of the exponentials of all triples. Each
    factor is divided by the largest entries of its rows. A row gives NaN if all its pairs are below :math:`e^{-87}`
    (float32) times the product of the largest entries of its factors; for such logits use `tensor_attention` with
    ``strassen_channels``.

    Args:
        f: queries ``[T, D]``.
        k: two sets of keys, g ``[S_1, D]`` and h ``[S_2, D]``, or one array ``[2, S, D]``.
        v: values ``[S_1, Dv]`` and ``[S_2, Dv]``, or one array ``[2, S, Dv]``.
        key: ignored.
        kv_mask: true where a key is real, as in `tensor_attention`. Without a real pair the output is 0.
        scale: factor of the logits, of any sign; ``1/sqrt(D)`` by default.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of the values.

    Raises:
        ValueError: the order is not 3, shapes that do not match.
        TypeError: dtypes that are not floating point (or boolean, for masks).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import strassen_attention, tensor_attention
        >>> from approx_attention.tensor.exact import strassen_channels
        >>> f, g, h, v, w = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(5))
        >>> lifted = jax.jit(tensor_attention)(*strassen_channels(f, (g, h)), (v, w), scale=1 / 2)
        >>> bool(jnp.allclose(jax.jit(strassen_attention)(f, (g, h), (v, w)), lifted, atol=1e-5))
        True

    Reference:
        :cite:p:`kozachinskiy2025strassen`, section on Strassen attention.
    """
    inputs = tensor_inputs(f, k, v, scale=scale, kv_mask=kv_mask)
    if len(inputs.keys) != 2:
        raise ValueError(f"strassen_attention needs two sets of keys, got {len(inputs.keys)}")
    (g, h), (first, second) = inputs.keys, inputs.values
    seen_g, seen_h = (
        jnp.zeros(x.shape[0], x.dtype) if mask is None else jnp.where(mask, 0, -jnp.inf).astype(x.dtype)
        for x, mask in zip((g, h), inputs.masks, strict=True)
    )

    # Row maxima are subtracted from the logits of each factor and cancel in the quotient: no exponential exceeds 1. A
    # row without a key has the maximum 0, so that -inf minus the maximum is not NaN.
    def shifted(logits: Array) -> tuple[Array, Array]:
        peak = finite_peak(jnp.max(logits, axis=1))
        return jnp.exp(logits - peak[:, None]), peak

    from_g, peak_g = shifted(scaled(g, scale) @ h.T + seen_h[None, :])
    # The row maxima of Y, one for each g, are added to the columns of X.
    from_f, _ = shifted(inputs.q @ g.T + (seen_g + peak_g)[None, :])
    around, _ = shifted(inputs.q @ h.T + seen_h[None, :])

    def total(values: tuple[Array, Array]) -> Array:
        one, other = values
        return jnp.sum(((from_f * one[None, :]) @ (from_g * other[None, :])) * around, axis=1)

    ones = jnp.ones((g.shape[0],), g.dtype), jnp.ones((h.shape[0],), h.dtype)
    # Without a real pair both sums are 0. A normaliser of 0 despite real pairs has underflowed, and becomes NaN.
    some = jnp.isfinite(jnp.max(seen_g)) & jnp.isfinite(jnp.max(seen_h))
    normaliser = jnp.where(some, total(ones), jnp.ones((), g.dtype))
    # One channel of values at a time: all Dv products at once would need Dv times the memory.
    return (lax.map(total, (first.T, second.T)).T / normaliser[:, None]).astype(inputs.value_dtype)


def strassen_channels(f: Array, k: Any) -> tuple[Array, tuple[Array, Array]]:
    r"""Make queries and keys ``[., 3 D]`` whose trilinear form is :math:`f \cdot g + g \cdot h + h \cdot f`.

    Args:
        f: queries ``[T, D]``.
        k: two sets of keys, g ``[S_1, D]`` and h ``[S_2, D]``, or one array ``[2, S, D]``.

    Returns:
        Queries ``[T, 3 D]`` and two sets of keys ``[S, 3 D]``, for any tensor attention.

    Raises:
        ValueError: there are not two sets of keys.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.tensor.exact import strassen_channels
        >>> q, (k, l) = strassen_channels(jnp.full((1, 1), 2.0), jnp.array([[[3.0]], [[5.0]]]))
        >>> float(jnp.sum(q * k * l))  # 2 * 3 + 3 * 5 + 5 * 2
        31.0

    Reference:
        As `strassen_attention`.
    """
    k = sets("k", k)
    if len(k) != 2:
        raise ValueError(f"strassen_channels needs two sets of keys, got {len(k)}")
    g, h = k
    one = jnp.ones_like
    return (
        jnp.concatenate([f, one(f), f], axis=-1),
        (jnp.concatenate([g, g, one(g)], axis=-1), jnp.concatenate([one(h), h, h], axis=-1)),
    )
