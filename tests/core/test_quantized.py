"""Quantised tokens: the error of rounding, and that nothing else differs."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import WeightedKV, attend, exact, merge, quantize
from approx_attention.core import quantized, quantized_bytes, summary_bytes
from approx_attention.evaluation import load_sample
from tests.references import brute_force, compiled, random_head, relative_error

attend, quantize, exact = compiled(attend, quantize, exact)
dequantized = jax.jit(lambda small: small.dequantized())
both_bits = pytest.mark.parametrize("bits", [8, 4])


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
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 256)), jnp.float32)
    for bits in (4, 8):
        rounded = dequantized(quantize(WeightedKV.of_tokens(x, x), bits=bits))
        for y in (rounded.k, rounded.value_sum):
            error, rows = np.asarray(y - x, np.float64), np.asarray(x, np.float64)
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
    q, k, _ = random_head(0, 5, 6, num_channels)
    logits = quantized.rotated(q, 0) @ quantized.rotated(k, 0).T
    np.testing.assert_allclose(logits, q @ k.T, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(quantized.rotated_back(quantized.rotated(q, 0), 0), q, rtol=1e-5, atol=1e-5)


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
    np.testing.assert_array_equal(decode(packed, num_channels)[kept], levels[codes][kept])


@both_bits
def test_an_outlier_channel_does_not_set_the_step_of_the_others(bits):
    _, k, _ = random_head(3, 1, 256, 64)
    spiked, grid = k.at[:, 5].multiply(10.0), quantized._GRIDS[bits]
    # The expected rounding, without a rotation.
    level = grid.decode(grid.encode(spiked / jnp.max(jnp.abs(spiked), axis=1, keepdims=True)), 64)
    square, product = (jnp.sum(spiked * x, axis=1, keepdims=True) for x in (spiked, level))
    rounded = dequantized(quantize(WeightedKV.of_tokens(spiked, k), bits=bits)).k
    ours, plain = (
        relative_error(np.delete(x, 5, axis=1), np.delete(spiked, 5, axis=1))
        for x in (rounded, level * square / product)
    )
    assert ours < {8: 0.01, 4: 0.18}[bits]
    assert plain > 2.5 * ours
    # The common offset of all keys is not rounded.
    offset = k.at[:, 5].add(100.0)
    assert relative_error(dequantized(quantize(WeightedKV.of_tokens(offset, k), bits=bits)).k - offset + k, k) < 0.12


@pytest.mark.parametrize("num_queries", [4, 12])
@both_bits
def test_attention_is_that_of_the_rounded_tokens(bits, num_queries):
    q, k, v = random_head(4, num_queries, 150, 9, 5)
    mass = jnp.asarray(np.random.default_rng(5).uniform(0.2, 3, 150), jnp.float32).at[7].set(0)
    tokens = WeightedKV(k, v * mass[:, None], mass, scale=jnp.asarray(0.3))
    small = quantize(tokens, bits=bits)
    assert summary_bytes(small) == quantized_bytes(150, 9, 5, bits=bits)
    wide = dequantized(small)
    # Stored keys are in scaled space.
    bias = np.broadcast_to(wide.log_mass, (num_queries, 150))
    out, lse = brute_force(q, wide.k, wide.values, scale=math.sqrt(0.3), bias=bias)
    np.testing.assert_allclose(attend(q, small).out, out, atol=2e-6)
    np.testing.assert_allclose(attend(q, small).lse, lse, atol=2e-6)
    # Signed masses: a quotient of sums, clipped to the range of the values.
    signed = dataclasses.replace(tokens, mass=mass.at[3].set(-0.4), value_range=jnp.stack([v.min(0), v.max(0)]) / 4)
    small = quantize(signed, bits=bits)
    chex.assert_trees_all_close(attend(q, small), attend(q, dequantized(small)), atol=3e-6)
    assert relative_error(attend(q, small).lse, attend(q, signed).lse) < {8: 0.002, 4: 0.03}[bits]


def test_what_is_absent_stays_absent_and_may_hold_nan():
    q, k, v = random_head(6, 3, 140, 8)
    real = jnp.asarray(np.arange(140) % 3 != 0)
    tokens = WeightedKV.of_tokens(k, v, real)
    dirty = dataclasses.replace(tokens, k=jnp.where(real[:, None], k, jnp.nan))
    for bits in (8, 4):
        clean, other = quantize(tokens, bits=bits), quantize(dirty, bits=bits)
        assert np.isfinite(clean.k.step).all()
        chex.assert_trees_all_equal(clean, other)
        gone = dataclasses.replace(clean, mass=jnp.zeros_like(clean.mass))
        assert not attend(q, gone).out.any()
        assert np.isneginf(attend(q, gone).lse).all()
    # The squares of these magnitudes leave the range of float32; equal rows are their centre, without a step.
    for size in (1e25, 1e-25, 0.0):
        huge = dequantized(quantize(WeightedKV.of_tokens(size * k, size * v), bits=8))
        np.testing.assert_allclose(huge.k, size * k, atol=0.03 * size)
    same = quantize(WeightedKV.of_tokens(jnp.broadcast_to(k[:1], k.shape), v), bits=4)
    np.testing.assert_allclose(dequantized(same).k, jnp.broadcast_to(k[:1], k.shape), atol=1e-5)


@both_bits
def test_merging_rounds_nothing_again(bits):
    q, k, v = random_head(7, 5, 200, 8, 3)
    parts = [WeightedKV.of_tokens(k[i : i + 100], v[i : i + 100]) for i in (0, 100)]
    small = [quantize(part, bits=bits) for part in parts]
    both = merge(*small)
    states = merge(*(attend(q, part) for part in small))
    chex.assert_trees_all_close(attend(q, both), states, atol=2e-6)
    of_two_scales = [dataclasses.replace(x, scale=jnp.asarray(1.0)) for x in small]
    assert merge(*of_two_scales).scale is of_two_scales[0].scale
    ranged = dataclasses.replace(small[0], value_range=jnp.stack([v[:100].min(0), v[:100].max(0)]))
    assert (merge(ranged, small[1]).value_range[1] >= ranged.value_range[1]).all()
    with pytest.raises(ValueError, match=r"equal \(bits, seed, D, Dv, tokens per group\)"):
        merge(small[0], quantize(parts[1], bits=12 - bits))
    with pytest.raises(TypeError, match="QuantizedKV and WeightedKV"):
        merge(small[0], parts[1])


def test_8_bits_of_the_sample_cost_no_more_than_one_hundredth():
    # The diffuse head of the sample.
    query, key, value = (x[1].astype(jnp.float32) for x in load_sample())
    q, k, v = query[-256:, 0], key[:, 0], value[:, 0]
    truth = exact(q, k, v)
    tokens = WeightedKV.of_tokens(k, v)
    for bits, most in ((8, 0.01), (4, 0.1)):
        assert relative_error(attend(q / math.sqrt(64), quantize(tokens, bits=bits)).out, truth) < most


def test_transformations():
    q, k, v = random_head(8, 4, 60, 6)

    def rounded(q, k, v):
        return attend(q, quantize(WeightedKV.of_tokens(k, v), bits=4)).out

    batch = [jnp.stack([x, 2 * x]) for x in (q, k, v)]
    together = jax.jit(jax.vmap(rounded))(*batch)
    for i in range(2):
        np.testing.assert_allclose(together[i], rounded(*(x[i] for x in batch)), atol=1e-5)
    # Gradients stop at rounded tokens, but not at queries.
    gradients = jax.jit(jax.grad(lambda *args: jnp.sum(rounded(*args) ** 2), (0, 1, 2)))(q, k, v)
    assert np.abs(gradients[0]).max() > 0
    assert not gradients[1].any()
    assert not gradients[2].any()
    exported = jax.export.export(jax.jit(rounded))(q, k, v)
    np.testing.assert_allclose(exported.call(q, k, v), rounded(q, k, v), atol=1e-6)


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
        call(WeightedKV.of_tokens(jnp.ones((5, 4)), jnp.ones((5, 4))))
