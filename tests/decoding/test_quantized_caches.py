"""Quantised caches decode exactly like the rounded tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import Cache, Decoder, HeadsDecoder, WeightedKV, compress_cache, exact, quantize
from approx_attention.core import quantized_bytes, summary_bytes
from approx_attention.coresets import running_coreset
from approx_attention.decoding import running_compressed, token_budget
from approx_attention.methods import running_exact
from tests.references import brute_force, compiled, random_head, random_heads, relative_error

exact, quantize = compiled(exact, quantize)
dequantized = jax.jit(lambda small: small.dequantized())
KEY, LENGTH, BLOCK = jax.random.key(0), 44, 8
both_bits = pytest.mark.parametrize("bits", [8, 4])


def decoder_of(bits, max_length=48):
    running = running_exact(16, max_length=max_length)
    return Decoder(running=running, head_dim=16, value_dim=6, block_size=BLOCK, scale=1.0, cache_bits=bits)


@pytest.fixture(scope="module")
def head():
    return tokens()


@functools.cache
def tokens():
    # Each slice of a JAX array would be a program.
    return [np.asarray(x) for x in random_head(50, LENGTH, LENGTH, 16, 6, spread=0.5)]


@pytest.fixture(params=[8, 4])
def decoded(request):
    return decoded_with(request.param)


@functools.cache  # not a fixture of the module, which would be made outside of a test and trace all forms
def decoded_with(bits):
    """Outputs of a quantised decoder, of a prompt and then one by one, and its cache."""
    q, k, v = tokens()
    decoder = decoder_of(bits)
    out, cache = jax.jit(lambda *tokens: decoder.prefill(decoder.init(), *tokens))(q[:21], k[:21], v[:21])
    step = jax.jit(lambda cache, q, k, v: (new := decoder.append(cache, k, v), decoder.attend(new, q)))
    outs = [out]
    for i in range(21, LENGTH):
        cache, out = step(cache, q[i : i + 1], k[i : i + 1], v[i : i + 1])
        outs.append(out)
    return bits, np.concatenate(outs), cache


def test_older_tokens_are_rounded_once_and_recent_ones_not_at_all(decoded, head):
    bits, out, _ = decoded
    q, k, v = head
    of_tokens = jax.jit(WeightedKV.of_tokens)
    blocks = [quantize(of_tokens(k[i : i + BLOCK], v[i : i + BLOCK]), bits=bits) for i in range(0, 40, BLOCK)]
    wide = [dequantized(block) for block in blocks]
    rounded_k, rounded_v = (np.concatenate([getattr(x, name) for x in wide]) for name in ("k", "value_sum"))
    for t in range(LENGTH):
        first = max(0, t // BLOCK - 1) * BLOCK  # the current block and the one before it are exact
        keys = np.concatenate([rounded_k[:first], k[first : t + 1]])
        values = np.concatenate([rounded_v[:first], v[first : t + 1]])
        np.testing.assert_allclose(out[t], brute_force(q[t : t + 1], keys, values, scale=1)[0][0], atol=3e-6)
    error = relative_error(out, exact(*map(jax.device_put, head), is_causal=True, scale=1.0))
    assert 0 < error < {8: 0.005, 4: 0.1}[bits]


def test_a_cache_holds_what_its_bits_say(decoded):
    bits, _, cache = decoded
    assert summary_bytes(cache.past.prefix) == 6 * quantized_bytes(BLOCK, 16, 6, bits=bits)
    assert cache.past.before.k.dtype == cache.current.v.dtype == jnp.float32
    # More tokens than there is room for give NaN, so that no token is lost silently.
    decoder = decoder_of(bits, 16)

    @jax.jit
    def answer(*tokens):
        _, cache = decoder.prefill(decoder.init(), *tokens)
        return decoder.attend(cache, jnp.ones((1, 16)))

    assert np.isnan(answer(*(np.ones((40, size), np.float32) for size in (16, 16, 6)))).all()


def test_prefixes_are_the_same_made_at_once(head):
    _, k, v = head
    running = decoder_of(4)._held
    blocks = k[:40].reshape(5, BLOCK, 16), v[:40].reshape(5, BLOCK, 6), jnp.ones((5, BLOCK), bool)

    @jax.jit
    def in_turn(blocks):
        held = running.init(6, jnp.float32)
        for i in range(3):
            held = running.append(held, jnp.asarray(i * BLOCK), *(x[i] for x in blocks))
        return held

    held, at = in_turn(blocks), jax.jit(lambda blocks: running.of_sequence(*blocks)(jnp.asarray(3)))(blocks)
    assert not at.mass[3:].any()
    for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(at), strict=True):
        np.testing.assert_allclose(a[:3], b[:3], rtol=1e-6)


def test_heads_of_sequences_of_their_own_length():
    query, key, value = random_heads(51, 2, 30, 30, 2, 1, 16)
    decoder = HeadsDecoder("exact", num_kv_heads=1, head_dim=16, max_length=30, block_size=BLOCK, cache_bits=8)
    query, key, value = map(np.asarray, (query, key, value))
    cache, lengths = jax.jit(lambda: decoder.init(2, ragged=True))(), np.array([30, 19], np.int32)
    # NaN after the last token of the shorter sequence.
    late = np.arange(30)[None, :, None, None] >= lengths[:, None, None, None]
    exported = jax.export.export(jax.jit(decoder.extend))(cache, query, key, value, lengths)
    soiled = (np.where(late, np.float32(np.nan), x) for x in (query, key, value))
    out, new = exported.call(cache, *soiled, lengths)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    out = np.asarray(out)
    for i, length in enumerate(lengths.tolist()):
        for head in range(2):
            expected, _ = brute_force(query[i, :, head], key[i, :, 0], value[i, :, 0], mask=np.tri(30, dtype=bool))
            assert relative_error(out[i, :length, head], expected[:length]) < 0.005
    assert not out[1, 19:].any()


def test_a_compressed_prefix_in_few_bits_decodes_on(head):
    q, k, v = head
    cache = jax.jit(decoder_of(None).init)()
    put = jax.jit(lambda room, k, v: jax.tree.map(lambda x, y: x.at[:24].set(y), room, WeightedKV.of_tokens(k, v)))
    prefix = put(cache.past.prefix, k[:24], v[:24])
    block = (
        type(cache.current)(k[24:32], v[24:32], jnp.ones(8, bool)),
        type(cache.current)(k[32:40], v[32:40], jnp.ones(8, bool)),
    )
    cache = Cache(cache.past._replace(before=block[0], prefix=prefix), block[1], jnp.asarray(40, jnp.int32))
    # There is room for all tokens, so only rounding differs.
    small = jax.jit(functools.partial(compress_cache, budget=48, coreset_size=8, bits=8))(cache, KEY)
    running = running_compressed(16, KEY, budget=48, coreset_size=8, bits=8)
    after = Decoder(running=running, head_dim=16, value_dim=6, block_size=BLOCK, scale=1.0)
    assert jax.tree.structure(small) == jax.tree.structure(jax.eval_shape(after.init))
    fixed = small.past.prefix.fixed
    assert summary_bytes(fixed) == quantized_bytes(48, 16, 6, bits=8) + fixed.value_range.nbytes
    small = jax.jit(after.append)(small, k[40:41], v[40:41])
    expected, _ = brute_force(q[40:41], k[:41], v[:41], scale=1)
    assert 0 < relative_error(jax.jit(after.attend)(small, q[40:41]), expected) < 0.01


@both_bits
def test_a_budget_of_bytes_is_what_fits(bits):
    for num_bytes in (600, 5000, 8 * quantized_bytes(128, 64, 9, bits=bits), 123_457, 10**7 + 1):
        count = token_budget(num_bytes, 64, 9, bits=bits)
        assert quantized_bytes(count, 64, 9, bits=bits) <= num_bytes < quantized_bytes(count + 1, 64, 9, bits=bits)
    count = token_budget(123_457, 64, 9, bits=bits)
    one = jax.eval_shape(functools.partial(quantize, bits=bits), WeightedKV.empty(count, 64, 9))
    assert summary_bytes(one) == quantized_bytes(count, 64, 9, bits=bits) <= 123_457
    assert token_budget(10**400, 64, 9, bits=bits) > 10**397


def test_a_summary_that_changes_at_every_block_is_not_rounded():
    sizes = {"head_dim": 4, "value_dim": 4, "block_size": 4}
    with pytest.raises(NotImplementedError, match="cache_bits needs a summary that keeps tokens unchanged"):
        Decoder(running=running_coreset(4, KEY, coreset_size=8), cache_bits=8, **sizes)
    decoder = HeadsDecoder("favor", num_kv_heads=1, head_dim=4, num_features=4, block_size=4, cache_bits=8)
    with pytest.raises(NotImplementedError, match="cache_bits needs"):
        decoder.init(1, KEY)
    for make in (
        lambda bits: Decoder(running=running_exact(4, max_length=8), cache_bits=bits, **sizes),
        lambda bits: HeadsDecoder("exact", num_kv_heads=1, head_dim=4, max_length=8, cache_bits=bits),
    ):
        with pytest.raises(ValueError, match="cache_bits must be 8 or 4, got 3"):
            make(3)
    for call in (
        lambda bits: running_compressed(4, KEY, budget=8, bits=bits),
        lambda bits: token_budget(2**20, 4, 4, bits=bits),
    ):
        with pytest.raises(ValueError, match="bits must be 8 or 4, got 16"):
            call(16)
