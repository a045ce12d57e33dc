"""The kernels for GPUs, interpreted on a CPU, against brute force in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from approx_attention.kernels import triton
from approx_attention.kernels.reach import Reach
from approx_attention.kernels.triton import HIDDEN, Tile, Tiles
from tests.references import as_array

pytestmark = pytest.mark.all_forms

# Tiles smaller than the sequences of most tests.
SMALL = Tiles(Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 2))
FULL, CAUSAL = Reach(), Reach(0, None, 0)
# All keys, causal attention and a narrow window are tested with groups of heads.
REACHES = {
    "causal with offset": Reach(16, None, 0),
    "negative offset": Reach(-9, None, 0),
    "wide window": Reach(3, 40, 37),
    "window of earlier keys": Reach(21, 20, 0),
    "later keys": Reach(2, 0, None),
    "beyond the keys": Reach(100, 3, 3),
    "only keys apart": Reach(0, -4, 9),
}


@functools.partial(jax.jit, static_argnames=("reach", "tiles"))
def both(q, k, v, bias, scale, d_out, d_normaliser, *, reach, tiles=SMALL):
    """Outputs and gradients, including the caller's steps between the kernels."""
    kernels = {"reach": reach, "tiles": tiles, "interpret": True}
    out, peak, log_total = triton.forward(q, k, v, bias, scale, **kernels)
    unseen = peak <= HIDDEN / 2
    d_out = jnp.where(unseen[:, None], 0, d_out)
    delta = jnp.where(unseen, 0, jnp.sum(d_out.astype(jnp.float32) * out, axis=1) - d_normaliser)
    rows = (jnp.where(unseen, 0, peak), log_total, delta, d_out)
    return (out, peak, log_total), triton.backward(q, k, v, bias, scale, *rows, **kernels)


def expected(q, k, v, bias, scale, d_out, d_normaliser, *, reach):
    """The results of `both` in float64, with normalisers -inf of rows that see no key."""
    q, k, v, bias, d_out, d_normaliser = (np.asarray(x, np.float64) for x in (q, k, v, bias, d_out, d_normaliser))
    scale = float(scale)
    logits = scale * q @ k.T + bias
    distance = np.arange(len(q))[:, None] + reach.offset - np.arange(len(k))
    seen = np.broadcast_to(bias > HIDDEN / 2, logits.shape).copy()
    if reach.left is not None:
        seen &= distance <= reach.left
    if reach.right is not None:
        seen &= distance >= -reach.right
    peak = np.max(logits, axis=1, initial=-np.inf, where=seen)
    some = seen.any(1)
    weights = np.exp(logits - np.where(some, peak, 0)[:, None], where=seen, out=np.zeros_like(logits))
    total = np.where(some, weights.sum(1), 1)
    weights /= total[:, None]
    out = weights @ v
    normaliser = np.where(some, peak + np.log(total), -np.inf)
    d_logits = weights * (d_out @ v.T - (d_out * out).sum(1, keepdims=True) + d_normaliser[:, None])
    gradients = scale * d_logits @ k, scale * d_logits.T @ q, weights.T @ d_out, d_logits.sum(0)
    return (out, normaliser), gradients


def inputs(seed, num_queries, num_keys, head_dim=8, value_dim=12, hidden=0.0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    shapes = (num_queries, head_dim), (num_keys, head_dim), (num_keys, value_dim), (num_queries, value_dim)
    q, k, v, d_out = (random.normal(size=shape) for shape in shapes)
    is_hidden = random.random(num_keys) < hidden
    k[is_hidden], v[is_hidden] = 0, 0
    bias = np.where(is_hidden, HIDDEN, 0.5 * random.normal(size=num_keys))
    q, k, v, d_out = (as_array(x, dtype) for x in (q, k, v, d_out))
    scale, d_normaliser = as_array(head_dim**-0.5), as_array(random.normal(size=num_queries))
    return q, k, v, as_array(bias), scale, d_out, d_normaliser


def assert_as_expected(results, reference, tolerance):
    """Compare results, relative to their size where it is above 1."""
    (out, peak, log_total), gradients = results
    (reference_out, normaliser), reference_gradients = reference
    unseen = np.isneginf(normaliser)
    np.testing.assert_array_equal(np.asarray(peak)[unseen], np.float32(HIDDEN))
    np.testing.assert_array_equal(np.asarray(log_total)[unseen], 0)
    np.testing.assert_array_equal(np.asarray(out)[unseen], 0)
    sums = np.asarray(peak, np.float64) + np.asarray(log_total, np.float64)
    pairs = [
        (out, reference_out),
        (sums[~unseen], normaliser[~unseen]),
        *zip(gradients, reference_gradients, strict=True),
    ]
    for name, (result, reference) in zip(("out", "normaliser", "q", "k", "v", "bias"), pairs, strict=True):
        assert result.dtype == (np.float64 if name == "normaliser" else np.float32), name
        error = np.max(np.abs(np.asarray(result, np.float64) - reference), initial=0)
        assert error <= tolerance * max(1, np.max(np.abs(reference), initial=0)), (name, error)


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_as_brute_force(reach):
    tensors = inputs(0, 51, 45, hidden=0.2)
    assert_as_expected(both(*tensors, reach=reach), expected(*tensors, reach=reach), 2e-6)


@pytest.mark.parametrize("reach", [FULL, CAUSAL, Reach(3, 20, 17)])
def test_whole_blocks(reach):
    tensors = inputs(0, 48, 64, 16, 32, hidden=0.2)
    assert_as_expected(both(*tensors, reach=reach), expected(*tensors, reach=reach), 2e-6)


edges = st.none() | st.integers(-3, 40)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    widths=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    reach=st.builds(Reach, st.integers(-40, 40), edges, edges),
    hidden=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_shape_and_reach(seed, sizes, widths, reach, hidden):
    tensors = inputs(seed, *sizes, *widths, hidden)
    assert_as_expected(both(*tensors, reach=reach), expected(*tensors, reach=reach), 2e-6)


def test_default_tiles():
    tensors = inputs(1, 150, 170, 64, 64, hidden=0.1)
    results = both(*tensors, reach=CAUSAL, tiles=None)
    assert_as_expected(results, expected(*tensors, reach=CAUSAL), 2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 8e-3), (jnp.float16, 1e-3)])
def test_half_precision(dtype, tolerance):
    tensors = inputs(2, 50, 60, 16, 24, hidden=0.1, dtype=dtype)
    assert_as_expected(both(*tensors, reach=CAUSAL), expected(*tensors, reach=CAUSAL), tolerance)


def test_large_logits():
    q, k, v, bias, scale, d_out, d_normaliser = inputs(3, 40, 40)
    tensors = as_array(300 * np.asarray(q)), k, v, bias, scale, as_array(np.ones(d_out.shape)), d_normaliser
    (out, peak, log_total), (_, _, d_v, _) = both(*tensors, reach=CAUSAL)
    reference, normaliser = expected(*tensors, reach=CAUSAL)[0]
    # The logits themselves are rounded, by up to 1e-4 where they are as large as 1000.
    np.testing.assert_allclose(out, reference, atol=1e-3)
    np.testing.assert_allclose(np.add(peak, log_total), normaliser, rtol=1e-6, atol=1e-4)
    # The gradient uses the weights of the output, up to the rounding of logits: those of a row sum to 1.
    np.testing.assert_allclose(np.sum(np.asarray(d_v)[:, 0]), len(q), rtol=3e-5)


def test_nan_shows_in_its_row_alone():
    q, k, v, bias, scale, d_out, d_normaliser = inputs(4, 40, 40)
    q = np.where(np.arange(40)[:, None] == 7, np.float32(np.nan), q)
    results = both(q, k, v, bias, scale, d_out, d_normaliser, reach=CAUSAL)
    (out, _, log_total), (d_q, d_k, d_v, d_bias) = jax.tree.map(np.asarray, results)
    row, seen_by_row = np.arange(40) == 7, np.arange(40) <= 7
    for result in (out, d_q):
        np.testing.assert_array_equal(np.isnan(result), np.broadcast_to(row[:, None], result.shape))
    np.testing.assert_array_equal(np.isnan(log_total), row)
    for result in (d_k, d_v, d_bias[:, None]):
        assert np.isnan(result[seen_by_row]).all()
        assert np.isfinite(result[16:]).all()


def heads(num_heads, num_kv_heads):
    """q [K, N / K, T, D], k and v [K, S, D], and the other operands of `both`."""
    groups = num_heads // num_kv_heads
    tensors = [[inputs(10 * i + j, 40, 33, hidden=0.2) for j in range(groups)] for i in range(num_kv_heads)]
    q, d_out, d_normaliser = (np.stack([np.stack([x[i] for x in row]) for row in tensors]) for i in (0, 5, 6))
    k, v, bias = (np.stack([row[0][i] for row in tensors]) for i in (1, 2, 3))
    return q, k, v, bias, tensors[0][0][4], d_out, d_normaliser


@pytest.mark.parametrize("reach", [FULL, CAUSAL, Reach(3, 9, 4)])
def test_groups_of_heads_share_keys(reach):
    q, k, v, bias, scale, d_out, d_normaliser = operands = heads(4, 2)
    call = functools.partial(both, reach=reach)
    call = jax.vmap(jax.vmap(call, in_axes=(0, None, None, None, None, 0, 0)), in_axes=(0, 0, 0, 0, None, 0, 0))
    results = jax.tree.map(np.asarray, call(*operands))
    for i, j in np.ndindex(q.shape[:2]):
        reference = expected(q[i, j], k[i], v[i], bias[i], scale, d_out[i, j], d_normaliser[i, j], reach=reach)
        assert_as_expected(jax.tree.map(lambda x, i=i, j=j: x[i, j], results), reference, 2e-6)


def test_shared_keys_are_not_copied():
    q, k, v, bias, scale, *_ = heads(4, 2)
    call = jax.vmap(functools.partial(triton.forward, reach=CAUSAL), in_axes=(0, None, None, None, None))
    (kernel,) = (
        e for e in jax.make_jaxpr(call)(q[0], k[0], v[0], bias[0], scale).eqns if e.primitive.name == "pallas_call"
    )
    assert [x.aval.shape for x in kernel.invars[1:4]] == [k.shape[1:], v.shape[1:], bias.shape[1:]]


def test_with_64_bit_types(x64):
    tensors = inputs(5, 45, 51, hidden=0.2)
    for reach in (FULL, Reach(2, 7, 9)):
        assert_as_expected(both(*tensors, reach=reach), expected(*tensors, reach=reach), 2e-6)


def test_only_blocks_within_reach_are_read():
    """NaN in keys after the last block that a query reaches has no effect."""
    q, k, v, bias, scale, d_out, d_normaliser = inputs(6, 32, 96)
    k, v = (np.where(np.arange(96)[:, None] < 64, x, np.float32(np.nan)) for x in (k, v))
    results = both(q, k, v, bias, scale, d_out, d_normaliser, reach=Reach(0, 8, 8))
    (out, _, _), (d_q, d_k, d_v, _) = jax.tree.map(np.asarray, results)
    assert all(np.isfinite(x).all() for x in (out, d_q, d_k[:64], d_v[:64]))
