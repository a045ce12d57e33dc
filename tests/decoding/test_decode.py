"""The cache: lengths, padding, donation, heads, and a bounded size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, Cache, Decoder, exact, favor
from tests.references import brute_force, compiled, random_head, random_heads

SHARED_LENGTH = Cache(past=0, current=0, length=None)


def make_decoder(name="mean_pool", block_size=4, **hyperparameters):
    running = METHODS[name].running(8, jax.random.key(7), **hyperparameters)
    return Decoder(running=running, head_dim=8, value_dim=8, block_size=block_size)


def test_keeping_every_token_decodes_exactly():
    q, k, v = random_head(0, 25, 25)
    whole = np.asarray(compiled(exact)(q, k, v, is_causal=True))
    q, k, v = map(np.asarray, (q, k, v))
    decoder = make_decoder("exact", max_length=32)
    out, cache = jax.jit(decoder.prefill)(decoder.init(), q[:24], k[:24], v[:24])
    cache = jax.jit(decoder.append)(cache, k[24:], v[24:])
    np.testing.assert_allclose(out, whole[:24], atol=2e-6)
    np.testing.assert_allclose(jax.jit(decoder.attend)(cache, q[24:]), whole[24:], atol=2e-6)
    assert int(cache.length) == 25


@pytest.mark.parametrize("name", ["exact", "priority"])
def test_a_capacity_below_one_block(name):
    q, k, v = random_head(26, 20, 20)
    whole = np.asarray(compiled(exact)(q, k, v, is_causal=True))
    options = {"max_length": 19, **({"keys_per_query": 19} if name == "priority" else {})}
    decoder = make_decoder(name, block_size=24, **options)
    out, cache = jax.jit(decoder.prefill)(decoder.init(), q, k, v)
    np.testing.assert_allclose(out, whole, atol=2e-6)
    # More blocks than there is room for show as NaN.
    more, _ = jax.jit(decoder.prefill)(cache, *(np.tile(x, (3, 1)) for x in (q, k, v)))
    assert np.isnan(more[-1]).all()


def test_many_queries_at_one_position():
    q, k, v = random_head(1, 7, 25)
    decoder = make_decoder("exact", max_length=32)
    cache = jax.jit(decoder.append)(decoder.init(), k, v)
    np.testing.assert_allclose(jax.jit(decoder.attend)(cache, q), brute_force(q, k, v)[0], atol=2e-6)


def test_an_empty_cache_answers_zero():
    decoder = make_decoder()
    np.testing.assert_array_equal(jax.jit(decoder.attend)(decoder.init(), jnp.ones((2, 8))), 0)


def test_recent_tokens_are_exact_whatever_the_summary():
    q, k, v = random_head(2, 8, 8)
    decoder = make_decoder(num_landmarks=1)
    out, _ = jax.jit(decoder.prefill)(decoder.init(), q, k, v)
    np.testing.assert_allclose(out, compiled(exact)(q, k, v, is_causal=True), atol=2e-6)


@pytest.mark.parametrize("name", ["favor", "mean_pool", "uniform_sample"])
def test_size_does_not_depend_on_length(name):
    decoder = make_decoder(name)
    cache = jax.eval_shape(decoder.init)
    shapes = jax.tree.map(jnp.shape, cache)
    for length in (1, 5, 64):
        k, v = [jax.ShapeDtypeStruct((length, 8), jnp.float32)] * 2
        cache = jax.eval_shape(decoder.append, cache, k, v)
        assert jax.tree.map(jnp.shape, cache) == shapes


def test_tokens_past_num_real_leave_no_trace():
    q, k, v = random_head(4, 22, 22)
    decoder = make_decoder(num_landmarks=4)
    prefill = jax.jit(decoder.prefill)
    q, k, v = map(np.asarray, (q, k, v))
    expected = np.asarray(prefill(decoder.init(), q, k, v, 22)[0])
    for first in (0, 1, 4, 7, 21):
        soiled = (np.where(np.arange(22)[:, None] < first, x, np.float32(np.nan)) for x in (k, v))
        out, cache = prefill(decoder.init(), q, *soiled, first)
        np.testing.assert_array_equal(np.asarray(out)[first:], 0)
        assert int(cache.length) == first
        # The remaining tokens, padded to one length.
        rest, _ = prefill(cache, *(np.roll(x, -first, axis=0) for x in (q, k, v)), 22 - first)
        np.testing.assert_allclose(np.concatenate([out[:first], rest[: 22 - first]]), expected, atol=2e-6)


def test_sequences_of_different_lengths_in_a_batch():
    tensors = [np.stack(x) for x in zip(*(random_head(i, 17, 17) for i in range(3)), strict=True)]
    q, k, v = tensors
    decoder, lengths = make_decoder(num_landmarks=4), jnp.array([3, 17, 8])
    caches = jax.jit(jax.vmap(lambda _: decoder.init()))(lengths)
    _, caches = jax.jit(jax.vmap(decoder.prefill))(caches, q, k, v, lengths)
    np.testing.assert_array_equal(caches.length, lengths)
    caches = jax.jit(jax.vmap(decoder.append))(caches, k[:, :1], v[:, :1])
    outs = jax.jit(jax.vmap(decoder.attend))(caches, q[:, :1])
    append, attend = jax.jit(decoder.append), jax.jit(decoder.attend)
    for i, length in enumerate([3, 17, 8]):
        alone = append(decoder.init(), k[i, :length], v[i, :length])
        alone = append(alone, k[i, :1], v[i, :1])
        np.testing.assert_allclose(np.asarray(outs)[i], attend(alone, q[i, :1]), atol=2e-6)


def test_grouped_heads_share_one_cache_and_one_length():
    query, key, value = (np.asarray(x)[0] for x in random_heads(5, 1, 13, 13, 4, 2))
    decoder = make_decoder("favor", num_features=8)
    caches = jax.jit(jax.vmap(decoder.init, out_axes=SHARED_LENGTH, axis_size=2))()
    append = jax.jit(jax.vmap(decoder.append, in_axes=(SHARED_LENGTH, 1, 1), out_axes=SHARED_LENGTH), donate_argnums=0)
    answer = jax.jit(jax.vmap(decoder.attend, in_axes=(SHARED_LENGTH, 0)))
    for t in range(13):
        caches = append(caches, key[t : t + 1], value[t : t + 1])
    out = np.asarray(answer(caches, query[12].reshape(2, 2, 8))).reshape(4, 8)
    for n in range(4):
        own = (jax.device_put(x) for x in (query[:, n], key[:, n // 2], value[:, n // 2]))
        expected = compiled(favor)(*own, jax.random.key(7), num_features=8, is_causal=True, block_size=4)
        expected = np.asarray(expected)[12]
        np.testing.assert_allclose(out[n], expected, atol=2e-6)


def test_a_donated_cache_is_reused():
    decoder = make_decoder("exact", max_length=4096)
    _, k, v = random_head(6, 1, 1)
    step = jax.jit(decoder.append, donate_argnums=0)
    cache = decoder.init()
    buffer = cache.past.prefix.k
    cache = step(cache, k, v)
    assert buffer.is_deleted()
    analysis = step.lower(cache, k, v).compile().memory_analysis()
    assert analysis.alias_size_in_bytes > 4096 * 8 * 4 * 2


def test_float64_cache(x64):
    q, k, v = random_head(7, 9, 9, dtype=jnp.float64)
    running = METHODS["exact"].running(8, max_length=16)
    decoder = Decoder(running=running, head_dim=8, value_dim=8, block_size=4, dtype=jnp.float64, scale=0.7)
    out, _ = jax.jit(decoder.prefill)(decoder.init(), q, k, v)
    expected, _ = brute_force(q, k, v, scale=0.7, mask=np.tri(9, dtype=bool))
    np.testing.assert_allclose(out, expected, atol=1e-13)


def test_half_precision_tokens_are_summarised_in_float32():
    q, k, v = random_head(8, 30, 30, dtype=jnp.bfloat16)
    decoder = make_decoder(num_landmarks=4)
    out, cache = jax.jit(decoder.prefill)(decoder.init(), q, k, v)
    attend = jax.jit(decoder.attend)
    # Outputs have the dtype of the values in the cache, for queries of any dtype.
    assert out.dtype == attend(cache, q[:1]).dtype == attend(cache, q[:1].astype(jnp.float32)).dtype
    assert out.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating))
