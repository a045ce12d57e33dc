"""EVA: exact attention nearby, and one control variate for every chunk of tokens further away."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    HIDDEN,
    LEAST_TILE,
    AttentionState,
    FeatureMoments,
    GrowingSegments,
    PositiveFeatures,
    RealFirst,
    RunningSummary,
    Segments,
    TokenSums,
    WeightedKV,
    block_windows,
    causal_state,
    check_choice,
    check_count,
    check_counts,
    check_flag,
    check_float_tuple,
    check_floats,
    check_key,
    check_mask,
    control_variate_state,
    dense_state,
    draw_of_size,
    head_inputs,
    mask_bias,
    mean,
    merge,
    out_of_blocks,
    output_or_state,
    over_real_tokens,
    pad_rows,
    query_mask,
    query_places,
    real_keys,
    segment_means,
    segments_of,
    squared_norm,
)
from approx_attention.methods.eva_layouts import DEFAULT_CHUNK, Layout, largest_divisor, layout_of

ProposalMean = Literal["q+k", "half", "k"]


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
    r"""EVA: softmax attention over the tokens of a window and one synthetic token for every chunk of the others.

    With :math:`q, k` scaled by :math:`\sqrt s`, windows W of consecutive queries, chunks P of keys, their means
    :math:`\bar q_P, \bar k_P`, and directions :math:`w_P \sim N(\mu_P, I)`, :math:`\mu_P = \bar q_P + \bar k_P`,

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in W(t)} e^{q_t \cdot k_j} v_j
              + \sum_{P \not\subset W(t)} |P|\, e^{q_t \cdot \bar k_P} \beta_P}
              {\sum_{j \in W(t)} e^{q_t \cdot k_j} + \sum_{P \not\subset W(t)} |P|\, e^{q_t \cdot \bar k_P}}, \qquad
              \beta_P = \frac{\sum_{j \in P} e^{w_P \cdot k_j - \|k_j\|^2/2}\, v_j}
              {\sum_{j \in P} e^{w_P \cdot k_j - \|k_j\|^2/2}}.

    Exact where the window holds every key, and where every chunk holds one. Two defaults depart from the authors' code,
    because they come far closer to softmax attention without training: tokens of the window are in no chunk
    (``exclude_local``), and a chunk counts as often as it has keys (``count_correction``).

    Without a key the noise is off, :math:`w_P = \mu_P`. The causal form looks at keys alone, :math:`\mu_P = \bar k_P`,
    so that it can be streamed; a query sees its own block of ``window_size`` and the block before exactly. It holds
    every earlier chunk, at a cost of T^2 / ``chunk_size``; with a number of chunks at most that many, whose neighbours
    are averaged in pairs as the prefix grows, at a cost linear in T.

    Shared arguments: see `approx_attention.methods`.

    Args:
        q: queries ``[T, D]``; query t stands at the position of key t, counted over real keys.
        key: typed PRNG key of the noise, or none for no noise.
        window_size: queries per window; of an image, the side of a square window.
        chunk_size: keys per chunk (of an image, its side): a divisor of the window, by default the largest one up to
            16, or a multiple of it if neither causal nor an image. With ``exclude_local=False`` any.
        num_chunks: the greatest number of chunks; in place of a chunk size, but beside it if causal.
        exclude_local: no token is both in the window and in a chunk; else all are in chunks, as in the authors' code.
        count_correction: the factor :math:`|P|`.
        overlap: how many tokens to each side a window sees beyond its own (to the left if causal), a multiple of the
            chunk size. With ``exclude_local=False`` any, and chunks then overlap alike, as in the authors' code.
        pooling_vectors: two learned ones ``[D]`` (EvaByte): the chunk key is a softmax mean by the first,
            :math:`\tilde k_P = \sum_j \mathrm{softmax}_j(a \cdot k_j)\, k_j`, and w the second for every chunk.
        chunk_keys: learned :math:`\tilde k_P` ``[C, D]`` in scaled space in place of the means; like all that is given
            by chunk in the order of ``chunk_means``. With a mask and ``num_chunks``, C is the lesser of that and S.
        proposal_mean: :math:`\mu`: ``"q+k"``, ``"half"`` of that, ``"k"``, or ``[C, D]`` in scaled space. By default
            ``"q+k"``, but ``"k"`` if causal and ``exclude_local``. Queries of another sequence (T != S) enter by the
            mean of them all, but causally by those at the places of the chunk.
        num_samples: directions per chunk; with more than one, their answers are weighted by importance.
        noise: standard normal noise ``[R, C, D]`` in place of a draw.
        noise_scale: ``"exact"``, or ``"official"`` for the noise of the authors' code, :math:`D^{1/4}` times too small.
        local_bias: learned bias of the logits within a window, ``[window, window + overlaps]``; of an image, between
            the pixels of a window, row by row.
        spatial_shape: height and width of an image that the tokens are, row by row.
        kv_mask: true where a key is real, ``[S]``; windows and chunks are of real tokens, in an image of all pixels. A
            query that sees no key gives 0; a chunk without a real key has no mass.
        q_mask: true where a query is real, ``[T]``, and enters means of queries; by default `kv_mask` where T = S.

    Raises:
        ValueError: shapes or sizes that do not fit, counts below 1.
        TypeError: dtypes that are not floating point.
        NotImplementedError: an option that the streamed causal form does not have.

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
    head_dim = q.shape[-1]
    exclude_local = check_flag("exclude_local", exclude_local)
    count_correction = check_flag("count_correction", count_correction)
    window_size = check_count("window_size", window_size)
    overlap = check_count("overlap", overlap, least=0)
    num_samples = check_count("num_samples", num_samples)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    if chunk_size is not None and num_chunks is not None and not (is_causal and exclude_local):
        raise ValueError(f"give chunk_size or num_chunks, not both; got {chunk_size} and {num_chunks}")
    if chunk_size is not None:
        chunk_size = check_count("chunk_size", chunk_size)
    if pooling_vectors is not None and (chunk_keys is not None or proposal_mean is not None):
        raise ValueError(
            "pooling_vectors give the chunk keys and the proposals: give them or chunk_keys and proposal_mean, not both"
        )
    means = None if isinstance(proposal_mean, str) else proposal_mean
    check_float_tuple("pooling_vectors", pooling_vectors)
    check_floats(chunk_keys=chunk_keys, proposal_mean=means, noise=noise, local_bias=local_bias)
    if q_mask is not None:
        check_mask("q_mask", q_mask, q.shape[0])
    if is_causal and exclude_local:
        given = {
            "overlap": overlap != 0,
            "chunk_keys": chunk_keys is not None,
            "proposal_mean": proposal_mean is not None
            and not (isinstance(proposal_mean, str) and proposal_mean == "k"),
            "num_samples": num_samples != 1,
            "noise": noise is not None,
            "local_bias": local_bias is not None,
            "spatial_shape": spatial_shape is not None,
        }
        for name, is_given in given.items():
            if is_given:
                raise NotImplementedError(f"method 'eva' does not support {name} with is_causal and exclude_local")
        chunk_size = chunk_size or largest_divisor(window_size, DEFAULT_CHUNK)
        if window_size % chunk_size:
            raise ValueError(f"chunk_size must divide window_size = {window_size}, got {chunk_size}")
        if num_chunks is None:
            num_chunks = -(-max(q.shape[0], window_size) // chunk_size)
        # Fewer queries than a block see no chunk.
        sizes: Any = {"num_chunks": num_chunks, "chunk_size": chunk_size if q.shape[0] >= window_size else 1}
        options: Any = {"count_correction": count_correction, "noise_scale": noise_scale}
        running = running_eva(head_dim, key, **sizes, pooling_vectors=pooling_vectors, **options)
        state = causal_state(q, k, v, running, block_size=window_size, kv_mask=kv_mask)
        return state

    sizes = {
        "window": window_size, "chunk": chunk_size, "num_chunks": num_chunks, "overlap": 0 if is_causal else overlap,
        "exclude_local": exclude_local, "spatial_shape": spatial_shape,
    }  # fmt: skip
    learned = {"chunk_keys": chunk_keys, "noise": noise}
    given = {**learned, "proposal_mean": None if isinstance(proposal_mean, str) else proposal_mean}

    def by_windows(queries: tuple[Array, Array | None], k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        (q, q_mask), bias = queries, local_bias
        layout = layout_of(q.shape[0], k.shape[0], **sizes, kv_mask=kv_mask)
        if layout.order is not None:
            q, k, v, q_mask, kv_mask = jax.tree.map(lambda x: x[layout.order], (q, k, v, q_mask, kv_mask))
            if bias is not None and layout.within is not None and bias.shape == (layout.window,) * 2:
                bias = bias[layout.within][:, layout.within]
        summarise = _Summaries(
            q, k, v, key, q_mask, kv_mask, pooling_vectors, proposal_mean, num_samples, noise_scale, count_correction,
            is_causal,
        )  # fmt: skip
        chunks = summarise(layout.chunks, 0, layout.used, **learned)
        siblings = None
        if layout.siblings is not None:
            for name, x in given.items():
                if x is not None:
                    raise NotImplementedError(f"method 'eva' does not support {name} with chunks longer than a window")
            siblings = summarise(layout.siblings, 1, layout.used_siblings)
        sides = overlap, 0 if is_causal else overlap
        state = _answer(q, k, v, kv_mask, layout, *sides, chunks, siblings, bias, is_causal, exclude_local)
        if layout.order is not None:
            back = np.argsort(layout.order)
            state = jax.tree.map(lambda x: x[back], state)
        return state

    if q_mask is None:
        q_mask = query_places(kv_mask, q.shape[0], is_causal)
    queries = q, query_mask(q_mask, kv_mask, q.shape[0])
    if spatial_shape is None:
        state = over_real_tokens(by_windows, queries, k, v, kv_mask, is_causal=is_causal)
    else:  # a hidden pixel keeps its place
        state = by_windows(queries, k, v, kv_mask)
    return state


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
    """Means of the queries and keys of every chunk of `eva`, from which learned chunk keys and proposals are made.

    Shared arguments: see `approx_attention.methods`.

    Args:
        window_size: as in `eva`, like all that follow.
        chunk_size: keys per chunk.
        num_chunks: the greatest number of chunks.
        is_causal: whether overlapping windows leave the chunks as they are.
        exclude_local: which sizes are allowed.
        overlap: how far chunks overlap with ``exclude_local=False``.
        spatial_shape: height and width of an image.
        kv_mask: true where a key is real; its query then is too, if there are as many.

    Returns:
        Query means and key means, each ``[C, D]``: chunks of a sequence in order; of an image row by row, but with
        ``exclude_local`` window by window and row by row within. If T != S the query means are as in `eva`.
    """
    q_mask = query_places(kv_mask, q.shape[0], is_causal)
    if kv_mask is not None and spatial_shape is None:
        keys = RealFirst.of(kv_mask)
        k, kv_mask = keys.front(k), keys.real
        if q_mask is not None:
            queries = RealFirst.of(q_mask)
            q, q_mask = queries.front(q), queries.real
    layout = layout_of(
        q.shape[0], k.shape[0], window_size, chunk_size, num_chunks, 0 if is_causal else overlap, exclude_local,
        spatial_shape, kv_mask,
    )  # fmt: skip
    if layout.order is not None:
        q, k, q_mask, kv_mask = jax.tree.map(lambda x: x[layout.order], (q, k, q_mask, kv_mask))
    return _query_means(q, k, layout.chunks, q_mask, kv_mask, is_causal), segment_means(k, layout.chunks, kv_mask)


def _query_means(
    q: Array, k: Array, parts: Segments, q_mask: Array | None, kv_mask: Array | None, is_causal: bool
) -> Array:
    num_queries, num_keys = q.shape[0], k.shape[0]
    if num_queries == num_keys:
        return segment_means(q, parts, q_mask)
    if is_causal:  # queries of later places would tell of the future
        more = max(0, num_keys - num_queries)
        asked = pad_rows(real_keys(q_mask, num_queries)[:num_keys], more) & real_keys(kv_mask, num_keys)
        return segment_means(pad_rows(q[:num_keys], more), parts, asked)
    return jnp.broadcast_to(segment_means(q, segments_of(num_queries, 1), q_mask), (len(parts.member), q.shape[1]))


class _Chunks(NamedTuple):
    """One synthetic token per chunk: its key, its answers at R directions, and its log-mass."""

    k: Array
    beta: Array
    log_mass: Array
    moments: FeatureMoments | None


class _Summaries(NamedTuple):
    """Makes the chunks' synthetic tokens from their members, by the options of `eva`."""

    q: Array
    k: Array
    v: Array
    key: Array | None
    q_mask: Array | None
    kv_mask: Array | None
    pooling_vectors: tuple[Array, Array] | None
    proposal_mean: ProposalMean | Array | None
    num_samples: int
    noise_scale: str
    count_correction: bool
    is_causal: bool

    def __call__(
        self,
        parts: Segments,
        level: int,
        used: Array | None,
        chunk_keys: Array | None = None,
        noise: Array | None = None,
    ) -> _Chunks:
        num_chunks, head_dim, dtype = len(parts.member), self.k.shape[1], self.k.dtype
        tokens = self.k, self.v, real_keys(self.kv_mask, self.k.shape[0])
        k, v, inside = (parts.gather(x) for x in tokens)
        log_count = mask_bias(inside, dtype)
        mu = self._proposal_means(parts)
        if noise is None:
            shape = (self.num_samples, num_chunks, head_dim)
            noise = jnp.zeros(shape, dtype)
            if self.key is not None:
                noise = jax.random.normal(jax.random.fold_in(check_key("eva", self.key), level), shape, dtype)
                noise = noise if used is None else draw_of_size(noise, used)
        elif noise.ndim != 3 or noise.shape[1:] != (num_chunks, head_dim):
            raise ValueError(f"noise must be [R, C, D] with C, D = {[num_chunks, head_dim]}, got shape {noise.shape}")
        w = mu[None] + noise.astype(dtype) * _spread(head_dim, self.noise_scale)
        if chunk_keys is None:
            chunk_keys = _chunk_keys(k, log_count, self.pooling_vectors)
        elif chunk_keys.shape != (num_chunks, head_dim):
            raise ValueError(f"chunk_keys must be [C, D] = {[num_chunks, head_dim]}, got shape {chunk_keys.shape}")
        beta = jax.vmap(lambda w: _coefficients(k, v, log_count, w))(w)
        count = jnp.sum(inside, axis=1).astype(dtype)
        log_mass = jnp.log(jnp.maximum(count, 1)) if self.count_correction else jnp.zeros_like(count)
        moments = None
        if w.shape[0] > 1:
            moments = jax.vmap(_weighted_moments, in_axes=(1, 0, 0, 0, 0))(w, mu, k, v, inside)
        log_mass = jnp.where(count > 0, log_mass, HIDDEN)
        return _Chunks(chunk_keys.astype(dtype), beta, log_mass, moments)

    def _proposal_means(self, parts: Segments) -> Array:
        shape = (len(parts.member), self.k.shape[1])
        if self.pooling_vectors is not None:
            return jnp.broadcast_to(self.pooling_vectors[1].astype(self.k.dtype)[None], shape)
        if self.proposal_mean is not None and not isinstance(self.proposal_mean, str):
            if self.proposal_mean.shape != shape:
                raise ValueError(f"proposal_mean must be [C, D] = {list(shape)}, got shape {self.proposal_mean.shape}")
            return self.proposal_mean.astype(self.k.dtype)
        kind = self.proposal_mean or "q+k"
        check_choice("proposal_mean", kind, ("q+k", "half", "k"))
        k_mean = segment_means(self.k, parts, self.kv_mask)
        if kind == "k":
            return k_mean
        q_mean = _query_means(self.q, self.k, parts, self.q_mask, self.kv_mask, self.is_causal)
        return (q_mean + k_mean) * (0.5 if kind == "half" else 1.0)


def _chunk_keys(k: Array, log_count: Array, pooling_vectors: tuple[Array, Array] | None) -> Array:
    """The key of each chunk ``k [C, j, D]``: the mean, or the softmax mean by a learned vector."""
    logits = log_count if pooling_vectors is None else k @ pooling_vectors[0].astype(k.dtype) + log_count
    return jnp.einsum("cj,cjd->cd", jax.nn.softmax(jnp.where(log_count <= HIDDEN / 2, HIDDEN, logits), axis=1), k)


def _coefficients(k: Array, v: Array, log_count: Array, w: Array) -> Array:
    r"""Control-variate coefficients :math:`\beta` ``[C, Dv]`` of chunks ``k [C, j, D]`` at directions ``w [C, D]``."""
    logits = jnp.einsum("cjd,cd->cj", k, w) - jnp.sum(k * k, axis=-1) / 2 + log_count
    return jnp.einsum("cj,cjd->cd", jax.nn.softmax(jnp.where(log_count <= HIDDEN / 2, HIDDEN, logits), axis=1), v)


def _weighted_moments(w: Array, mu: Array, k: Array, v: Array, inside: Array) -> FeatureMoments:
    """The features of one chunk at directions ``w [R, D]`` drawn around ``mu``, with their importance weights."""
    log_weight = squared_norm(mu[None])[:, 0] / 2 - w @ mu
    return FeatureMoments.of_tokens(PositiveFeatures(w), k, v, inside).weighted(log_weight)


def _spread(head_dim: int, noise_scale: str) -> float:
    check_choice("noise_scale", noise_scale, ("exact", "official"))
    return head_dim**-0.25 if noise_scale == "official" else 1.0


def _answer(
    q: Array,
    k: Array,
    v: Array,
    kv_mask: Array | None,
    layout: Layout,
    left: int,
    right: int,
    chunks: _Chunks,
    siblings: _Chunks | None,
    local_bias: Array | None,
    is_causal: bool,
    exclude_local: bool,
) -> AttentionState:
    """Exact attention within windows merged with attention over the chunks that a query may see."""
    num_queries, num_keys, window, dtype = q.shape[0], k.shape[0], layout.window, q.dtype
    reach = left + window + right
    if local_bias is not None and local_bias.shape != (window, reach):
        raise ValueError(f"local_bias must be [window, window + overlaps] = {[window, reach]}, got {local_bias.shape}")
    num_windows = -(-num_queries // window)
    # As many windows at a time as fill a tile.
    rows = max(1024, LEAST_TILE // (reach + len(layout.chunks.member)))
    blocks = -(-num_windows // max(1, rows // window))
    together = -(-num_windows // blocks)
    rows = together * window

    key_bias = mask_bias(real_keys(kv_mask, num_keys), dtype)
    near = tuple(
        block_windows(x, window, blocks * together, left, right, fill)
        for x, fill in ((k, 0.0), (v, 0.0), (key_bias, HIDDEN))
    )
    own_bias = jnp.zeros((1, reach), dtype) if local_bias is None else local_bias.astype(dtype)
    if is_causal:
        own_bias = jnp.where(np.tri(window, reach, left, dtype=bool), own_bias, HIDDEN)
    position = np.arange(len(layout.chunks.member), dtype=np.int32) * layout.chunk

    def block(args: Any) -> AttentionState:
        first, q, (k, v, bias) = args
        number = first + jnp.arange(together, dtype=jnp.int32)
        bias = jnp.where(bias[:, None, :] <= HIDDEN / 2, HIDDEN, bias[:, None, :] + own_bias[None])
        q_windows = q.reshape(together, window, -1)
        local = jax.vmap(dense_state)(q_windows, k, v, bias)
        if siblings is not None:
            # The other windows of a window's chunk.
            per_chunk = jnp.maximum(layout.chunk // window, 1)
            at = jnp.arange(layout.chunks.member.shape[1] // window, dtype=jnp.int32)[None, :]
            window_number = (number // per_chunk * per_chunk)[:, None] + at
            is_other = (at < per_chunk) & (window_number < siblings.k.shape[0]) & (window_number != number[:, None])
            window_number = jnp.minimum(window_number, siblings.k.shape[0] - 1)
            log_mass = jnp.where(is_other, siblings.log_mass[window_number], HIDDEN)[:, None, :]
            of_siblings = siblings.k[window_number], siblings.beta[0][window_number], log_mass
            local = merge(local, jax.vmap(dense_state)(q_windows, *of_siblings))
        local = out_of_blocks(local)
        log_mass = jnp.broadcast_to(chunks.log_mass[None, :], (1, len(position)))
        start = (number * window)[:, None]
        if exclude_local:
            hidden = (position[None, :] + layout.chunk > start - left) & (position[None, :] < start + window + right)
            log_mass = jnp.where(jnp.repeat(hidden, window, axis=0, total_repeat_length=rows), HIDDEN, log_mass)
        elif is_causal:
            row = first * window + jnp.arange(rows, dtype=jnp.int32)[:, None]
            log_mass = jnp.where(position[None, :] // layout.chunk >= row // layout.chunk, HIDDEN, log_mass)
        if chunks.moments is None:
            return merge(local, dense_state(q, chunks.k, chunks.beta[0], log_mass))
        logits = jnp.where(log_mass <= HIDDEN / 2, -jnp.inf, q @ chunks.k.T + log_mass)
        return control_variate_state(q, local, chunks.moments, logits)

    q = pad_rows(q, blocks * rows - num_queries).reshape(blocks, rows, -1)
    near = jax.tree.map(lambda x: x.reshape(blocks, together, *x.shape[1:]), near)
    numbers = together * jnp.arange(blocks, dtype=jnp.int32)
    state = lax.map(jax.checkpoint(block), (numbers, q, near))
    return out_of_blocks(state, num_queries)


def running_eva(
    head_dim: int,
    key: Array | None = None,
    *,
    num_chunks: int = 256,
    chunk_size: int | None = None,
    pooling_vectors: tuple[Array, Array] | None = None,
    count_correction: bool = True,
    noise_scale: Literal["exact", "official"] = "exact",
) -> RunningSummary:
    """Chunks of a growing prefix: neighbours are averaged in pairs whenever so many no longer fit.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key of the noise, or none for no noise.
        num_chunks: how many chunks there are at most.
        chunk_size: tokens per chunk, a divisor of the block; by default the largest one up to 16.
        pooling_vectors: learned ones, as in `eva`.
        count_correction: as in `eva`.
        noise_scale: as in `eva`.
    """
    head_dim, num_chunks = check_counts(head_dim=head_dim, num_chunks=num_chunks)
    chunk_size = None if chunk_size is None else check_count("chunk_size", chunk_size)
    check_float_tuple("pooling_vectors", pooling_vectors)
    spread = _spread(head_dim, noise_scale)

    def directions(k: Array, log_count: Array, first: Array) -> Array:
        """One direction for each of the chunks ``k [C, j, D]``, the first of which is number ``first``."""
        if pooling_vectors is None:
            mu = _chunk_keys(k, log_count, None)
        else:
            mu = jnp.broadcast_to(pooling_vectors[1].astype(k.dtype)[None], (k.shape[0], head_dim))
        if key is None:
            return mu
        numbers = first + jnp.arange(k.shape[0], dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(check_key("eva", key), numbers)
        return mu + spread * jax.vmap(lambda key: jax.random.normal(key, (head_dim,), mu.dtype))(keys)

    def init(value_dim: int, dtype: Any) -> GrowingSegments:
        return GrowingSegments.empty(num_chunks, head_dim, value_dim, dtype)

    def append(growing: GrowingSegments, start: Array, k: Array, v: Array, kv_mask: Array) -> GrowingSegments:
        block_size = k.shape[0]
        chunk = chunk_size or largest_divisor(block_size, DEFAULT_CHUNK)
        if block_size % chunk:
            raise ValueError(f"chunk_size must divide the block of {block_size} tokens, got {chunk}")
        tokens = TokenSums.of_tokens(k, v, kv_mask)
        k, v, count = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), tuple(tokens))
        log_count = mask_bias(count > 0, count.dtype)
        beta = _coefficients(k, v, log_count, directions(k, log_count, start // chunk))
        total = jnp.sum(count, axis=1)
        chunks = TokenSums(total[:, None] * _chunk_keys(k, log_count, pooling_vectors), total[:, None] * beta, total)
        return growing.append(start, chunk, chunks, chunk * -(-(block_size // chunk) // num_chunks))

    def read(growing: GrowingSegments) -> WeightedKV:
        landmarks = growing.sums.landmarks()
        if count_correction:
            return landmarks
        once = (landmarks.mass > 0).astype(landmarks.mass.dtype)
        return WeightedKV(landmarks.k, mean(landmarks.value_sum, landmarks.mass), once)

    return RunningSummary(init, append, read)
