"""Every form of the operation equals brute force, in values and in gradients, for all shapes and reaches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from approx_attention import kernels
from approx_attention.kernels import HIDDEN, mosaic
from tests.kernels.cases import (
    FORMS,
    assert_close,
    by_brute_force,
    random_operands,
    running,
    seen_pairs,
    state_and_gradients,
)

pytestmark = pytest.mark.all_forms


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    with running(request.param) as implementation:
        yield implementation


def reference_of(q, k, v, bias, scale, d_out, d_lse, **reach):
    return by_brute_force(q, k, v, bias, scale, seen_pairs(len(q), len(k), **reach), d_out, d_lse)


def check(form, operands, tolerance=2e-6, reference=None, **reach):
    """Compare values and gradients with brute force; returns the computed ones."""
    q, k, v, bias, scale, *_ = operands
    found, gradients = state_and_gradients(*operands, **reach, implementation=form)
    expected, of_gradients = reference_of(*operands, **reach) if reference is None else reference
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == scale.dtype
        assert_close(x, y, tolerance)
    # The gradient of the scale is a sum over queries of terms of both signs.
    terms = np.linalg.norm(np.sum(of_gradients[0] * np.asarray(q, np.float64), axis=1) / float(scale))
    for x, y, operand in zip(gradients, of_gradients, (q, k, v, bias, scale), strict=True):
        if operand is not None:
            assert x.dtype == operand.dtype
            assert_close(x, y, tolerance, size=max(1, terms) if operand is scale else 1)
    return found, gradients


lengths = st.one_of(st.integers(1, 300), st.sampled_from((1, 128, 129, 1100)))
# A negative reach begins after the query, or ends before it.
reaches = st.one_of(st.none(), st.integers(-20, 40), st.integers(0, 400))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(
    num_queries=lengths,
    num_keys=lengths,
    dims=st.sampled_from(((8, 8), (5, 3), (16, 40), (1, 1))),
    offset=st.one_of(st.just(0), st.integers(-200, 200)),
    left=reaches,
    right=reaches,
    hidden=st.sampled_from((0.0, 0.3, 1.0)),
    has_bias=st.booleans(),
)
# A bound may be any number.
@example(1100, 700, (8, 5), -100, 2**40, 0, 0.3, True)
@example(300, 1100, (8, 5), 500, 200, 150, 0.3, True)
@example(1100, 300, (8, 5), 0, 70, 3, 0.3, True)
@example(1030, 1030, (8, 8), 0, None, 0, 0.0, False)
@example(1, 300, (3, 2), 299, 130, 0, 0.0, False)
@example(300, 300, (8, 8), 0, -5, 20, 0.0, True)
def test_values_and_gradients_equal_brute_force(
    form, num_queries, num_keys, dims, offset, left, right, hidden, has_bias
):
    operands = operands_with_bias_or_not(num_queries, num_keys, dims, hidden, has_bias)
    reach = {"offset": offset, "left": left, "right": right}
    reference = reference_for_all_forms(num_queries, num_keys, dims, hidden, has_bias, **reach)
    check(form, operands, reference=reference, **reach)


def operands_with_bias_or_not(num_queries, num_keys, dims, hidden, has_bias):
    q, k, v, bias, *others = random_operands(num_queries, num_queries, num_keys, *dims, hidden=hidden)
    return q, k, v, bias if has_bias else None, *others


@functools.cache
def reference_for_all_forms(*case, **reach):
    return reference_of(*operands_with_bias_or_not(*case), **reach)


def test_rows_that_see_nothing_are_empty_and_have_no_gradient(form):
    # Queries 0 to 4 are before the first key, and those from 75 on see only hidden keys.
    operands = list(random_operands(1, 140, 130))
    operands[3] = np.where(np.arange(130) < 70, operands[3], np.float32(HIDDEN))
    found, gradients = check(form, operands, offset=-5, left=0, right=0)
    (out, lse), (d_q, d_k, d_v, d_bias, _) = jax.tree.map(np.asarray, (found, gradients))
    for unseen in (slice(0, 5), slice(75, None)):
        assert not np.any(out[unseen])
        assert np.all(lse[unseen] == -np.inf)
        assert not np.any(d_q[unseen])
    assert np.all(np.isfinite(lse[5:75]))
    for gradient in (d_k, d_v, d_bias):
        assert not np.any(gradient[70:])


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 3), (3, 0)])
def test_no_query_or_no_key(form, num_queries, num_keys):
    operands = random_operands(2, num_queries, num_keys)
    (out, lse), gradients = jax.tree.map(
        np.asarray, state_and_gradients(*operands, right=0, implementation=form), is_leaf=lambda x: x is None
    )
    assert out.shape == (num_queries, 8)
    assert np.all(lse == -np.inf)
    assert not np.any(out)
    for gradient, operand in zip(gradients, operands, strict=False):
        assert gradient.shape == operand.shape
        assert not np.any(gradient)


# Reaches that select the different forms on a CPU: all keys, causal, a window, and any other.
REACHES = [{}, {"right": 0}, {"left": 9, "right": 3}, {"offset": 3, "left": 30}]


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_hidden_keys_hold_does_not_matter(form, bad, reach):
    q, k, v, bias, *others = random_operands(3, 140, 140, hidden=0.4)
    hidden = np.asarray(bias) <= HIDDEN
    k, v = (np.where(hidden[:, None], np.float32(bad), x) for x in (k, v))
    # A hidden key has no effect.
    bias = np.where(hidden, np.where(np.arange(140) % 2 == 0, -np.inf, HIDDEN), bias).astype(np.float32)
    check(form, (q, k, v, bias, *others), **reach)


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_nan_in_a_query_shows_in_its_row_alone(form, reach):
    operands = list(random_operands(4, 140, 140))
    whole, _ = state_and_gradients(*operands, **reach, implementation=form)
    operands[0] = np.array(operands[0])
    operands[0][77, 2] = np.nan
    found, gradients = state_and_gradients(*operands, **reach, implementation=form)
    found, whole, gradients = jax.tree.map(np.asarray, (found, whole, gradients))
    for x, y in zip(found, whole, strict=True):
        assert np.all(np.isnan(x[77]))
        others = np.arange(140) != 77
        np.testing.assert_allclose(x[others], y[others], atol=1e-6)
    assert np.all(np.isnan(gradients[0][77]))
    assert np.all(np.isfinite(np.delete(gradients[0], 77, axis=0)))


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_nan_in_a_key_shows_in_every_row_that_sees_it(form, reach):
    operands = list(random_operands(4, 140, 140))
    operands[1] = np.array(operands[1])
    operands[1][77, 2] = np.nan
    found, (d_q, *_) = jax.tree.map(np.asarray, state_and_gradients(*operands, **reach, implementation=form))
    seen = seen_pairs(140, 140, **reach)[:, 77]
    # Gradients of other rows may be NaN, from 0 times NaN.
    assert np.all(np.isnan(d_q[seen]))
    for x in found:
        assert np.all(np.isnan(x[seen]))
        assert np.all(np.isfinite(x[~seen]))


@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_logits_of_ten_thousand_and_more(form, reach):
    """Integers make logits exact, and weights too, except where they are computed as powers of 2."""
    random = np.random.default_rng(5)
    q, k, v, bias, _, *cotangents = random_operands(5, 140, 140)
    q, k = (random.integers(-60, 60, x.shape).astype(np.float32) for x in (q, k))
    # Keys come in equal pairs, which share their weight.
    k[1::2], bias = k[::2], np.round(bias)
    largest = float(np.abs(q @ k.T).max())
    assert largest > 1e4
    tolerance = largest * 2.0**-23 if form == "interpret_gpu" else 2e-6
    check(form, (q, k, v, bias, np.float32(1), *cotangents), tolerance, **reach)


@pytest.mark.parametrize(("dtype", "reach"), [(jnp.bfloat16, REACHES[1]), (jnp.float16, REACHES[2])])
def test_half_precision_is_rounded_in_weights_and_logits_alone(form, dtype, reach):
    q, k, v, bias, scale, *cotangents = random_operands(6, 300, 300, 16, 24, dtype, hidden=0.2)
    found, gradients = state_and_gradients(q, k, v, bias, scale, *cotangents, **reach, implementation=form)
    expected, of_gradients = reference_of(q, k, v, bias, scale, *cotangents, **reach)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    unit = float(jnp.finfo(dtype).eps) / 2
    # Products of numbers in half precision are exact in float32.
    assert_close(found[1], expected[1], 2e-6)
    assert_close(found[0], expected[0], 2 * unit)
    for x, y, operand in zip(gradients, of_gradients, (q, k, v, bias, scale), strict=True):
        assert x.dtype == operand.dtype
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= 4 * unit * np.linalg.norm(y)


@pytest.mark.parametrize("reach", REACHES[1:3], ids=str)
def test_float64(form, x64, reach):
    """No kernel supports float64; tiles are used."""
    check(form, random_operands(7, 140, 140, 8, 5, np.float64, hidden=0.2), 1e-12, **reach)


def test_operands_of_several_dtypes_are_promoted():
    """For all forms alike."""
    operands = [np.asarray(x) for x in random_operands(8, 140, 140)]
    operands[1] = operands[1].astype(jnp.bfloat16)
    found, (_, d_k, *_) = state_and_gradients(*operands, right=0, implementation=None)
    assert d_k.dtype == jnp.bfloat16
    assert found[0].dtype == jnp.float32
    expected, _ = reference_of(*operands, right=0)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, 2e-6)


def test_tiles_are_those_that_are_asked_for():
    q, k, v, *_ = random_operands(9, 300, 300)
    small = mosaic.Tiles(mosaic.Tile(128, 128, 128), mosaic.Tile(128, 128, 128))
    text = {
        tiles: jax.jit(lambda *x, tiles=tiles: kernels.state(*x, implementation="interpret", tiles=tiles).out)
        .lower(q, k, v)
        .as_text()
        for tiles in (None, small, "of another kernel")
    }
    assert text[None] == text["of another kernel"] != text[small]
