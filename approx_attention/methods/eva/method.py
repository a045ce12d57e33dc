"""The method `eva` on a whole sequence or image, and the chunk means from which chunk keys are learned."""

import types
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    RealFirst,
    check_count,
    check_flag,
    check_float_tuple,
    check_floats,
    check_mask,
    checked_inputs,
    head_inputs,
    output_or_state,
    over_real_tokens,
    query_places,
    segment_means,
)
from approx_attention.methods.eva.chunks import ProposalMean, Recipe, Tokens, query_means, summarize_chunks
from approx_attention.methods.eva.images import image_layout
from approx_attention.methods.eva.layouts import Layout, Sizes, sequence_layout
from approx_attention.methods.eva.streamed import streamed_eva
from approx_attention.methods.eva.windows import attend_windows

# The choices of the authors' code, as keyword arguments of `eva`. Its bidirectional form also halves the proposal
# (``proposal_mean="half"``).
OFFICIAL_EVA: Mapping[str, Any] = types.MappingProxyType(
    {"exclude_local": False, "count_correction": False, "noise_scale": "official"}
)


@output_or_state
def eva(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    window_size: int = 64,
    chunk_size: int | None = None,
    num_chunks: int | None = None,
    is_causal: bool = False,
    exclude_local: bool = True,
    count_correction: bool = True,
    overlap: int = 0,
    pooling_vectors: tuple[Array, Array] | None = None,
    chunk_keys: Float[Array, "C D"] | None = None,
    proposal_mean: ProposalMean | Float[Array, "C D"] | None = None,
    num_samples: int = 1,
    noise: Float[Array, "R C D"] | None = None,
    noise_scale: Literal["exact", "official"] = "exact",
    local_bias: Float[Array, "W L"] | None = None,
    spatial_shape: tuple[int, int] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    q_mask: Bool[Array, " T"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""EVA: softmax attention over the tokens of a window and one synthetic token for each chunk of other tokens.

    With :math:`q, k` scaled by :math:`\sqrt s`, windows W of consecutive queries, chunks P of keys, their means
    :math:`\bar q_P, \bar k_P`, and directions :math:`w_P \sim N(\mu_P, I)`, :math:`\mu_P = \bar q_P + \bar k_P`,

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in W(t)} e^{q_t \cdot k_j} v_j
              + \sum_{P \not\subset W(t)} |P|\, e^{q_t \cdot \bar k_P} \beta_P}
              {\sum_{j \in W(t)} e^{q_t \cdot k_j} + \sum_{P \not\subset W(t)} |P|\, e^{q_t \cdot \bar k_P}}, \qquad
              \beta_P = \frac{\sum_{j \in P} e^{w_P \cdot k_j - \|k_j\|^2/2}\, v_j}
              {\sum_{j \in P} e^{w_P \cdot k_j - \|k_j\|^2/2}}.

    The output is exact if the window contains every key, or if every chunk contains one key. Two defaults differ from
    the authors' code, because they are far closer to softmax attention without training: no token of the window is in
    a chunk that its queries see (``exclude_local``), and the mass of a chunk is its number of keys
    (``count_correction``). For the authors' choices pass ``**OFFICIAL_EVA`` (`approx_attention.methods`).

    Without a PRNG key the noise is off, :math:`w_P = \mu_P`. The causal form uses the keys only,
    :math:`\mu_P = \bar k_P`, so that it can be streamed (`running_eva`). There a query sees its window and the window
    before exactly, and every earlier chunk, at a cost of T^2 / ``chunk_size``. With ``num_chunks`` neighbouring chunks
    are averaged in pairs as the prefix grows, at a cost linear in T.

    Windows and chunks are cut over real tokens, those of an image over all pixels. Query t is at the position of
    key t. In cross-attention (T != S) the mean of all queries replaces :math:`\bar q_P`.

    Shared arguments: see `approx_attention.methods`.

    Args:
        window_size: queries per window; of an image, the side of a square window.
        chunk_size: keys per chunk (of an image, its side): a divisor of the window, by default the largest one up to
            16, or, if neither causal nor an image, a multiple of the window. With ``exclude_local=False`` any size.
        num_chunks: the largest number of chunks, instead of a chunk size; the causal form accepts both.
        exclude_local: whether chunks exclude the tokens of the query's window.
        count_correction: whether the factor :math:`|P|` is used.
        overlap: tokens of the neighbouring windows that a window sees on each side (causally on the left), a multiple
            of the chunk size. With ``exclude_local=False`` any number, and chunks overlap by the same number.
        pooling_vectors: two learned vectors a, b ``[D]`` (EvaByte). The chunk key is a softmax mean,
            :math:`\tilde k_P = \sum_j \mathrm{softmax}_j(a \cdot k_j)\, k_j`, and :math:`\mu_P = b` for all chunks.
        chunk_keys: learned :math:`\tilde k_P` ``[C, D]`` in scaled space in place of the means, in the order of
            ``chunk_means``. With a mask and ``num_chunks``, C is the minimum of ``num_chunks`` and S.
        proposal_mean: :math:`\mu_P`: ``"q+k"``, ``"half"`` (half of it), ``"k"``, or a learned array ``[C, D]`` in
            scaled space. The default is ``"q+k"``, in the streamed causal form ``"k"``.
        num_samples: directions per chunk; with more than one they are weighted by importance.
        noise: standard normal noise ``[R, C, D]``; by default sampled.
        noise_scale: ``"exact"``, or ``"official"`` for the noise of the authors' code, :math:`D^{1/4}` times too small.
        local_bias: learned bias of the logits within a window, ``[window, window + overlaps]``; of an image, between
            the pixels of a window, row by row.
        spatial_shape: height and width of an image whose pixels are the tokens, row by row.

    Raises:
        ValueError: shapes or sizes that do not match, counts below 1.
        TypeError: dtypes that are not floating point.
        NotImplementedError: an option that the streamed causal form does not support; an image with ``is_causal`` or
            ``overlap``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import eva, exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (16, 4)) for i in range(3))
        >>> k = k.at[8:].set(k[8])  # the keys of a chunk are alike, its values are not
        >>> out = eva(q[:8], k, v, window_size=8, chunk_size=8)
        >>> bool(jnp.allclose(out, exact(q[:8], k, v), atol=1e-5))
        True

    Reference:
        :cite:p:`zheng2023efficient`, section 4; :cite:p:`evabyte2025` for its ``pooling_vectors``.
    """
    sizes = Sizes(window_size, chunk_size, num_chunks, is_causal, exclude_local, overlap, spatial_shape).checked()
    q, k, v = checked_inputs(q, k, v, kv_mask=kv_mask, is_causal=is_causal)
    recipe = Recipe(
        key, pooling_vectors, chunk_keys, proposal_mean, check_count("num_samples", num_samples), noise, noise_scale,
        check_flag("count_correction", count_correction), is_causal,
    )  # fmt: skip
    _check_learned(recipe, local_bias)
    if q_mask is None:
        q_mask = query_places(kv_mask, q.shape[0], is_causal)
    else:
        check_mask("q_mask", q_mask, q.shape[0])
    if is_causal and exclude_local:
        _check_streamable(sizes, recipe, local_bias)
        return streamed_eva(
            q, k, v, key, window_size=sizes.window_size, chunk_size=sizes.chunk_size, num_chunks=sizes.num_chunks,
            kv_mask=kv_mask, scale=scale, pooling_vectors=pooling_vectors, count_correction=recipe.count_correction,
            noise_scale=noise_scale,
        )  # fmt: skip
    q, k, v = head_inputs(q, k, v, scale=scale)
    if chunk_size is not None and num_chunks is not None:
        raise ValueError(f"give chunk_size or num_chunks, not both; got {chunk_size} and {num_chunks}")

    def attend(queries: tuple[Array, Array | None], k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        return _attend(Tokens(queries[0], k, v, queries[1], kv_mask), sizes, recipe, local_bias)

    if spatial_shape is not None:  # a hidden pixel keeps its position
        return attend((q, q_mask), k, v, kv_mask)
    return over_real_tokens(attend, (q, q_mask), k, v, kv_mask, is_causal=is_causal)


def chunk_means(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    *,
    window_size: int = 64,
    chunk_size: int | None = None,
    num_chunks: int | None = None,
    is_causal: bool = False,
    exclude_local: bool = True,
    overlap: int = 0,
    spatial_shape: tuple[int, int] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> tuple[Array, Array]:
    r"""Chunk means :math:`\bar q_P, \bar k_P` of `eva`, from which chunk keys and proposals are learned.

    Shared arguments: see `approx_attention.methods`.

    Args:
        window_size: as in `eva`.
        chunk_size: keys per chunk.
        num_chunks: the largest number of chunks.
        is_causal: as in `eva`; causal chunks do not overlap.
        exclude_local: as in `eva`.
        overlap: overlap of the chunks with ``exclude_local=False``.
        spatial_shape: height and width of an image.

    Returns:
        Query means and key means, each ``[C, D]``. Chunks of a sequence are in order, those of an image row by row, or
        with ``exclude_local`` window by window and row by row within a window. If T != S the query means are as in
        `eva`.

    Raises:
        ValueError: sizes that do not fit each other, as in `eva`.

    Reference:
        :cite:p:`zheng2023efficient`, section 4.
    """
    sizes = Sizes(window_size, chunk_size, num_chunks, is_causal, exclude_local, overlap, spatial_shape).checked()
    q_mask = query_places(kv_mask, q.shape[0], is_causal)
    if kv_mask is not None and spatial_shape is None:
        keys = RealFirst.of(kv_mask)
        k, kv_mask = keys.front(k), keys.real
        if q_mask is not None:
            queries = RealFirst.of(q_mask)
            q, q_mask = queries.front(q), queries.real
    tokens = Tokens(q, k, k[:, :0], q_mask, kv_mask)
    layout = _layout(tokens, sizes)
    if layout.order is not None:
        tokens = tokens.in_order(layout.order)
    chunks = layout.chunks.segments
    return query_means(tokens, chunks, is_causal), segment_means(tokens.k, chunks, tokens.kv_mask)


def _attend(tokens: Tokens, sizes: Sizes, recipe: Recipe, local_bias: Array | None) -> AttentionState:
    """The steps of the method: cut windows and chunks, make the chunks' synthetic tokens, attend."""
    layout, siblings = _layout(tokens, sizes), None
    if layout.order is not None:
        tokens = tokens.in_order(layout.order)
        if local_bias is not None and layout.within is not None and local_bias.shape == (layout.window,) * 2:
            local_bias = local_bias[layout.within][:, layout.within]
    chunks = summarize_chunks(tokens, layout.chunks, recipe)
    if layout.siblings is not None:
        for name, x in recipe.given.items():
            if x is not None:
                raise NotImplementedError(f"method 'eva' does not support {name} with chunks longer than a window")
        siblings = summarize_chunks(tokens, layout.siblings, recipe, level=1)
    state = attend_windows(tokens, sizes, layout, chunks, siblings, local_bias)
    if layout.order is None:
        return state
    back = np.argsort(layout.order)
    return jax.tree.map(lambda x: x[back], state)


def _layout(tokens: Tokens, sizes: Sizes) -> Layout:
    if sizes.spatial_shape is not None:
        return image_layout(sizes, tokens.q.shape[0], tokens.k.shape[0])
    return sequence_layout(sizes, tokens.k.shape[0], tokens.kv_mask)


def _check_learned(recipe: Recipe, local_bias: Array | None) -> None:
    check_float_tuple("pooling_vectors", recipe.pooling_vectors)
    check_floats(**recipe.given, local_bias=local_bias)
    if recipe.pooling_vectors is not None and (recipe.chunk_keys is not None or recipe.proposal_mean is not None):
        raise ValueError(
            "pooling_vectors determine chunk keys and proposals: give either them or chunk_keys and proposal_mean"
        )


def _check_streamable(sizes: Sizes, recipe: Recipe, local_bias: Array | None) -> None:
    """Raise for options that need the queries or all chunks, which a growing prefix does not have."""
    mean = recipe.proposal_mean
    unsupported = {
        "overlap": sizes.overlap != 0,
        "chunk_keys": recipe.chunk_keys is not None,
        "proposal_mean": mean is not None and not (isinstance(mean, str) and mean == "k"),
        "num_samples": recipe.num_samples != 1,
        "noise": recipe.noise is not None,
        "local_bias": local_bias is not None,
        "spatial_shape": sizes.spatial_shape is not None,
    }
    for name, is_given in unsupported.items():
        if is_given:
            raise NotImplementedError(f"method 'eva' does not support {name} with is_causal and exclude_local")
