"""Decoding batches with grouped heads equals the causal form of `attention`, for all splits and lengths."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, HeadsDecoder, attention
from tests.cases import settings, unless_slow
from tests.references import having, random_heads

DECODING = having(decode=True)
# Blocks of four, so that sequences of this length end inside a block.
LENGTH, BLOCK, KEY = 18, 4, jax.random.key(7)


@functools.cache
def tensors():
    return tuple(map(np.asarray, random_heads(0, 2, LENGTH, LENGTH, 4, 2)))


def options(name):
    return settings(name, block_size=BLOCK)


def make(name, **more):
    sizes = {"num_kv_heads": 2, "head_dim": 8, "max_length": 32, **({"block_size": BLOCK} if name == "exact" else {})}
    return HeadsDecoder(name, **sizes, **options(name), **more)


def rng_of(name):
    return KEY if METHODS[name].capabilities.needs_key else None


@functools.cache
def whole(name):
    """The causal form over all tokens; a shorter sequence has its first rows, because later tokens change nothing."""
    function = functools.partial(attention, method=name, is_causal=True, **options(name))
    return np.asarray(jax.jit(function)(*tensors(), rng=rng_of(name)))


def start(name, **more):
    return jax.jit(functools.partial(make(name).init, 2, **more))(rng_of(name))


@functools.cache
def extend(name):
    """Compiled once per number of tokens, with the cache donated."""
    return jax.jit(make(name).extend, donate_argnums=0)


@pytest.mark.parametrize("name", [unless_slow(name) for name in DECODING])
def test_any_cut_equals_the_causal_form(name):
    expected = whole(name)
    # A prompt of 14 tokens and then single tokens, and the reverse.
    for cuts in ((0, *range(14, LENGTH + 1)), (*range(5), LENGTH)):
        cache, outs = start(name), []
        for first, stop in itertools.pairwise(cuts):
            out, cache = extend(name)(cache, *(x[:, first:stop] for x in tensors()))
            outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=3e-6)
        assert int(cache.heads.length) == LENGTH


@pytest.mark.parametrize("name", [unless_slow(name) for name in DECODING])
def test_sequences_of_their_own_lengths(name):
    lengths = jnp.array([9, 4])
    # Tokens past the length of a sequence are never read.
    soiled = [np.array(x[:, :9]) for x in tensors()]
    for x in soiled:
        x[1, 4:] = np.nan
    cache = start(name, ragged=True)
    out, cache = extend(name)(cache, *soiled, lengths)
    np.testing.assert_array_equal(np.asarray(out)[1, 4:], 0)
    outs = [out]
    for t in range(9, 15):
        # The second sequence continues at its length.
        step = [np.stack([x[0, t : t + 1], x[1, t - 5 : t - 4]]) for x in tensors()]
        out, cache = extend(name)(cache, *step)
        outs.append(out)
    np.testing.assert_array_equal(cache.heads.length, [15, 10])
    got = np.concatenate(outs, axis=1)
    np.testing.assert_allclose(got[0], whole(name)[0, :15], atol=3e-6)
    np.testing.assert_allclose(np.concatenate([got[1, :4], got[1, 9:]]), whole(name)[1, :10], atol=3e-6)


@pytest.mark.parametrize("name", [name for name in DECODING if not METHODS[name].grows and name != "coreset"])
def test_bytes_do_not_depend_on_the_length(name):
    sizes = {"num_kv_heads": 2, "head_dim": 8}
    decoders = (HeadsDecoder(name, **sizes, max_length=n, **options(name)) for n in (64, 4096))
    short, long = (jax.eval_shape(functools.partial(decoder.init, 2), KEY) for decoder in decoders)
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)


def test_a_donated_cache_is_reused():
    decoder = HeadsDecoder("exact", num_kv_heads=2, head_dim=8, max_length=4096)
    cache = decoder.init(2)
    step = jax.jit(decoder.extend, donate_argnums=0)
    one = [jax.device_put(x[:, :1]) for x in tensors()]
    analysis = step.lower(cache, *one).compile().memory_analysis()
    buffer = cache.heads.past.prefix.k
    step(cache, *one)
    assert buffer.is_deleted()
    assert analysis.alias_size_in_bytes > 2 * 2 * 4096 * 8 * 4 * 2


def test_what_cannot_decode_says_so():
    with pytest.raises(NotImplementedError, match=r"'nystrom' has no running summary .* favor"):
        HeadsDecoder("nystrom", num_kv_heads=2, head_dim=8)
    with pytest.raises(TypeError, match="pass max_length"):
        HeadsDecoder("exact", num_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="max_length must be at least 1, got -3"):
        HeadsDecoder("favor", num_kv_heads=2, head_dim=8, max_length=-3)
    with pytest.raises(TypeError, match="max_length must be an integer known when tracing, got 'x'"):
        HeadsDecoder("favor", num_kv_heads=2, head_dim=8, max_length="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="did you mean 'num_features'"):
        HeadsDecoder("favor", num_kv_heads=2, head_dim=8, num_feature=8)
    with pytest.raises(ValueError, match="is random: pass rng"):
        make("favor").init(2)
    with pytest.raises(NotImplementedError, match="'eva' does not support exclude_local while decoding, got False"):
        make("eva", exclude_local=False)
    with pytest.raises(TypeError, match="no argument 'is_causal'"):
        make("favor", is_causal=False)
    HeadsDecoder("exact", num_kv_heads=2, head_dim=8, max_length=8, implementation="dense")
    cache = make("mean_pool").init(2, ragged=True)
    with pytest.raises(TypeError, match="lengths must be integers, got dtype float32"):
        make("mean_pool").extend(cache, *tensors(), jnp.array([9.0, 4.0]))
    cache = make("mean_pool").init(2)
    with pytest.raises(ValueError, match="ragged=True"):
        make("mean_pool").extend(cache, *tensors(), jnp.array([9, 4]))
    with pytest.raises(ValueError, match="B = 2"):
        make("mean_pool").extend(cache, *(x[:1] for x in tensors()))
