"""Scatterbrain: exact attention to nearby blocks, positive random features for all other blocks."""

from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    FeatureMoments,
    PositiveFeatures,
    Proposal,
    causal_state,
    check_count,
    check_key,
    check_projection,
    check_proposal,
    head_inputs,
    orthogonal_projection,
    output_or_state,
    over_real_tokens,
    running_moments,
)
from approx_attention.sparse import BlockMap, blocks_and_rest_state


@output_or_state
def scatterbrain(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_features: int = 256,
    window_size: int = 64,
    projection: Float[Array, "R D"] | None = None,
    proposal: Proposal | None = None,
    is_causal: bool = False,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Scatterbrain: sparse plus low rank, exact on a local support and R positive random features outside it.

    With :math:`q, k` scaled by :math:`\sqrt{s}`, features :math:`\phi` of `favor` and the support N(t), the keys of the
    block of query t and of the blocks just before and after it,

    .. math:: A_{tj} = \phi(q_t) \cdot \phi(k_j) + S_{tj}, \qquad
              S_{tj} = \big(e^{q_t \cdot k_j} - \phi(q_t) \cdot \phi(k_j)\big)\,[j \in N(t)], \qquad
              \mathrm{out}_t = \sum_j A_{tj} v_j \Big/ \sum_j A_{tj}.

    The paper subtracts the features on the support. Here the features of keys outside the support are summed
    separately, so every weight is positive even if the features are inaccurate on the support. The paper's support
    comes from hashing; this one is positional.

    Normaliser and numerator are unbiased; their ratio is not. If two blocks contain all tokens the output is exact.
    The support is accurate at low temperatures, if it contains the large weights, and the features at high ones. In
    between the sum may be worse than `favor` or the window alone: the errors of estimated weights partly cancel in the
    ratio of `favor`, but not against exact weights.

    With ``is_causal`` there are no later keys, and the method equals causal `favor` with ``block_size=window_size``.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_features: the number R of features, unless a projection is given.
        window_size: tokens per block; a query sees exactly between one and two blocks on each side.
        projection: the directions ``[R, D]``; by default a random projection.
        proposal: as in `favor`.

    Raises:
        ValueError: shapes that do not match, counts below 1, neither key nor projection.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from approx_attention import exact, favor, scatterbrain
        >>> x, v = (jax.random.normal(jax.random.key(i), (128, 16)) for i in range(2))
        >>> distance = lambda method: jnp.linalg.norm(method(x, x, v, jax.random.key(2)) - exact(x, x, v))
        >>> error = jax.jit(distance, static_argnums=0)
        >>> bool(error(functools.partial(scatterbrain, window_size=16)) < 0.7 * error(favor))
        True

    Reference:
        :cite:p:`chen2021scatterbrain`, section 4.
    """
    head_dim = q.shape[-1]
    num_features = check_count("num_features", num_features)
    window_size = check_count("window_size", window_size)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    if projection is None:
        projection = orthogonal_projection(check_key("scatterbrain", key), num_features, head_dim)
    check_projection(projection, head_dim)
    if proposal is not None:
        check_proposal(proposal, head_dim)
    features = PositiveFeatures(projection) if proposal is None else proposal.features(projection)
    if is_causal:
        state = causal_state(q, k, v, running_moments(features), block_size=window_size, kv_mask=kv_mask)
    else:
        # A block longer than the sequence would only add padding.
        block = min(window_size, max(q.shape[0], k.shape[0]))
        blocks = BlockMap.banded(1, 1, block_size=block, num_queries=q.shape[0], num_keys=k.shape[0])

        def summarize(k: Array, v: Array, kv_mask: Array, number: Array) -> FeatureMoments:
            # One projection for all blocks: only moments of the same features can be added.
            return FeatureMoments.of_tokens(features, k, v, kv_mask)

        def by_blocks(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
            return blocks_and_rest_state(q, k, v, blocks, summarize, kv_mask=kv_mask)

        state = over_real_tokens(by_blocks, q, k, v, kv_mask)
    return state
