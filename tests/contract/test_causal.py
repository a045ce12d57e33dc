"""Causal forms: no later token matters; a prefix, a prefill and single steps give the same outputs."""

import functools
import itertools

import jax
import numpy as np
import pytest

from approx_attention import Decoder, RunningSummary
from tests.cases import CAUSAL, LENGTH, call, case_of, running_of, unless_slow, with_gradients
from tests.references import causal_mask, having, random_head

# causality


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_changes_nothing_before_it(name):
    q, k, v = (np.asarray(x) for x in random_head(6, LENGTH, LENGTH, 8, 6))
    before, _ = with_gradients(name, q, k, v, is_causal=True)
    for j in (0, 3, 4, 11, 18, 26):
        at = (np.arange(LENGTH) == j)[:, None]
        after, _ = with_gradients(name, q, np.where(at, k + 3, k), np.where(at, np.float32(1e4), v), is_causal=True)
        np.testing.assert_array_equal(after[:j], before[:j])
        assert np.any(np.asarray(after[j:]) != np.asarray(before[j:]))
        asked, _ = with_gradients(name, np.where(at, q + 1, q), k, v, is_causal=True)
        np.testing.assert_array_equal(asked[:j], before[:j])


# The proposals of ra are sums over a row of all keys.
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "ra"])
def test_a_nan_in_a_later_key_reaches_no_earlier_query(name):
    tensors = [np.asarray(x) for x in random_head(6, LENGTH, LENGTH, 8, 6)]
    clean, _ = with_gradients(name, *tensors, is_causal=True)
    at = (np.arange(LENGTH) == 13)[:, None]
    for which, number in ((0, np.nan), (1, np.nan), (1, np.inf)):
        soiled = list(tensors)
        soiled[which] = np.where(at, np.float32(number), tensors[which])
        np.testing.assert_array_equal(with_gradients(name, *soiled, is_causal=True)[0][:13], clean[:13])


@pytest.mark.parametrize("name", [unless_slow(name) for name in CAUSAL])
def test_jacobian_is_zero_above_the_diagonal(name):
    q, k, v = random_head(7, 14, 14, 3)
    q, k = case_of(name).diagonal_inputs(q, k)
    function = functools.partial(call, name, size=case_of(name).diagonal_size, is_causal=True)
    jacobian = jax.jit(jax.jacrev(function, argnums=(1, 2)))(q, k, v)
    for block in jacobian:
        influence = np.abs(block).max(axis=(1, 3))
        np.testing.assert_array_equal(influence[~causal_mask(14, 14)], 0)
    assert np.all(np.abs(jacobian[1]).max(axis=(1, 3))[np.arange(14), np.arange(14)] > 0)


# a prefix, a prefill and single steps


@pytest.mark.parametrize("name", [unless_slow(name) for name in CAUSAL])
def test_a_prefix_answers_like_the_whole(name):
    q, k, v = random_head(8, 21, 21)
    options = case_of(name).any_length(21)
    whole = call(name, q, k, v, is_causal=True, **options)
    for length in (1, 4, 5, 12):
        prefix = call(name, q[:length], k[:length], v[:length], is_causal=True, **options)
        np.testing.assert_allclose(prefix, whole[:length], atol=2e-6)


@pytest.mark.parametrize("name", [unless_slow(name) for name in having(decode=True)])
def test_decoding_equals_the_causal_form(name):
    q, k, v = random_head(9, 21, 21)
    running = running_of(name, 24)
    assert isinstance(running, RunningSummary)
    decoder = Decoder(running=running, head_dim=8, value_dim=8, block_size=4)
    whole = call(name, q, k, v, is_causal=True)
    step, answer, prefill = jax.jit(decoder.append), jax.jit(decoder.attend), jax.jit(decoder.prefill)
    q, k, v = (np.asarray(x) for x in (q, k, v))

    cache, outs = decoder.init(), []
    for t in range(21):
        cache = step(cache, k[t : t + 1], v[t : t + 1])
        outs.append(answer(cache, q[t : t + 1]))
    np.testing.assert_allclose(np.concatenate(outs), whole, atol=2e-6)
    for cuts in ((0, 21), (0, 1, 4, 5, 21), (0, 8, 20, 21)):
        cache, outs = decoder.init(), []
        for start, stop in itertools.pairwise(cuts):
            out, cache = prefill(cache, q[start:stop], k[start:stop], v[start:stop])
            outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs), whole, atol=2e-6)
