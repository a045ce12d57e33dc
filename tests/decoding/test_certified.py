"""Decoding with a tolerance: no step exceeds it, for any heads, lengths and splits into calls."""

import functools

import jax
import numpy as np
import pytest

from approx_attention import HeadsDecoder
from approx_attention.nnx import ApproxAttention
from tests.references import brute_force, random_heads

# Two sequences, two key heads with two queries each; blocks of 4, so that clusters merge every 4 steps.
BATCH, LENGTH, HEAD_DIM, BLOCK, PROMPT = 2, 44, 8, 4, 14
KEY = jax.random.key(7)
SIZES = {"num_kv_heads": 2, "head_dim": HEAD_DIM, "max_length": LENGTH}
OPTIONS = {"coreset_size": 6, "block_size": BLOCK, "sinks": 2}


@functools.cache
def tensors():
    """The first key head is sharp; the second is flat, with keys in tight clusters."""
    query, key, value = (np.array(x) for x in random_heads(1, BATCH, LENGTH, LENGTH, 4, 2, HEAD_DIM))
    query[:, :, :2] *= 3
    query[:, :, 2:] *= 0.3
    key[:, :, 1] = key[:, np.arange(LENGTH) % 5, 1] + 0.02 * key[:, :, 1]
    value[:, :, 1] = value[:, np.arange(LENGTH) % 5, 1] + 0.02 * value[:, :, 1]
    return query, key, value


@functools.cache
def truth():
    """Causal attention in float64, ``[B, T, N, D]``, and the largest norm of a value so far ``[B, T, K]``."""
    query, key, value = tensors()
    out = np.zeros(query.shape)
    for b, n in np.ndindex(BATCH, 4):
        head = query[b, :, n], key[b, :, n // 2], value[b, :, n // 2]
        out[b, :, n] = brute_force(*head, mask=np.tri(LENGTH, dtype=bool))[0]
    return out, np.maximum.accumulate(np.linalg.norm(value, axis=-1), axis=1)


def decoder(tolerance):
    return HeadsDecoder("coreset", certify=tolerance, **SIZES, **OPTIONS)


start = jax.jit(lambda key: decoder(0.0).init(BATCH, key))
# One program for all tolerances.
extend = jax.jit(lambda tolerance, *args: decoder(tolerance).extend(*args), donate_argnums=1)


def stream(tolerance, stop=LENGTH):
    """Outputs of a prompt and of the tokens after it, one by one, and the final certificate."""
    cache, outs = start(KEY), []
    for rows in (slice(0, PROMPT), *(slice(t, t + 1) for t in range(PROMPT, stop))):
        out, cache = extend(tolerance, cache, *(x[:, rows] for x in tensors()))
        outs.append(out)
    return np.concatenate(outs, axis=1), cache


def error(out):
    """Errors in units of the largest value so far, ``[B, T, N]``."""
    exact, largest = truth()
    return np.linalg.norm(out - exact[:, : out.shape[1]], axis=-1) / np.repeat(largest[:, : out.shape[1]], 2, axis=-1)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 2.0])
def test_no_step_errs_more_than_it_promises(tolerance):
    out, cache = stream(tolerance)
    certificate, steps = jax.tree.map(np.asarray, cache.heads.certificate), LENGTH - PROMPT
    errors = error(out)
    assert errors[:, :PROMPT].max() < 1e-6
    assert int(cache.heads.length) == LENGTH
    np.testing.assert_array_equal(certificate.steps, steps)
    assert (errors[:, PROMPT:].max(axis=1).reshape(BATCH, 2, 2).max(axis=2) <= certificate.promised + 2e-6).all()
    assert (certificate.promised <= tolerance).all()
    if tolerance == 0:
        np.testing.assert_array_equal(certificate.exact_steps, steps)
        assert errors.max() < 1e-6
    elif tolerance == 2:
        np.testing.assert_array_equal(certificate.exact_steps, 0)
        assert errors.max() > 1e-3
    else:
        # Only the head whose keys lie in clusters keeps the tolerance without reading all tokens.
        assert (certificate.exact_steps[:, 0] > steps / 2).all()
        assert (certificate.exact_steps[:, 1] == 0).all()
        assert errors[:, PROMPT:, 2:].max() > 1e-6


def test_without_fallback_it_is_the_folded_coreset():
    plain = HeadsDecoder("coreset", num_kv_heads=2, head_dim=HEAD_DIM, **OPTIONS)
    cache, step, outs = jax.jit(functools.partial(plain.init, BATCH))(KEY), jax.jit(plain.extend), []
    for rows in (slice(0, PROMPT), *(slice(t, t + 1) for t in range(PROMPT, LENGTH))):
        out, cache = step(cache, *(x[:, rows] for x in tensors()))
        outs.append(out)
    np.testing.assert_allclose(stream(2.0)[0][:, PROMPT:], np.concatenate(outs, axis=1)[:, PROMPT:], atol=2e-5)


def test_sequences_of_their_own_lengths():
    tolerance, lengths = 0.05, np.array([PROMPT, 5])
    soiled = [np.array(x[:, :PROMPT]) for x in tensors()]
    for x in soiled:
        x[1, 5:] = np.nan
    cache = jax.jit(lambda key: decoder(tolerance).init(BATCH, key, ragged=True))(KEY)
    out, cache = extend(tolerance, cache, *soiled, lengths)
    np.testing.assert_array_equal(np.asarray(out)[1, 5:], 0)
    outs = [[np.asarray(out)[0, :PROMPT]], [np.asarray(out)[1, :5]]]
    seen = lengths.copy()
    for t in range(26):
        # At every third step the first sequence has no real token.
        more = np.array([t % 3 != 2, True])
        rows = [np.minimum(seen[b], LENGTH - 1) for b in range(BATCH)]
        step = [np.stack([x[b, rows[b]][None] for b in range(BATCH)]) for x in tensors()]
        out, cache = extend(tolerance, cache, *step, more.astype(np.int32))
        for b in range(BATCH):
            if more[b]:
                outs[b].append(np.asarray(out)[b])
            else:
                np.testing.assert_array_equal(np.asarray(out)[b], 0)
        seen = seen + more
    np.testing.assert_array_equal(cache.heads.length, seen)
    whole, _ = stream(tolerance)
    np.testing.assert_array_equal(cache.heads.certificate.steps, np.repeat((seen - lengths)[:, None], 2, axis=1))
    for b, first in enumerate((PROMPT, 5)):
        got = np.concatenate(outs[b])
        exact, largest = truth()
        errors = np.linalg.norm(got - exact[b, : seen[b]], axis=-1) / np.repeat(largest[b, : seen[b]], 2, axis=-1)
        assert errors[:first].max() < 1e-6
        assert errors.max() <= tolerance
    # The first sequence had the same prompt and the same steps.
    np.testing.assert_allclose(np.concatenate(outs[0]), whole[0, : seen[0]], atol=2e-5)


def test_a_step_copies_no_cache():
    roomy = HeadsDecoder("coreset", certify=0.05, **{**SIZES, "max_length": 1024}, **OPTIONS)
    # With many heads, folding one of them takes little memory.
    cache, one = jax.eval_shape(lambda: roomy.init(8, KEY)), [x[:, :1] for x in tensors()]
    many = [np.concatenate([x] * 4) for x in one]
    held = 4 * (cache.heads.tokens.k.size + cache.heads.tokens.value_sum.size)
    analysis = jax.jit(roomy.extend, donate_argnums=0).lower(cache, *many).compile().memory_analysis()
    assert analysis.alias_size_in_bytes > held
    # If the update came after a condition that reads the tokens, all of them would be copied twice.
    assert analysis.temp_size_in_bytes < held
    small = start(KEY)
    extend(0.05, small, *one)
    assert small.heads.tokens.k.is_deleted()


def test_tokens_past_the_room_show_as_nan():
    _, cache = stream(0.05)
    one = [x[:, :1] for x in tensors()]
    out, cache = extend(0.05, cache, *one)
    assert np.isnan(np.asarray(out)).all()
    cache = start(KEY)
    for rows in (slice(0, PROMPT),) * 4:
        _, cache = extend(0.05, cache, *(x[:, rows] for x in tensors()))
    assert np.isnan(np.asarray(extend(0.05, cache, *one)[0])).all()


def test_the_layer_counts_its_exact_steps(models):
    from flax import nnx

    layer = ApproxAttention("coreset", rngs=nnx.Rngs(attention=0), **OPTIONS)
    nnx.jit(lambda layer: layer.init_cache(BATCH, 2, HEAD_DIM, max_length=LENGTH, certify=0.05))(layer)
    call = nnx.jit(lambda layer, *args: layer(*args))
    outs = [call(layer, *(x[:, rows] for x in tensors())) for rows in (slice(0, PROMPT), slice(14, 15))]
    assert error(np.concatenate(outs, axis=1)).max() <= 0.05
    np.testing.assert_array_equal(layer.certificate.steps, 1)
    nnx.jit(lambda layer: layer.init_cache(BATCH, 2, HEAD_DIM))(layer)
    assert layer.certificate is None


def test_what_cannot_be_certified_says_so():
    make = functools.partial(HeadsDecoder, num_kv_heads=2, head_dim=HEAD_DIM)
    with pytest.raises(NotImplementedError, match="'favor' has no running summary with an error bound .* do: coreset"):
        make("favor", certify=0.1, max_length=8)
    with pytest.raises(NotImplementedError, match="does not support streaming with certify, got 'counter'"):
        make("coreset", certify=0.1, max_length=8, streaming="counter", algorithm="halving")
    with pytest.raises(TypeError, match="pass max_length"):
        make("coreset", certify=0.1)
    with pytest.raises(ValueError, match="certify must be finite and not negative, got -1"):
        make("coreset", certify=-1.0, max_length=8)
    with pytest.raises(TypeError, match="certify must be one number"):
        make("coreset", certify="x", max_length=8)  # pyright: ignore[reportArgumentType]
