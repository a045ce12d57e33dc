"""Quantised tokens: the error of rounding, and that nothing else differs."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import WeightedKV, attend, merge, quantize
from approx_attention.core import quantized, quantized_bytes, summary_bytes
from approx_attention.evaluation import load_sample
from tests.references import as_array, brute_force, compiled, random_head, relative_error

attend, quantize, merge = compiled(attend, quantize, merge)
dequantized = jax.jit(lambda small: small.dequantized())
both_bits = pytest.mark.parametrize("bits", [8, 4])


def tokens_of(k, v, mass=None):
    """Tokens with these masses, 1 by default."""
    k, v, mass = (as_array(x) for x in (k, v, np.ones(len(k)) if mass is None else mass))
    return WeightedKV(k, v, mass)


def gaussian_cells():
    """Edges of the cells around the levels, with the mass and first moment of N(0, 1) in each."""
    levels = np.concatenate([-quantized.GAUSSIAN_LEVELS[::-1], quantized.GAUSSIAN_LEVELS])
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    weight = np.diff([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in edges])
    return levels, weight, -np.diff(np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi))


def test_levels_are_the_means_of_their_cells():
    levels, weight, moment = gaussian_cells()
    np.testing.assert_allclose(levels, moment / weight, atol=2e-8)


def test_the_error_at_4_bits_is_that_of_the_levels_and_at_8_that_of_the_step():
    levels, weight, _ = gaussian_cells()
    least = 1 - np.sum(weight * levels**2)
    assert least == pytest.approx(0.009501, abs=1e-6)
    x = np.random.default_rng(0).normal(size=(1024, 256)).astype(np.float32)
    rows = x.astype(np.float64)
    for bits in (4, 8):
        rounded = dequantized(quantize(tokens_of(x, x), bits=bits))
        for y in (rounded.k, rounded.value_sum):
            error = np.asarray(np.asarray(y) - x, np.float64)
            share = np.sum(error**2) / np.sum(rows**2)
            # Steps that preserve norms give the error D / (1 - D); the centre of 128 rows takes 1/128 of it.
            largest = np.mean(np.max(np.abs(rows), axis=1) ** 2)
            expected = least / (1 - least) if bits == 4 else (largest / 127**2) / 12
            assert share == pytest.approx(expected, rel=0.03)
            centre = rows.reshape(8, 128, -1).mean(1, keepdims=True).repeat(128, 1).reshape(rows.shape)
            np.testing.assert_allclose(np.sum(error * (rows - centre), axis=1) / np.sum(rows**2, axis=1), 0, atol=2e-6)


@pytest.mark.parametrize("num_channels", [1, 3, 7, 64, 80])
def test_the_rotation_is_orthogonal_and_flat(num_channels):
    matrix = quantized._rotation(num_channels, 0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(num_channels), atol=1e-12)
    assert np.abs(matrix).max() <= math.sqrt(2 / num_channels) + 1e-12
    q, k, _ = (np.asarray(x) for x in random_head(0, 5, 6, num_channels))

    @jax.jit
    def rotated(q, k):
        q, k = (quantized.rotated(x, 0) for x in (q, k))
        return q @ k.T, quantized.rotated_back(q, 0)

    logits, back = rotated(q, k)
    np.testing.assert_allclose(logits, q @ k.T, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(back, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_channels", [1, 6, 7])
def test_codes_of_4_bits_are_packed_two_to_a_byte_without_loss(num_channels):
    codes = np.random.default_rng(1).integers(16, size=(50, num_channels))
    # Rows made of the levels themselves, with mean square 1, come back unchanged.
    levels = np.concatenate([-quantized.GAUSSIAN_LEVELS[::-1], quantized.GAUSSIAN_LEVELS]).astype(np.float32)
    grid = quantized._GRIDS[4]
    decode = jax.jit(grid.decode, static_argnums=1)
    packed = jax.jit(grid.encode)(levels[codes])
    assert packed.shape == (50, (num_channels + 1) // 2)
    assert packed.dtype == jnp.uint8
    kept = np.round(np.mean(levels[codes] ** 2, axis=1), 3) == 1
    every = np.arange(256, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(decode(every, 2), levels[np.stack([np.arange(256) % 16, np.arange(256) // 16], 1)])
    np.testing.assert_array_equal(np.asarray(decode(packed, num_channels))[kept], levels[codes][kept])


@both_bits
def test_an_outlier_channel_does_not_set_the_step_of_the_others(bits):
    k, channels, grid = np.asarray(random_head(3, 1, 256, 64)[1]), np.arange(64), quantized._GRIDS[bits]
    spiked = np.where(channels == 5, 10 * k, k)
    # The expected rounding, without a rotation.
    unit = spiked / np.max(np.abs(spiked), axis=1, keepdims=True)
    level = np.asarray(jax.jit(lambda x: grid.decode(grid.encode(x), 64))(unit))
    square, product = (np.sum(spiked * x, axis=1, keepdims=True) for x in (spiked, level))
    rounded = dequantized(quantize(tokens_of(spiked, k), bits=bits)).k
    ours, plain = (
        relative_error(np.delete(x, 5, axis=1), np.delete(spiked, 5, axis=1))
        for x in (rounded, level * square / product)
    )
    assert ours < {8: 0.01, 4: 0.18}[bits]
    assert plain > 2.5 * ours
    # The common offset of all keys is not rounded.
    offset = np.where(channels == 5, k + 100, k)
    assert relative_error(dequantized(quantize(tokens_of(offset, k), bits=bits)).k - offset + k, k) < 0.12


@pytest.mark.parametrize("num_queries", [4, 12])
@both_bits
def test_attention_is_that_of_the_rounded_tokens(bits, num_queries):
    q, k, v = random_head(4, num_queries, 150, 9, 5)
    v, mass = np.asarray(v), np.random.default_rng(5).uniform(0.2, 3, 150)
    mass[7] = 0
    tokens = dataclasses.replace(tokens_of(k, v * mass[:, None], mass), scale=as_array(0.3))
    small = quantize(tokens, bits=bits)
    assert summary_bytes(small) == quantized_bytes(150, 9, 5, bits=bits)
    keys, values, bias = jax.jit(lambda wide: (wide.k, wide.values, wide.log_mass))(dequantized(small))
    # Stored keys are in scaled space.
    out, lse = brute_force(q, keys, values, scale=math.sqrt(0.3), bias=np.asarray(bias)[None])
    np.testing.assert_allclose(attend(q, small).out, out, atol=2e-6)
    np.testing.assert_allclose(attend(q, small).lse, lse, atol=2e-6)
    # Signed masses: a quotient of sums, clipped to the range of the values.
    mass[3] = -0.4
    signed = dataclasses.replace(tokens, mass=as_array(mass), value_range=as_array([v.min(0) / 4, v.max(0) / 4]))
    small = quantize(signed, bits=bits)
    chex.assert_trees_all_close(attend(q, small), attend(q, dequantized(small)), atol=3e-6)
    assert relative_error(attend(q, small).lse, attend(q, signed).lse) < {8: 0.002, 4: 0.03}[bits]


def test_what_is_absent_stays_absent_and_may_hold_nan():
    q, k, v = random_head(6, 3, 140, 8)
    real = np.arange(140) % 3 != 0
    k, v = (np.where(real[:, None], x, 0) for x in (k, v))
    tokens = tokens_of(k, v, real)
    dirty = dataclasses.replace(tokens, k=as_array(np.where(real[:, None], k, np.nan)))
    for bits in (8, 4):
        clean, other = quantize(tokens, bits=bits), quantize(dirty, bits=bits)
        assert np.isfinite(clean.k.step).all()
        chex.assert_trees_all_equal(clean, other)
        gone = dataclasses.replace(clean, mass=as_array(np.zeros(clean.mass.shape)))
        assert not np.asarray(attend(q, gone).out).any()
        assert np.isneginf(attend(q, gone).lse).all()
    # The squares of these magnitudes leave the range of float32; equal rows are their centre, without a step.
    for size in (1e25, 1e-25, 0.0):
        huge = dequantized(quantize(tokens_of(size * k, size * v), bits=8))
        np.testing.assert_allclose(huge.k, size * k, atol=0.03 * size)
    equal_rows = np.broadcast_to(k[:1], k.shape)
    same = quantize(tokens_of(equal_rows, v), bits=4)
    np.testing.assert_allclose(dequantized(same).k, equal_rows, atol=1e-5)


@both_bits
def test_merging_rounds_nothing_again(bits):
    q, k, v = random_head(7, 5, 200, 8, 3)
    k, v = np.asarray(k), np.asarray(v)
    parts = [tokens_of(k[i : i + 100], v[i : i + 100]) for i in (0, 100)]
    small = [quantize(part, bits=bits) for part in parts]
    both = merge(*small)
    states = merge(*(attend(q, part) for part in small))
    chex.assert_trees_all_close(attend(q, both), states, atol=2e-6)
    of_two_scales = [dataclasses.replace(x, scale=as_array(1.0)) for x in small]
    assert merge.__wrapped__(*of_two_scales).scale is of_two_scales[0].scale
    ranged = dataclasses.replace(small[0], value_range=as_array([v[:100].min(0), v[:100].max(0)]))
    assert np.all(merge(ranged, small[1]).value_range[1] >= ranged.value_range[1])
    with pytest.raises(ValueError, match=r"equal \(bits, seed, D, Dv, tokens per group\)"):
        merge(small[0], quantize(parts[1], bits=12 - bits))
    with pytest.raises(TypeError, match="QuantizedKV and WeightedKV"):
        merge(small[0], parts[1])


def test_8_bits_of_the_sample_cost_no_more_than_one_hundredth():
    # The diffuse head of the sample.
    query, key, value = (np.asarray(x)[1].astype(np.float32) for x in load_sample())
    q, k, v = query[-256:, 0], key[:, 0], value[:, 0]
    truth = brute_force(q, k, v)[0]
    for bits, most in ((8, 0.01), (4, 0.1)):
        out = attend(as_array(q / math.sqrt(64)), quantize(tokens_of(k, v), bits=bits)).out
        assert relative_error(out, truth) < most


def test_transformations():
    q, k, v = (np.asarray(x) for x in random_head(8, 4, 60, 6))

    @jax.jit
    def rounded(q, k, v):
        return attend.__wrapped__(q, quantize.__wrapped__(WeightedKV.of_tokens(k, v), bits=4)).out

    batch = [np.stack([x, 2 * x]) for x in (q, k, v)]
    together, one = np.asarray(jax.jit(jax.vmap(rounded))(*batch)), rounded(q, k, v)
    np.testing.assert_allclose(together[0], one, atol=1e-5)
    np.testing.assert_allclose(together[1], rounded(2 * q, 2 * k, 2 * v), atol=1e-5)
    # Gradients stop at rounded tokens, but not at queries.
    gradients = jax.jit(jax.grad(lambda *args: jnp.sum(rounded(*args) ** 2), (0, 1, 2)))(q, k, v)
    assert np.abs(gradients[0]).max() > 0
    assert not np.any(gradients[1])
    assert not np.any(gradients[2])
    exported = jax.export.export(rounded)(q, k, v)
    np.testing.assert_allclose(exported.call(q, k, v), one, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "bits must be 8 or 4, got 3", lambda x: quantize(x, bits=3)),
        (TypeError, "bits must be an integer", lambda x: quantize(x, bits=8.0)),
        (ValueError, "seed must be at least 0", lambda x: quantize(x, bits=8, seed=-1)),
        (TypeError, "quantize takes a WeightedKV, got QuantizedKV", lambda x: quantize(quantize(x, bits=8), bits=4)),
        (ValueError, "D = 4, got shape", lambda x: attend(x.k[:, :3], quantize(x, bits=8))),
    ],
)
def test_bad_input(error, says, call):
    with pytest.raises(error, match=says):
        call(tokens_of(np.ones((5, 4)), np.ones((5, 4))))
