"""Match3 by explicit weights: against brute force, with the outputs that the construction promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.realization import match3, match3_outputs, match3_weights
from tests.references import as_array

SIZES = [(8, 11), (16, 37), (24, 101)]
SEQUENCES = 200


def by_brute_force(x, modulus):
    sums = x[..., :, None, None] + x[..., None, :, None] + x[..., None, None, :]
    return np.any(sums % modulus == 0, axis=(-2, -1))


def drawn(num_tokens, modulus):
    return np.random.default_rng(modulus).integers(0, modulus, (SEQUENCES, num_tokens))


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def match3_outputs_of(x, weights):
    return match3_outputs(x, weights)


def outputs_of(x, weights):
    return np.asarray(match3_outputs_of(x.astype(np.int32), weights))


@pytest.mark.parametrize(("num_tokens", "modulus"), SIZES)
def test_no_position_is_wrong_and_outputs_are_far_apart(num_tokens, modulus):
    x = drawn(num_tokens, modulus)
    expected = by_brute_force(x, modulus)
    assert expected.any()
    assert not expected.all()
    outputs = outputs_of(x, match3_weights(modulus, num_tokens))
    assert outputs[expected].min() >= 0.996
    assert outputs[~expected].max() <= 0.142
    found = jax.jit(match3, static_argnums=1)(x[0].astype(np.int32), modulus)
    np.testing.assert_array_equal(found, expected[0])


@pytest.mark.parametrize(("num_tokens", "modulus"), SIZES)
def test_logits_are_the_cosine_of_the_sum_of_the_angles(num_tokens, modulus):
    with jax.enable_x64(True):
        weights = jax.tree.map(np.asarray, match3_weights(modulus, num_tokens, dtype=jnp.float64))
    e, x = weights.embedding, np.arange(modulus)
    logits = np.einsum("id,jd,ld->ijl", e[:-1] @ weights.w_q, e @ weights.w_k1, e @ weights.w_k2, optimize=True)
    gap = 1 - math.cos(2 * math.pi / modulus)
    largest = 2 / gap * math.log(4 * num_tokens**2)
    sums = x[:, None, None] + x[None, :, None] + x[None, None, :]
    np.testing.assert_allclose(logits[:, :-1, :-1], largest * np.cos(2 * np.pi / modulus * sums), atol=1e-10 * largest)
    np.testing.assert_allclose(logits[:, -1, -1], largest * (1 - gap / 2), rtol=1e-12)
    np.testing.assert_array_equal(logits[:, :-1, -1], 0)
    np.testing.assert_array_equal(logits[:, -1, :-1], 0)


@pytest.mark.parametrize(("num_tokens", "modulus"), SIZES)
def test_many_frequencies_need_only_small_logits(num_tokens, modulus):
    random = np.random.default_rng(0)
    frequencies = random.integers(1, modulus, round(4 * math.log(modulus))).tolist()
    weights = match3_weights(modulus, num_tokens, frequencies=frequencies)
    assert weights.w_q.shape[1] == 4 * len(frequencies) + 1
    # The largest logit, lambda, for a gap of at least a half: it does not grow with the modulus.
    largest = len(frequencies) * float(np.max(np.abs(np.asarray(weights.w_q)[:, :-1])))
    assert largest <= 4 * math.log(4 * num_tokens**2)
    x = drawn(num_tokens, modulus)
    np.testing.assert_array_equal(outputs_of(x, weights) > weights.threshold, by_brute_force(x, modulus))


@pytest.mark.parametrize("modulus", [5, 6, 7])
def test_every_pair_of_a_small_modulus(modulus):
    pairs = np.stack(np.meshgrid(np.arange(modulus), np.arange(modulus)), -1).reshape(-1, 2)
    weights = match3_weights(modulus, 2)
    expected = by_brute_force(pairs, modulus)
    outputs = outputs_of(pairs, weights)
    gap = 1 - math.cos(2 * math.pi / modulus)
    largest = 2 / gap * math.log(16)
    assert outputs[expected].min() >= 1 / (1 + 1 / 16 + 4 * math.exp(-largest)) - 1e-5
    assert outputs[~expected].max() <= 0.25 + 1e-5


def test_residues_may_be_given_by_any_whole_number():
    x, found = np.array([1, 2, 8, 4], np.int32), jax.jit(match3, static_argnums=1)
    np.testing.assert_array_equal(found(x - 22, 11), found(x, 11))
    np.testing.assert_array_equal(found(x, 11), by_brute_force(x, 11))
    np.testing.assert_array_equal(found(x.astype(np.int8), 131), by_brute_force(x, 131))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((as_array([1], np.int32), 4), {}, ValueError, "modulus must be at least 5, got 4"),
        ((as_array([1.0]), 7), {}, TypeError, "x must be integers, got float32"),
        ((as_array([[1]], np.int32), 7), {}, ValueError, r"x must be \[N\], got shape \(1, 1\)"),
        ((as_array([1], np.int32), 7), {"frequencies": ()}, ValueError, "at least one"),
        ((as_array([1], np.int32), 6), {"frequencies": (2, 4)}, ValueError, "have no common divisor with modulus 6"),
    ],
)
def test_what_cannot_be_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        match3(*arguments, **options)
