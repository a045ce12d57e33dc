"""cosFormer: linear attention of rectified queries and keys, weighted by the cosine of their distance."""

import math

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    CosineFeatures,
    FeatureMoments,
    RunningSummary,
    accumulation_dtype,
    attend,
    causal_state,
    check_count,
    check_length,
    check_rows,
    count_real,
    head_inputs,
    output_or_state,
    placed_queries,
    query_mask,
    ranks,
    running_kernel_moments,
)


@output_or_state
def cosformer(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    max_length: int | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    q_mask: Bool[Array, " T"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""cosFormer: linear attention whose kernel rectifies queries and keys and fades with their distance.

    .. math:: A_{ij} = \max(q_i, 0) \cdot \max(k_j, 0)\, \cos\frac{\pi (i - j)}{2M}, \qquad
              \mathrm{out}_i = \sum_j A_{ij} v_j \Big/ \sum_j A_{ij}.

    The cosine of a difference splits into 2 D features, :math:`[\max(x, 0) \cos a, \max(x, 0) \sin a]` at the angle
    :math:`a = \pi i / 2M`, so the sums are exact in O((T + S) D Dv) time. This is a different kernel and **does not
    approximate softmax attention**. It is homogeneous, so the scale does not change the output. A query whose kernel
    is 0 at every key gives 0. There is no epsilon; the authors' code clamps normalisers at 1e-6, which shrinks outputs
    with small normalisers.

    Query t is at the position of key t, counted over real keys. For decoding see `running_cosformer`, whose tokens
    carry their positions.

    Shared arguments: see `approx_attention.methods`.

    Args:
        max_length: M, at least T and S; by default the greater number of real queries and real keys. Set it for
            outputs that do not depend on the length of the sequence.
        block_size: tokens per block of the causal form; it only affects speed.
        return_state: return the `AttentionState`, with the logarithms of this kernel's normalisers, in the
            accumulation dtype.

    Raises:
        ValueError: shapes that do not match, a ``max_length`` below T or S.
        TypeError: dtypes that are not floating point, a length that is not an integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import cosformer
        >>> x, v = jnp.ones((3, 1)), jnp.eye(3)
        >>> [round(weight, 3) for weight in jax.jit(cosformer)(x, x, v)[0].tolist()]  # as 1, cos 30, cos 60 degrees
        [0.423, 0.366, 0.211]

    Reference:
        :cite:p:`qin2022cosformer`, section 2.
    """
    head_dim = q.shape[-1]
    block_size = check_count("block_size", block_size)
    num_queries, num_keys = q.shape[0], k.shape[0]
    longest = max(num_queries, num_keys)
    if max_length is not None:
        max_length = check_count("max_length", max_length)
        if max_length < longest:
            raise ValueError(f"max_length must be at least the number of tokens, {longest}, got {max_length}")
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    given, q_mask = q_mask, query_mask(q_mask, kv_mask, num_queries)
    own = placed_queries(kv_mask, num_queries, is_causal) if is_causal or given is None else given
    if max_length is None and not (q_mask is None and kv_mask is None):
        counts = (n if mask is None else count_real(mask) for mask, n in ((q_mask, num_queries), (kv_mask, num_keys)))
        longest = jnp.maximum(jnp.maximum(*counts), 1)
    over = longest if max_length is None else max_length
    q, k = _placed(q, ranks(own, num_queries), over), _placed(k, ranks(kv_mask, num_keys), over)
    if is_causal:
        return causal_state(q, k, v, running_cosformer(head_dim), block_size=block_size, kv_mask=kv_mask)
    return attend(q, FeatureMoments.of_tokens(CosineFeatures(head_dim), k, v, kv_mask))


def running_cosformer(head_dim: int) -> RunningSummary:
    """The feature moments of a growing prefix of tokens that carry their positions.

    Use it in a `Decoder` with ``head_dim=D + 2`` on the rows of `place_tokens`, segment by segment.

    Args:
        head_dim: the number D of channels of queries and keys, without the two channels for the position.

    Returns:
        The `RunningSummary`; `place_tokens` has an example.

    Raises:
        ValueError: ``head_dim`` below 1.

    Reference:
        :cite:p:`qin2022cosformer`.
    """
    return running_kernel_moments(CosineFeatures(check_count("head_dim", head_dim)))


def place_tokens(x: Float[Array, "N D"], *, max_length: int, start: Array | int = 0) -> Float[Array, "N C"]:
    r"""Append the position i of queries or keys as two channels, :math:`\cos(\pi i / 2M)` and :math:`\sin(\pi i / 2M)`.

    Args:
        x: queries or keys ``[N, D]`` at consecutive positions.
        max_length: M. The weights of tokens at distance M or more would not be positive.
        start: position of the first row.

    Returns:
        Rows ``[N, D + 2]`` in float32 or wider.

    Raises:
        TypeError: rows that are not floating point, a start that is not an integer.
        ValueError: positions below 0 or beyond M, if they are known when tracing.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from approx_attention import Decoder, cosformer
        >>> from approx_attention.methods import place_tokens, running_cosformer
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (20, 8)) for i in range(3))
        >>> decoder = Decoder(running=running_cosformer(8), head_dim=10, value_dim=8, block_size=4)
        >>> step = [place_tokens(x[19:], max_length=32, start=19) for x in (q, k)]
        >>> prefill = jax.jit(decoder.prefill)
        >>> _, cache = prefill(decoder.init(), *(place_tokens(x[:19], max_length=32) for x in (q, k)), v[:19])
        >>> out, cache = prefill(cache, *step, v[19:])
        >>> whole = jax.jit(functools.partial(cosformer, max_length=32, is_causal=True))(q, k, v)
        >>> bool(jnp.allclose(out, whole[19:], atol=1e-5))
        True
    """
    max_length = check_count("max_length", max_length)
    check_rows("x", x, "[N, D]")
    check_length("start", start, max_length)
    if isinstance(start, Tracer):
        start = start.astype(jnp.int32)
    else:
        start = int(start)
        if start + x.shape[0] > max_length:
            least = start + x.shape[0]
            raise ValueError(f"max_length must be at least the number of tokens, {least}, got {max_length}")
    return _placed(x, start + jnp.arange(x.shape[0], dtype=jnp.int32), max_length)


def _placed(x: Array, place: Array, max_length: Array | int) -> Array:
    """Rows ``[N, D]`` with their positions ``[N]`` as two more channels."""
    x, place = x.astype(accumulation_dtype(x)), place[:, None]
    # The cosine is computed as the sine of the complement, which is accurate where it is small.
    step = math.pi / (2 * (max_length if isinstance(max_length, int) else max_length.astype(x.dtype)))
    cosine, sine = (jnp.sin(n.astype(x.dtype) * step) for n in (max_length - place, place))
    return jnp.concatenate([x, cosine, sine], axis=-1)
