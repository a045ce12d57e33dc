"""Sketches of the values, which need the full weights, and importance samples of the keys, which do not."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention import kernels
from approx_attention.core import (
    HIDDEN,
    SKETCHES,
    AttentionState,
    HadamardSketch,
    RealFirst,
    RowSample,
    Sketch,
    WeightedKV,
    attend,
    back,
    check_choice,
    check_count,
    check_flag,
    check_key,
    count_real,
    draw_of_size,
    draw_sketch,
    head_inputs,
    leverages,
    mask_bias,
    output_or_state,
    pad_rows,
    real_keys,
    shown,
    squared_norm,
    token_sums_inputs,
)


@output_or_state
def unreduced_jlt(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    sketch_size: int = 256,
    sketch: str | Sketch = "hadamard",
    centred: bool = True,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Softmax attention over values compressed and reconstructed by a Johnson-Lindenstrauss sketch.

    With the weights :math:`P = \mathrm{softmax}(s\, q k^T)`, the mean value :math:`\bar v` and a random M x S matrix
    :math:`\Pi` with :math:`E[\Pi^T \Pi] = I`,

    .. math:: \mathrm{out} = \bar v + P\, \Pi^T \Pi\, (v - \bar v).

    This is the approximation analysed by Linformer's theorem. Its expectation is softmax attention and its mean squared
    error is `bounds.sketch_mse`; neither holds for `linformer` with a random projection. It needs P, so it saves no
    time: it shows the best accuracy of a sketch of M rows. Log-normalisers are exact.

    Subtracting the mean is not in the paper. It is exact, because rows of P sum to 1, and lowers the variance
    where the mean is large.

    Shared arguments: see `approx_attention.methods`. A sample of ``"uniform_rows"`` may contain rows of padding.

    Args:
        key: typed PRNG key; not needed if ``sketch`` is a sketch.
        sketch_size: the number M of rows.
        sketch: a kind of `approx_attention.core.draw_sketch`, or a sketch of S rows. The default is exact if M is the
            smallest power of two of at least S.
        centred: subtract the mean of the values before the sketch, and add it after.

    Raises:
        ValueError: shapes that do not match, an unknown kind of sketch, a size that it does not support, no key.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import functools, jax
        >>> from approx_attention import exact, unreduced_jlt
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> method = jax.jit(functools.partial(unreduced_jlt, sketch="hadamard", sketch_size=64))
        >>> out = method(q, k, v, jax.random.key(3))
        >>> bool(abs(out - exact(q, k, v)).max() < 1e-5)
        True

    Reference:
        :cite:p:`wang2020linformer`, theorem 1; the name is that of :cite:p:`chen2021skeinformer`, section 3.
    """
    num_keys = k.shape[0]
    centred = check_flag("centred", centred)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    if isinstance(sketch, str):
        sketch_size = check_count("sketch_size", sketch_size)
        check_choice("sketch", sketch, SKETCHES)
        check_key("unreduced_jlt", key)
    elif not isinstance(sketch, Sketch):
        raise TypeError(f"sketch must be one of {', '.join(SKETCHES)}, or a sketch, got {shown(sketch)}")
    elif sketch.num_rows != num_keys:
        raise ValueError(f"the sketch must have S = {num_keys} rows, got {sketch.num_rows}")
    mean = jnp.zeros_like(v[:1])
    if centred:
        real = jnp.ones((num_keys, 1), bool) if kv_mask is None else kv_mask[:, None]
        mean = jnp.sum(v, axis=0, keepdims=True) / jnp.maximum(jnp.sum(real), 1).astype(v.dtype)
        # Padding stays 0, so that the sketch contains real rows only.
        v = jnp.where(real, v - mean, 0)
    key_bias = None if kv_mask is None else mask_bias(kv_mask, q.dtype)
    if not isinstance(sketch, str):
        v = back(sketch, sketch @ v)
    elif kv_mask is None:
        v = _through_sketch(v, sketch, sketch_size, key)
    else:
        # The sketch of the real rows: random numbers go by position, and padding must not change them.
        order = RealFirst.of(kv_mask)
        v = order.back(_through_real_sketch(order.front(v), count_real(kv_mask), sketch, sketch_size, key))
    state = kernels.state(q, k, v, key_bias)
    # A query that sees no key gives 0, not the mean; NaN must not turn into 0.
    seen = (state.lse > -jnp.inf) | jnp.isnan(state.lse)
    return dataclasses.replace(state, out=jnp.where(seen[:, None], state.out + mean, 0))


def _through_sketch(v: Array, kind: str, size: int, key: Array | None, count: Array | None = None) -> Array:
    r"""The rows :math:`\Pi^T \Pi v` of a random sketch of the first ``count`` rows; those after them must be 0."""
    # More rows than those of the orthogonal transform, or of the sampled matrix, would add nothing.
    most = {"hadamard": 1 << (v.shape[0] - 1).bit_length(), "uniform_rows": v.shape[0]}.get(kind, size)
    sketch = draw_sketch(check_key("unreduced_jlt", key), kind, min(size, most), v.shape[0])
    # The random numbers equal those of a sketch of ``count`` rows; a sample of rows has no such prefix.
    if count is not None and kind != "uniform_rows":
        sketch = jax.tree.map(lambda x: draw_of_size(x, count), sketch)
    return back(sketch, sketch @ v)


def _through_real_sketch(v: Array, count: Array, kind: str, size: int, key: Array | None) -> Array:
    """`_through_sketch` for ``count`` real rows of any kind, also where the shape of the sketch depends on it."""
    if kind != "hadamard":
        return _through_sketch(v, kind, size, key, count)
    # The transform of the smallest power of two that covers the real rows is a corner of that of all rows. Their number
    # is traced, so rows are sampled for every power of two, and one of the samples is selected.
    lengths = [1 << level for level in range((v.shape[0] - 1).bit_length() + 1)]
    size = min(size, lengths[-1])
    sketch = HadamardSketch.draw(check_key("unreduced_jlt", key), size, v.shape[0])
    rows = [HadamardSketch.draw(check_key("unreduced_jlt", key), min(size, n), n).chosen for n in lengths]
    level = jnp.sum(jnp.asarray(lengths, jnp.int32) < count, dtype=jnp.int32)
    chosen = jnp.stack([pad_rows(x, size - x.shape[0]) for x in rows])[level]
    used = jnp.minimum(size, jnp.asarray(lengths, jnp.int32)[level])
    sketch = dataclasses.replace(sketch, chosen=chosen)
    # Entries of the sketch are 1/sqrt(size); with fewer rows the entries are larger, and the rows after them are 0.
    share = jnp.where(jnp.arange(size, dtype=jnp.int32) < used, size / used.astype(v.dtype), 0)
    return back(sketch, share[:, None] * (sketch @ v))


Odds = Literal["uniform", "key_norm", "value_norm", "leverage"]


@output_or_state
def importance_sample(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    sample_size: int = 256,
    odds: Odds = "value_norm",
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Attention over a sample of M keys with replacement, each weighted by its inverse probability.

    .. math:: j_1, \dots, j_M \sim p, \qquad
              \mathrm{out}_t = \sum_m \frac{e^{s\, q_t \cdot k_{j_m}}}{M p_{j_m}}\, v_{j_m}
              \Big/ \sum_m \frac{e^{s\, q_t \cdot k_{j_m}}}{M p_{j_m}}.

    Numerator and normaliser are unbiased for all odds; their ratio is consistent as M grows.

    Shared arguments: see `approx_attention.methods`.

    Args:
        sample_size: the number M of sampled keys; keys may repeat.
        odds: p is proportional to 1, to the norms of keys or of values, or to the ridge leverage scores of the keys.
            The mean of the norms or scores is added to each, so that no probability is near 0.

    Raises:
        ValueError: shapes that do not match, a count below 1, unknown odds, no key.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import functools, jax
        >>> from approx_attention import exact, importance_sample
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> out = jax.jit(functools.partial(importance_sample, sample_size=16384))(q, k, v, jax.random.key(3))
        >>> bool(abs(out - exact(q, k, v)).max() < 0.1)
        True

    Reference:
        Self-normalised importance sampling; row sampling as in :cite:p:`drineas2006fast`.
    """
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    return attend(q, summarize_importance_sample(k, v, key, sample_size=sample_size, odds=odds, kv_mask=kv_mask))


def summarize_importance_sample(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    sample_size: int = 256,
    odds: Odds = "value_norm",
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """Sample keys with replacement, with masses inverse to their probabilities.

    Arguments are those of `importance_sample`, with keys in scaled space (`approx_attention.methods`).

    Returns:
        A `WeightedKV` of M tokens, of which some may be equal.

    Raises:
        ValueError: shapes that do not match, a count below 1, unknown odds, no key.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import summarize_importance_sample
        >>> sample = summarize_importance_sample(
        ...     jnp.eye(4), jnp.eye(4), jax.random.key(0), sample_size=2, odds="uniform"
        ... )
        >>> sample.mass.tolist()  # 1 / (M p) with p = 1/4
        [2.0, 2.0]

    Reference:
        :cite:p:`drineas2006fast`.
    """
    check_choice("odds", odds, ("uniform", "key_norm", "value_norm", "leverage"))
    sample_size = check_count("sample_size", sample_size)
    k, v = token_sums_inputs(k, v, kv_mask)
    real = real_keys(kv_mask, k.shape[0])
    # The odds cancel on average, so derivatives treat them as constants. Value norms are the default because the
    # optimal odds for a query are proportional to its weights times these norms.
    size = lax.stop_gradient(
        {
            "uniform": lambda: jnp.ones_like(k[:, 0]),
            "key_norm": lambda: jnp.sqrt(squared_norm(k))[:, 0],
            "value_norm": lambda: jnp.sqrt(squared_norm(v))[:, 0],
            "leverage": lambda: leverages(k),
        }[odds]()
    )
    # Adding the mean keeps the odds above half of the uniform ones, and so every mass below 2 n / M. If all sizes are 0
    # the odds are uniform.
    mean = jnp.sum(size, where=real) / jnp.maximum(jnp.sum(real), 1).astype(k.dtype)
    log_odds = jnp.where(real, jnp.log(size + jnp.where(mean > 0, mean, 1)), HIDDEN)
    sample = RowSample.with_odds(check_key("importance_sample", key), sample_size, log_odds)
    # A sketch is applied twice, S^T S, so its weight is the root of 1/(M p). If no key is real, padding is sampled.
    mass = jnp.where(real[sample.chosen], sample.weight**2, 0)
    return WeightedKV(k[sample.chosen], mass[:, None] * v[sample.chosen], mass)
