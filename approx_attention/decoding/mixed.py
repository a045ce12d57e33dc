"""Decoding with different methods for key heads: one cache per group of heads with the same configuration."""

from typing import Any, NamedTuple

import numpy as np
from jax import Array

from approx_attention.decoding.decoder import HeadsCache, HeadsDecoder
from approx_attention.registry import HeadMethods


class MixedCache(NamedTuple):
    """The caches of the groups of heads with the same configuration.

    Attributes:
        groups: one `HeadsCache` per group, in the order of `registry.HeadMethods.groups`.
    """

    groups: tuple[HeadsCache, ...]

    @property
    def length(self) -> Array:
        """The number of tokens so far, as in a `HeadsCache`."""
        return self.groups[0].length


class MixedDecoder:
    """A `HeadsDecoder` with one method per key head, for example from a policy of `evaluation.plan_model`.

    It gives the outputs of ``attention(..., method=methods, is_causal=True)`` on the whole sequence.

    Args:
        methods: a method for each key head.
        num_kv_heads: the number K of key heads.
        **options: arguments of `HeadsDecoder`, the same for all groups of heads.

    Raises:
        ValueError: the number of methods is not that of key heads.
        NotImplementedError: as in `HeadsDecoder`, for the method of any head.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import attention
        >>> from approx_attention.decoding import MixedDecoder
        >>> from approx_attention.registry import HeadMethods
        >>> query, key, value = (jax.random.normal(jax.random.key(i), (1, 40, 2, 8)) for i in range(3))
        >>> mixed = HeadMethods.of(["exact", ("mean_pool", {"num_landmarks": 4, "block_size": 8})])
        >>> decoder = MixedDecoder(mixed, num_kv_heads=2, head_dim=8, max_length=40)
        >>> out, cache = decoder.extend(decoder.init(1), query, key, value)
        >>> bool(jnp.allclose(out, attention(query, key, value, method=mixed, is_causal=True), atol=1e-5))
        True
    """

    def __init__(self, methods: HeadMethods, *, num_kv_heads: int, **options: Any):
        methods.require(num_kv_heads)
        self.methods = methods
        self.groups = [
            (np.array(heads), HeadsDecoder(method, num_kv_heads=len(heads), **options))
            for method, heads in methods.groups
        ]

    def init(self, batch_size: int, rng: Array | None = None, *, ragged: bool = False) -> MixedCache:
        """Make an empty cache.

        Args:
            batch_size: the number B of sequences.
            rng: typed PRNG key, as in `attention`.
            ragged: whether sequences may differ in length.

        Returns:
            The `MixedCache`.
        """
        keys = self.methods.keys(rng)
        return MixedCache(
            tuple(
                decoder.init(batch_size, None if keys is None else keys[heads], ragged=ragged)
                for heads, decoder in self.groups
            )
        )

    def extend(
        self, cache: MixedCache, query: Array, key: Array, value: Array, lengths: Array | None = None
    ) -> tuple[Array, MixedCache]:
        """Append T tokens of every sequence and attend causally at each, like `HeadsDecoder.extend`.

        Args:
            cache: the cache of the tokens before.
            query: ``[B, T, N, D]``.
            key: ``[B, T, K, D]``.
            value: ``[B, T, K, Dv]``.
            lengths: numbers of real tokens, which come first, ``[B]``; only with a ragged cache.

        Returns:
            Outputs ``[B, T, N, Dv]`` in the dtype of ``value``, and the new cache.
        """
        groups = self.methods.split(query, key, value)
        outs, caches = [], []
        for group, held, (_, decoder) in zip(groups, cache.groups, self.groups, strict=True):
            out, new = decoder.extend(held, *group.tokens, lengths)
            outs.append(out)
            caches.append(new)
        return self.methods.join(groups, outs, axis=2), MixedCache(tuple(caches))
