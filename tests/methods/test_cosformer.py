"""cosFormer against its kernel in float64: positions, padding, causal form, decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import Decoder, cosformer
from approx_attention.methods import place_tokens, running_cosformer
from tests.methods.case import Case
from tests.references import causal_mask, random_head, without_padding

CASES = {
    "cosformer": Case(
        scale_cancels="its kernel is homogeneous: a scale is a factor of all weights",
        # After rectification a token may have no channel left, and then does not see itself.
        diagonal_inputs=lambda q, k: (jnp.abs(q), jnp.abs(k)),
        # Distances are relative to the length.
        any_length=lambda length: {"max_length": length},
        changes={"max_length": 60},
        without_effect=("block_size",),
    ),
}


def kernel_attention(q, k, v, *, max_length=None, seen=None):
    """The definition, pair by pair, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    max_length = max(len(q), len(k)) if max_length is None else max_length
    distance = np.arange(len(q))[:, None] - np.arange(len(k))[None, :]
    weights = np.maximum(q, 0) @ np.maximum(k, 0).T * np.cos(np.pi * distance / (2 * max_length))
    weights = weights if seen is None else np.where(seen, weights, 0)
    total = weights.sum(1, keepdims=True)
    return np.divide(weights @ v, total, out=np.zeros((len(q), v.shape[1])), where=total != 0), total[:, 0]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (37, 37), (5, 30), (30, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernel_as_it_is_defined(num_queries, num_keys, is_causal):
    q, k, v = random_head(0, num_queries, num_keys, 8, 5)
    kv_mask = np.arange(num_keys) % 5 != 2
    for max_length in (None, 50):
        options = {"max_length": max_length, "is_causal": is_causal, "block_size": 4, "scale": 0.7}
        function = jax.jit(functools.partial(cosformer, **options, return_state=True))
        for mask in (np.ones(num_keys, bool), kv_mask):
            state = function(q, k, v, kv_mask=mask)
            *tokens, rows = without_padding(*map(np.asarray, (q, k, v)), mask, is_causal)
            seen = causal_mask(len(tokens[0]), len(tokens[1])) if is_causal else None
            length = max_length or (mask.sum() if num_queries == num_keys else max(num_queries, mask.sum()))
            out, total = kernel_attention(*tokens, max_length=length, seen=seen)
            np.testing.assert_allclose(np.asarray(state.out)[rows], out, atol=1e-5)
            np.testing.assert_allclose(np.exp(np.asarray(state.lse)[rows]), 0.7 * total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_more_keys_than_a_block_of_features(is_causal, x64):
    q, k, v = random_head(1, 1100, 1100, 3, 2, jnp.float64)
    seen = causal_mask(1100, 1100) if is_causal else None
    out = jax.jit(functools.partial(cosformer, is_causal=is_causal))(q, k, v)
    np.testing.assert_allclose(out, kernel_attention(q, k, v, seen=seen)[0], atol=1e-11)


def test_no_approximation_of_softmax():
    q, k, v = random_head(2, 12, 12)
    # Scaling the queries sharpens a softmax, but leaves this kernel's output unchanged.
    function = jax.jit(cosformer)
    plain = np.asarray(function(q, k, v, scale=8**-0.5))
    np.testing.assert_allclose(function(100 * np.asarray(q), k, v, scale=8**-0.5), plain, atol=1e-5)
    np.testing.assert_allclose(function(q, k, v, scale=9.0), plain, atol=1e-5)
    # Without distances it is linear attention of rectified vectors.
    weights = np.maximum(q, 0) @ np.maximum(k, 0).T
    linear = weights @ np.asarray(v) / weights.sum(1, keepdims=True)
    far = jax.jit(functools.partial(cosformer, max_length=10**6))(q, k, v)
    np.testing.assert_allclose(far, linear, atol=1e-5)
    assert np.abs(plain - linear).max() > 1e-2


def test_only_distances_matter():
    q, k, v = random_head(3, 20, 20)
    function = jax.jit(functools.partial(cosformer, max_length=24))
    # Removing the padding moves the remaining tokens, but keeps the distances between them.
    late = np.asarray(function(q, k, v, kv_mask=np.arange(20) >= 7))[7:]
    alone = kernel_attention(*(np.asarray(x)[7:] for x in (q, k, v)), max_length=24)[0]
    np.testing.assert_allclose(late, alone, atol=1e-5)
    early = np.asarray(function(q, k, v, kv_mask=np.arange(20) < 15))[:15]
    alone = kernel_attention(*(np.asarray(x)[:15] for x in (q, k, v)), max_length=24)[0]
    np.testing.assert_allclose(early, alone, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_kernel_of_nothing_but_zeros_gives_zero(is_causal):
    q, k, v = (np.array(x) for x in random_head(4, 12, 12))
    q[5] = -np.abs(q[5])
    real = np.ones(12, bool)
    out, gradients = out_and_gradients(q, k, v, real, is_causal)
    np.testing.assert_array_equal(out[5], 0)
    assert np.all(np.abs(out[6:]).max(1) > 0)
    assert all(np.all(np.isfinite(x)) for x in gradients)
    np.testing.assert_array_equal(gradients[0][5], 0)
    # The normaliser may be arbitrarily small, because there is no epsilon.
    small = np.float32(1e-9)
    np.testing.assert_allclose(out_and_gradients(small * q, small * k, v, real, is_causal)[0], out, atol=1e-5)


def out_and_gradients(q, k, v, kv_mask, is_causal):
    return jax.tree.map(np.asarray, _out_and_gradients(q, k, v, kv_mask, is_causal))


@functools.partial(jax.jit, static_argnums=4)
def _out_and_gradients(q, k, v, kv_mask, is_causal):
    """Outputs and gradients, with one program for each form."""
    function = functools.partial(cosformer, is_causal=is_causal, block_size=4, kv_mask=kv_mask)
    out, pull = jax.vjp(function, q, k, v)
    return out, pull(jnp.ones_like(out))


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_is_harmless(is_causal):
    q, k, v = random_head(5, 12, 12)
    real = np.arange(12) % 3 != 1
    soiled = (np.where(real[:, None], x, np.float32(np.nan)) for x in (k, v))
    clean, _ = out_and_gradients(q, k, v, real, is_causal)
    np.testing.assert_array_equal(out_and_gradients(q, *soiled, real, is_causal)[0], clean)
    out, gradients = out_and_gradients(q, k, v, np.zeros(12, bool), is_causal)
    for x in (out, *gradients):
        np.testing.assert_array_equal(x, 0)


def test_a_later_token_changes_nothing_before_it():
    q, k, v = random_head(6, 14, 14)
    function = jax.jit(functools.partial(cosformer, is_causal=True, block_size=4, max_length=20))
    q, k, v = map(np.asarray, (q, k, v))
    before = np.asarray(function(q, k, v))
    for j in (3, 4, 11):
        later_k, later_v = k.copy(), v.copy()
        later_k[j] += 3
        later_v[j] = 1e4
        after = np.asarray(function(q, later_k, later_v))
        np.testing.assert_array_equal(after[:j], before[:j])
        assert np.any(after[j:] != before[j:])
    # With max_length set, a prefix does not depend on the length of the whole.
    np.testing.assert_allclose(function(q[:9], k[:9], v[:9]), before[:9], atol=1e-6)


def test_a_decoder_of_placed_tokens_is_the_causal_form():
    q, k, v = map(np.asarray, random_head(7, 21, 21, 6, 5))
    whole = jax.jit(functools.partial(cosformer, max_length=32, is_causal=True, block_size=4))(q, k, v)
    decoder = Decoder(running=running_cosformer(6), head_dim=8, value_dim=5, block_size=4)
    place = functools.partial(place_tokens, max_length=32)

    @jax.jit
    def prefill(q, k, v):
        return decoder.prefill(decoder.init(), place(q), place(k), v)

    @jax.jit
    def step(cache, q, k, v):
        q, k = (place(x, start=cache.length) for x in (q, k))
        cache = decoder.append(cache, k, v)
        return decoder.attend(cache, q), cache

    out, cache = prefill(q[:13], k[:13], v[:13])
    outs = [out]
    for t in range(13, 21):
        out, cache = step(cache, *(x[t : t + 1] for x in (q, k, v)))
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs), whole, atol=2e-6)


def test_places_keep_their_digits_at_the_far_end():
    max_length = 2**20
    place = np.arange(max_length - 5, max_length)
    angle = np.pi * place.astype(np.float64) / (2 * max_length)
    place_last = jax.jit(functools.partial(place_tokens, max_length=max_length, start=max_length - 5))
    placed = np.asarray(place_last(np.zeros((5, 1), np.float32)))
    np.testing.assert_allclose(placed[:, 1], np.cos(angle), rtol=1e-6)
    np.testing.assert_allclose(placed[:, 2], np.sin(angle), rtol=1e-6)


def test_what_is_refused():
    q, k, v = random_head(8, 5, 9)
    with pytest.raises(ValueError, match="max_length must be at least the number of tokens, 9, got 8"):
        jax.eval_shape(functools.partial(cosformer, max_length=8), q, k, v)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        jax.eval_shape(functools.partial(cosformer, block_size=0), q, k, v)
    with pytest.raises(ValueError, match="at least the number of tokens, 12, got 10"):
        place_tokens(q, max_length=10, start=7)
