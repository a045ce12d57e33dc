"""Feature moments of growing prefixes, block by block or for many prefixes by one matrix product."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core.causal import RunningSummary
from approx_attention.core.features import FeatureMap
from approx_attention.core.softmax import kernel_state
from approx_attention.core.summaries import FeatureMoments
from approx_attention.kernels import even_split, finite_peak, merge, out_of_blocks, pad_rows, sums_so_far

# Number of parts whose prefix sums are computed by one product, whose weight matrix has this number squared entries.
MOST_PARTS = 128


def running_moments(features: FeatureMap) -> RunningSummary:
    """Make a running summary that adds the feature moments of each block.

    Args:
        features: the feature map, such as `PositiveFeatures`.

    Returns:
        The `RunningSummary` whose summary is a `FeatureMoments`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.core import PositiveFeatures, running_moments
        >>> running = running_moments(PositiveFeatures(jax.random.normal(jax.random.key(0), (16, 4))))
        >>> empty, ones = running.init(2, jnp.float32), jnp.ones((3, 4))
        >>> moments = running.append(empty, jnp.int32(0), ones, ones[:, :2], jnp.ones(3, bool))
        >>> running.read(moments).value_sum.shape
        (16, 2)
    """

    # The map is not part of the state: it never changes, and donating a cache must not donate its arrays.
    def bare(moments: FeatureMoments) -> Any:
        return dataclasses.replace(moments, features=None)

    def read(moments: Any) -> FeatureMoments:
        return dataclasses.replace(moments, features=features)

    def of_block(k: Array, v: Array, kv_mask: Array) -> Any:
        return bare(FeatureMoments.of_tokens(features, k, v, kv_mask))

    def added(a: Any, b: Any) -> Any:
        return bare(merge(read(a), read(b)))

    def append_all(moments: Any, _: Array, k: Array, v: Array, kv_mask: Array) -> Any:
        parts = jax.vmap(of_block)(k, v, kv_mask)

        def run(moments: Any, parts: Any) -> tuple[Any, Any]:
            states = _moments_so_far(jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), moments, parts))
            return tuple(jax.tree.map(lambda x, part=part: x[part], states) for part in (-1, slice(1, None)))

        count = kv_mask.shape[0]
        runs, size = even_split(count, MOST_PARTS)
        padded = jax.tree.map(lambda x: pad_rows(x, runs * size - count).reshape(runs, size, *x.shape[1:]), parts)
        _, states = lax.scan(run, moments, padded)
        states = jax.tree.map(lambda x: out_of_blocks(x, count), states)
        return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), moments, states)

    return RunningSummary(
        init=lambda value_dim, dtype: bare(FeatureMoments.empty(features, value_dim, dtype)),
        append=lambda moments, _, k, v, kv_mask: added(moments, of_block(k, v, kv_mask)),
        read=read,
        append_all=append_all,
    )


def running_kernel_moments(features: FeatureMap) -> RunningSummary:
    """Make a running summary for a kernel other than that of softmax.

    Nearby tokens are weighted by the same kernel, because its sums cannot be added to those of softmax.

    Args:
        features: the feature map, whose inner products are nonnegative.

    Returns:
        The `RunningSummary` whose summary is a `FeatureMoments`.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.core import ReLUFeatures, running_kernel_moments
        >>> running = running_kernel_moments(ReLUFeatures(jnp.eye(2), offset=0.0))
        >>> q, k, bias = jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.zeros((1, 2))
        >>> running.near(q, k, jnp.eye(2), bias).out.tolist()  # kernels 1 and 3
        [[0.25, 0.75]]
    """
    return running_moments(features)._replace(near=lambda q, k, v, bias: kernel_state(features, q, k, v, bias))


def _moments_so_far(parts: FeatureMoments) -> FeatureMoments:
    r"""The moments of the first i stacked parts, for each i, by one product.

    .. math:: \mathrm{sum}_i = \sum_{a \le i} e^{c_a - C_i}\, \mathrm{sum}_a, \qquad C_i = \max_{a \le i} c_a.
    """
    # With one log-scale for all prefixes, a later part could make an earlier one underflow.
    so_far = jnp.tri(parts.mass.shape[0], dtype=bool)
    log_scale = jnp.max(jnp.where(so_far[:, :, None], parts.log_scale[None], -jnp.inf), axis=1)
    shift = jnp.where(so_far[:, :, None], parts.log_scale[None] - finite_peak(log_scale)[:, None], -jnp.inf)
    value_sum, mass = (sums_so_far(x, jnp.exp(shift)) for x in (parts.value_sum, parts.mass))
    return dataclasses.replace(parts, value_sum=value_sum, mass=mass, log_scale=log_scale)
