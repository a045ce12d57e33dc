"""Baselines that every approximation must beat: the mean of the values, and uniform sampling."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    RealFirst,
    RunningSummary,
    WeightedKV,
    attend,
    check_count,
    check_counts,
    check_key,
    check_noise,
    check_tokens,
    head_inputs,
    out_of_blocks,
    output_or_state,
    ranks,
    real_keys,
    state_by_summary,
    token_sums_inputs,
)


@output_or_state
def mean_value(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    is_causal: bool = False,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""The mean of the visible values: attention with all logits set to 0.

    .. math:: \mathrm{out}_t = \frac{1}{n_t} \sum_{j \text{ visible}} v_j

    The log-normaliser is :math:`\log n_t`. Only the shapes of queries and keys matter. The scale is checked but has no
    effect.

    Shared arguments: see `approx_attention.methods`.

    Raises:
        ValueError: shapes that do not match.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import mean_value
        >>> v = jnp.array([[1.0], [2.0], [6.0]])
        >>> mean_value(v, v, v, is_causal=True)[:, 0].tolist()
        [1.0, 1.5, 3.0]
    """
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    if is_causal:
        # Running sums, read at the last visible key: queries after the last key see all keys.
        counts = jnp.ones(v.shape[0], v.dtype) if kv_mask is None else kv_mask.astype(v.dtype)
        last = jnp.minimum(jnp.arange(q.shape[0]), k.shape[0] - 1)
        value_sum, count = jnp.cumsum(v, axis=0)[last], jnp.cumsum(counts)[last]
        # A query that sees no key gives 0, not 0/0; its log-normaliser is the -inf of log 0.
        safe_count = jnp.maximum(count, jnp.ones_like(count))
        state = AttentionState(value_sum / safe_count[:, None], jnp.log(count))
    else:
        state = attend(jnp.zeros_like(q), summarize_mean_value(k, v, kv_mask=kv_mask))
    return state


def summarize_mean_value(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """Summarise all keys by one token at the origin, whose logit is 0 for every query.

    Shared arguments: see `approx_attention.methods`.

    Returns:
        A `WeightedKV` of one token, with the sum of all values and the number of real keys as its mass.

    Raises:
        ValueError: shapes that do not match.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import summarize_mean_value
        >>> v = jnp.array([[1.0], [3.0]])
        >>> token = summarize_mean_value(v, v)
        >>> token.values.tolist(), token.mass.tolist()
        ([[2.0]], [2.0])
    """
    check_tokens(k, v, kv_mask)
    tokens = WeightedKV.of_tokens(jnp.zeros_like(k), v, kv_mask)
    return WeightedKV(tokens.k[:1], jnp.sum(tokens.value_sum, axis=0)[None], jnp.sum(tokens.mass)[None])


@output_or_state
def uniform_sample(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    sample_size: int = 256,
    noise: Float[Array, " S"] | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Attention over a uniform sample of M of the n real keys; each sampled key has mass n/M.

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in I} e^{s\, q_t \cdot k_j} v_j}{\sum_{j \in I} e^{s\, q_t \cdot k_j}},
              \qquad I \text{ uniform among the subsets of } M \text{ real keys.}

    The normaliser and the numerator are unbiased; their ratio is not.

    Shared arguments: see `approx_attention.methods`.

    Args:
        sample_size: the number M of keys in the sample; with M >= S the output is exact.
        noise: a priority per key, ``[S]``; the M keys of largest priority are the sample. By default uniform noise.

    Raises:
        ValueError: shapes that do not match, counts below 1, neither key nor noise.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, uniform_sample
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> out = uniform_sample(q, k, v, jax.random.key(3), sample_size=6)
        >>> bool(jnp.allclose(out, exact(q, k, v), atol=1e-6))
        True
    """

    def running(head_dim: int) -> RunningSummary:
        check_noise(noise, k.shape[0])
        # The causal form moves real keys to the front; their priorities must move with them.
        moved = noise if noise is None or kv_mask is None else RealFirst.of(kv_mask).front(noise)
        return running_uniform_sample(head_dim, key, sample_size=sample_size, noise=moved)

    return state_by_summary(
        q,
        k,
        v,
        functools.partial(summarize_uniform_sample, key=key, sample_size=sample_size, noise=noise),
        running,
        is_causal=is_causal,
        block_size=block_size,
        kv_mask=kv_mask,
        scale=scale,
    )


def summarize_uniform_sample(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    sample_size: int = 256,
    noise: Float[Array, " S"] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """Sample keys uniformly without replacement, with equal masses that sum to the number of keys.

    Arguments are those of `uniform_sample`, with keys in scaled space (`approx_attention.methods`).

    Returns:
        A `WeightedKV` of min(M, S) tokens; if fewer than M keys are real, the other tokens have mass 0.

    Raises:
        ValueError: shapes that do not match, a count below 1, neither key nor noise.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax
        >>> from approx_attention import summarize_uniform_sample
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 4)) for i in range(2))
        >>> summary = summarize_uniform_sample(k, v, jax.random.key(2), sample_size=16)
        >>> summary.k.shape, float(summary.mass.sum())
        ((16, 4), 64.0)
    """
    check_tokens(k, v, kv_mask)
    sample_size = min(check_count("sample_size", sample_size), k.shape[0])
    check_noise(noise, k.shape[0])
    if noise is None:
        noise = jax.random.uniform(check_key("uniform_sample", key), (k.shape[0],), jnp.float32)
        # Noise goes by rank among the real keys, so that padding does not change the sample.
        noise = noise if kv_mask is None else noise[ranks(kv_mask, k.shape[0])]
    real = real_keys(kv_mask, k.shape[0])
    k, v = token_sums_inputs(k, v, kv_mask)
    return _Sample.empty(sample_size, k.shape[-1], v.shape[-1], k.dtype).offer(noise, k, v, real).tokens()


def running_uniform_sample(
    head_dim: int, key: Array | None = None, *, sample_size: int = 256, noise: Float[Array, " S"] | None = None
) -> RunningSummary:
    """A uniform sample of a growing prefix: the keys with the largest priorities so far.

    Arguments are those of `uniform_sample`, for keys in scaled space (`approx_attention.methods`), and ``head_dim``,
    the number D of channels. With ``noise [S]`` the outputs of a prefix longer than S are NaN, since a compiled program
    cannot raise an error.

    Returns:
        The `RunningSummary`, for a `Decoder`.

    Raises:
        ValueError: counts below 1; for the first block, neither key nor noise.
        TypeError: noise that is not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.methods import running_uniform_sample
        >>> running = running_uniform_sample(1, sample_size=2, noise=jnp.array([0.1, 0.9, 0.5, 0.7]))
        >>> k, prefix = jnp.arange(4.0)[:, None], running.init(1, jnp.float32)
        >>> for start in (0, 2):
        ...     block = k[start : start + 2]
        ...     prefix = running.append(prefix, jnp.int32(start), block, block, jnp.ones(2, bool))
        >>> sample = running.read(prefix)
        >>> sorted(sample.k[:, 0].tolist()), sample.mass.tolist()
        ([1.0, 3.0], [2.0, 2.0])
    """
    head_dim, sample_size = check_counts(head_dim=head_dim, sample_size=sample_size)
    check_noise(noise)

    def priorities(start: Array | int, count: int) -> tuple[Array, Array]:
        """The priorities of a block of tokens from ``start`` on, and which of them lie beyond the noise."""
        if noise is None:
            block_key = jax.random.fold_in(check_key("uniform_sample", key), start)
            return jax.random.uniform(block_key, (count,), jnp.float32), jnp.zeros(count, bool)
        place = start + jnp.arange(count, dtype=jnp.int32)
        # Keys beyond the noise win every comparison, so that their NaN stays in the sample.
        beyond = place >= noise.shape[0]
        return jnp.where(beyond, jnp.inf, noise[jnp.minimum(place, noise.shape[0] - 1)]), beyond

    def lost(v: Array, beyond: Array) -> Array:
        return jnp.where(beyond[..., None], jnp.nan, v)

    def append(sample: "_Sample", start: Array, k: Array, v: Array, kv_mask: Array) -> "_Sample":
        priority, beyond = priorities(start, k.shape[0])
        return sample.offer(priority, k, lost(v, kv_mask & beyond), kv_mask)

    def init(value_dim: int, dtype: Any) -> "_Sample":
        return _Sample.empty(sample_size, head_dim, value_dim, dtype)

    def of_sequence(k: Array, v: Array, kv_mask: Array) -> Callable[[Array], "_Sample"]:
        num_blocks, block_size = kv_mask.shape
        starts = jnp.arange(num_blocks, dtype=jnp.int32) * block_size
        priority, beyond = jax.vmap(lambda start: priorities(start, block_size))(starts)
        return _samples_of_prefixes(sample_size, priority, k, lost(v, kv_mask & beyond), kv_mask)

    return RunningSummary(init, append, read=lambda sample: sample.tokens(), of_sequence=of_sequence)


def _samples_of_prefixes(
    sample_size: int, priority: Array, k: Array, v: Array, kv_mask: Array
) -> Callable[[Array], "_Sample"]:
    """The samples of all prefixes of the blocks ``k [n, b, D]``, by an associative scan over places."""
    num_blocks, block_size = kv_mask.shape
    priority = jnp.where(kv_mask, lax.stop_gradient(priority).astype(k.dtype), -jnp.inf)
    # Placeholders with the priority of a free place, one for each column of the sample.
    free = max(0, sample_size - block_size)
    priority = jnp.pad(priority, ((0, 0), (0, free)), constant_values=-jnp.inf)
    place = jnp.arange(num_blocks * block_size, dtype=jnp.int32).reshape(num_blocks, block_size)
    place = jnp.pad(place, ((0, 0), (0, free)))

    def largest(priority: Array, place: Array) -> tuple[Array, Array]:
        priority, chosen = lax.top_k(priority, sample_size)
        return priority, jnp.take_along_axis(place, chosen, axis=-1)

    def merged(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return largest(*(jnp.concatenate(parts, axis=-1) for parts in zip(a, b, strict=True)))

    chosen = lax.associative_scan(merged, largest(priority, place))
    offered = jnp.cumsum(jnp.sum(kv_mask, axis=1, dtype=k.dtype))
    k, v = out_of_blocks((k, v))
    return jax.tree_util.Partial(_sample_after, *chosen, offered, k, v)


def _sample_after(priority: Array, place: Array, offered: Array, k: Array, v: Array, count: Array) -> "_Sample":
    """The sample after ``count`` blocks, from the samples after each block."""
    last = jnp.minimum(jnp.maximum(count, 1), offered.shape[0]) - 1
    priority = jnp.where(count > 0, priority[last], -jnp.inf)
    taken = (priority > -jnp.inf)[:, None]
    k, v = (jnp.where(taken, x[place[last]], 0) for x in (k, v))
    return _Sample(priority, k, v, jnp.where(count > 0, offered[last], 0))


class _Sample(NamedTuple):
    """The M keys of largest priority among all so far; priority ``-inf`` marks a free place."""

    priority: Array
    k: Array
    v: Array
    num_offered: Array

    @classmethod
    def empty(cls, sample_size: int, head_dim: int, value_dim: int, dtype: Any) -> "_Sample":
        room = WeightedKV.empty(sample_size, head_dim, value_dim, dtype)
        return cls(room.mass - jnp.inf, room.k, room.value_sum, jnp.zeros((), dtype))

    def offer(self, priority: Array, k: Array, v: Array, kv_mask: Array) -> "_Sample":
        priority = jnp.where(kv_mask, priority.astype(k.dtype), -jnp.inf)
        # The choice has no gradient; the chosen keys and values have.
        candidates = jnp.concatenate([self.priority, lax.stop_gradient(priority)])
        priority, chosen = lax.top_k(candidates, self.priority.shape[0])
        k, v = jnp.concatenate([self.k, k])[chosen], jnp.concatenate([self.v, v])[chosen]
        return _Sample(priority, k, v, self.num_offered + jnp.sum(kv_mask, dtype=k.dtype))

    def tokens(self) -> WeightedKV:
        # Each token of the sample has mass n/M, or mass 1 if there are fewer than M tokens.
        taken = self.priority > -jnp.inf
        mass = jnp.where(taken, self.num_offered / jnp.maximum(jnp.sum(taken), 1).astype(self.k.dtype), 0)
        return WeightedKV(self.k, self.v * mass[:, None], mass)
