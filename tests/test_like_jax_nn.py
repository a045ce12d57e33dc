"""``attention(method="exact")`` against `jax.nn.dot_product_attention`, over the cases of JAX's tests."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import attention
from tests.references import as_array

BATCH, HEADS = 2, 4
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


def tensors(queries=6, keys=6, kv_heads=2, dtype=jnp.float32, batch=(BATCH,), heads=HEADS, dim=8):
    random = np.random.default_rng(0)
    shapes = (*batch, queries, heads, dim), *[(*batch, keys, kv_heads, dim)] * 2
    return tuple(as_array(random.normal(size=shape), dtype) for shape in shapes)


@jax.jit
def in_float32(x):
    return jax.tree.map(lambda x: x.astype(jnp.float32), x)


def theirs(*args, **options):
    # JAX's function promotes types and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return program(jax.nn.dot_product_attention, fixed(options))(args, arrays(options))


def ours(*args, **options):
    return program(attention, (*fixed(options), ("method", "exact")))(args, arrays(options))


@functools.cache
def program(function, fixed):
    """One compiled program for all tests that make the same call."""
    return jax.jit(lambda args, arrays: function(*args, **arrays, **dict(fixed)))


def arrays(options):
    return {name: x for name, x in options.items() if isinstance(x, jax.Array)}


def fixed(options):
    return tuple((name, x) for name, x in options.items() if not isinstance(x, jax.Array))


def assert_same(out, expected, dtype=jnp.float32, where=None, spread=1.0):
    # The rounding of logits grows with their spread.
    tolerance = TOLERANCE[dtype] * max(1.0, spread)
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    if where is not None:
        out, expected = out[where], expected[where]
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)


def random_bias(*shape, dtype=jnp.float32):
    return as_array(np.random.default_rng(1).normal(size=shape), dtype)


def random_mask(*shape):
    """A random mask that is true for the first key, so that every query sees one."""
    mask = np.random.default_rng(2).random(shape) < 0.6
    mask[..., 0] = True
    return as_array(mask, bool)


def all_but(shape, *hidden):
    """A mask that is true except at one index."""
    mask = np.ones(shape, bool)
    mask[hidden] = False
    return as_array(mask, bool)


# 1. types, groups, lengths


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_types_and_groups(dtype, kv_heads, causal):
    args = tensors(kv_heads=kv_heads, dtype=dtype)
    out = ours(*args, is_causal=causal)
    assert out.dtype == dtype
    assert_same(out, theirs(*args, is_causal=causal), dtype)


def test_float16():
    """JAX's function does not run on CPUs in float16."""
    args = tensors(dtype=jnp.float16)
    out, residual = ours(*args, is_causal=True, return_residual=True)
    wide_args = tuple(as_array(x) for x in args)
    expected, their_residual = theirs(*wide_args, is_causal=True, return_residual=True)
    assert (out.dtype, residual.dtype) == (jnp.float16, jnp.float32)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-3)
    np.testing.assert_allclose(residual, their_residual, atol=2e-3)
    gradient = jax.jit(jax.grad(lambda args: jnp.sum(in_float32(ours(*args)) ** 2)))(args)
    wide = jax.jit(jax.grad(lambda args: jnp.sum(theirs(*args) ** 2)))(wide_args)
    for x, y in zip(gradient, wide, strict=True):
        assert x.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(x, np.float32), y, atol=2e-2)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 7), (5, 7), (7, 5)], ids=str)
def test_numbers_of_queries_and_keys_may_differ(sizes, causal):
    args = tensors(*sizes)
    assert_same(ours(*args, is_causal=causal), theirs(*args, is_causal=causal))


@pytest.mark.parametrize("scale", [None, 0.3, 1.0, 7.0])
def test_scale(scale):
    args = tensors()
    spread = 1.0 if scale is None else scale
    assert_same(ours(*args, scale=scale), theirs(*args, scale=scale), spread=spread)
    if scale is not None:
        assert_same(ours(*args, scale=as_array(scale)), theirs(*args, scale=scale), spread=spread)


def test_one_sequence_without_a_batch_axis():
    args = tensors(5, 7, batch=())
    assert_same(ours(*args), theirs(*args))
    bias, mask = random_bias(HEADS, 5, 7), random_mask(1, 5, 7)
    batch = as_array(np.asarray(bias)[None]), as_array(np.asarray(mask)[None], bool)
    assert_same(ours(*args, bias, mask), theirs(*args, *batch))
    out, residual = ours(*args, return_residual=True)
    expected, their_residual = theirs(*args, return_residual=True)
    assert residual.shape == their_residual.shape == (5, HEADS)
    assert_same(residual, their_residual)
    assert_same(out, expected)


def test_several_batch_axes_are_one():
    args = tensors(5, 7, batch=(2, 3))
    flat = [as_array(np.reshape(x, (6, *x.shape[2:]))) for x in args]
    assert_same(ours(*args), np.reshape(theirs(*flat), (2, 3, 5, HEADS, 8)))


# 2. bias, masks, lengths, windows


BROADCASTS = list(itertools.product((1, BATCH), (1, HEADS), (1, 5), (1, 7)))


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_masks_and_biases_of_every_shape(shape):
    args = tensors(5, 7)
    bias, mask = random_bias(*shape), random_mask(*shape)
    # JAX's function gets the full shape, so that one program serves all shapes.
    whole = (as_array(np.broadcast_to(x, (BATCH, HEADS, 5, 7)), x.dtype) for x in (bias, mask))
    assert_same(ours(*args, bias, mask), theirs(*args, *whole))


def test_a_mask_of_each_query_and_one_of_each_head_alone():
    args = tensors(5, 7)
    for mask in (random_mask(BATCH, 1, 5, 7), random_mask(1, HEADS, 1, 7), random_mask(BATCH, 1, 1, 7)):
        assert_same(ours(*args, mask=mask), theirs(*args, mask=mask))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("bias_dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
def test_biases_of_other_types(dtype, bias_dtype):
    args, bias = tensors(dtype=dtype), random_bias(1, HEADS, 6, 6, dtype=bias_dtype)
    out = ours(*args, bias)
    assert out.dtype == dtype
    assert_same(out, theirs(*args, bias), dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_bias_and_mask_and_causality_together(causal):
    args, bias, mask = tensors(), random_bias(BATCH, HEADS, 6, 6), random_mask(BATCH, 1, 6, 6)
    options = {"is_causal": causal, "scale": 0.5}
    assert_same(ours(*args, bias, mask, **options), theirs(*args, bias, mask, **options))


LENGTHS = {
    "queries": {"query_seq_lengths": as_array([6, 3], jnp.int32)},
    "keys": {"key_value_seq_lengths": as_array([5, 2], jnp.int32)},
    "both": {
        "query_seq_lengths": as_array([2, 6], jnp.int32),
        "key_value_seq_lengths": as_array([6, 4], jnp.int32),
    },
}


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths, causal):
    """Queries that are padding get 0 in both."""
    args, options = tensors(), {**LENGTHS[lengths], "is_causal": causal}
    assert_same(ours(*args, **options), theirs(*args, **options))


def test_lengths_with_mask_and_bias():
    args, bias, mask = tensors(), random_bias(1, HEADS, 6, 6), random_mask(BATCH, HEADS, 6, 6)
    options = {**LENGTHS["both"], "is_causal": True}
    assert_same(ours(*args, bias, mask, **options), theirs(*args, bias, mask, **options))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("window", [0, 1, 20, (2, 0), (0, 2), (3, 1)], ids=str)
def test_windows(window, causal):
    args, options = tensors(), {"local_window_size": window, "is_causal": causal}
    assert_same(ours(*args, **options), theirs(*args, **options))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_windows_with_lengths_and_padding_masks(causal):
    args, options = tensors(), {"local_window_size": (2, 1), "is_causal": causal, **LENGTHS["both"]}
    seen = np.arange(6)[None, :] < np.array([2, 6])[:, None]  # queries; each sees its own key, but for one sequence
    seen &= np.arange(6)[None, :] < np.array([6, 4])[:, None]
    assert_same(ours(*args, **options), theirs(*args, **options), where=seen)
    options, mask = {"local_window_size": 2, "is_causal": causal}, all_but((BATCH, 1, 1, 6), 1, ..., 5)
    assert_same(ours(*args, mask=mask, **options), theirs(*args, mask=mask, **options))


# 3. residuals


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
def test_residuals_are_wider_than_theirs(dtype):
    """JAX returns log-normalisers in the inputs' type, without a gradient; here they are float32, with one."""
    args = tensors(dtype=dtype)
    out, residual = ours(*args, return_residual=True)
    expected, their_residual = theirs(*args, return_residual=True)
    assert_same(out, expected, dtype)
    assert_same(residual, their_residual, dtype)
    assert (residual.dtype, their_residual.dtype) == (jnp.float32, dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_residuals_have_gradients(causal):
    args = tensors()

    def residuals(function, *args, **options):
        return jax.jit(jax.grad(lambda args: jnp.sum(function(*args, return_residual=True, **options)[1])))(args)

    mine = residuals(ours, *args, is_causal=causal)
    assert not any(np.any(x) for x in residuals(theirs, *args, is_causal=causal))

    def log_normalizers(args):
        query, key, _ = args
        logits = jnp.einsum("btnd,bsnd->btns", query, jnp.repeat(key, 2, axis=2)) / np.sqrt(8)
        hidden = jnp.broadcast_to(np.tri(6, dtype=bool)[None, :, None] | (not causal), logits.shape)
        return jnp.sum(jax.nn.logsumexp(jnp.where(hidden, logits, -jnp.inf), axis=-1))

    expected = jax.jit(jax.grad(log_normalizers))(args)
    for x, y in zip(mine, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_residuals_with_masks_and_lengths():
    args, mask = tensors(), random_mask(BATCH, HEADS, 6, 6)
    for options in ({"mask": mask}, {"bias": random_bias(1, HEADS, 6, 6)}, LENGTHS["keys"], {"local_window_size": 2}):
        out, residual = ours(*args, return_residual=True, **options)
        expected, their_residual = theirs(*args, return_residual=True, **options)
        assert_same(out, expected)
        assert_same(residual, their_residual)


# 4. derivatives and vmap


GRADIENTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"mask": random_mask(BATCH, HEADS, 6, 6)},
    "lengths": {**LENGTHS["both"], "is_causal": True},
    "window": {"local_window_size": (2, 1)},
    "causal window": {"local_window_size": 2, "is_causal": True},
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    args = tensors()
    weights = random_bias(BATCH, 6, HEADS, 8)

    def gradients(function):
        return jax.jit(jax.grad(lambda args: jnp.sum(weights * function(*args, **GRADIENTS[name]))))(args)

    for x, y in zip(gradients(ours), gradients(theirs), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("shape", [(BATCH, HEADS, 6, 6), (1, HEADS, 6, 6), (1, 1, 1, 6), (BATCH, 1, 6, 1)], ids=str)
def test_the_gradient_of_a_bias(shape):
    args, bias, weights = tensors(), random_bias(*shape), random_bias(BATCH, 6, HEADS, 8)

    def gradient(function):
        return jax.jit(jax.grad(lambda bias: jnp.sum(weights * function(*args, bias))))(bias)

    np.testing.assert_allclose(gradient(ours), gradient(theirs), atol=1e-5)


@pytest.mark.usefixtures("models")
def test_gradients_in_bfloat16():
    args = tensors(dtype=jnp.bfloat16)

    def gradients(function):
        return jax.jit(jax.grad(lambda args: jnp.sum(in_float32(function(*args)) ** 2)))(args)

    for x, y in zip(gradients(ours), gradients(theirs), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (x, y)), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 0)], ids=str)
def test_vmap(in_axes):
    stacked = tensors(batch=(3, BATCH))
    args = [x if axis == 0 else as_array(np.asarray(x)[0]) for x, axis in zip(stacked, in_axes, strict=True)]
    out = jax.jit(jax.vmap(lambda *args: attention(*args, method="exact", is_causal=True), in_axes))(*args)
    for i in range(3):
        one = [as_array(np.asarray(x)[i]) if axis == 0 else x for x, axis in zip(args, in_axes, strict=True)]
        assert_same(np.asarray(out)[i], theirs(*one, is_causal=True))


def test_vmap_over_masks_biases_and_lengths():
    args = tensors()
    masks, biases = random_mask(3, BATCH, 1, 6, 6), random_bias(3, 1, HEADS, 6, 6)
    lengths = as_array([[1, 6], [3, 2], [6, 6]], jnp.int32)
    function = jax.vmap(lambda b, m, n: attention(*args, b, m, method="exact", key_value_seq_lengths=n))
    out = jax.jit(function)(biases, masks, lengths)
    for i in range(3):
        bias, mask, length = (as_array(np.asarray(x)[i], x.dtype) for x in (biases, masks, lengths))
        assert_same(np.asarray(out)[i], theirs(*args, bias, mask, key_value_seq_lengths=length))


# 5. differences, and errors in both


def test_a_query_that_sees_nothing_gets_nothing():
    """In JAX it gets the mean of all values, including hidden ones."""
    args, mask = tensors(), all_but((BATCH, HEADS, 6, 6), 0, slice(None), 2)
    out, residual = map(np.asarray, ours(*args, mask=mask, return_residual=True))
    expected = theirs(*args, mask=mask)
    assert not np.any(out[0, 2])
    np.testing.assert_array_equal(residual[0, 2], -np.inf)
    seen = np.ones((BATCH, 6), bool)
    seen[0, 2] = False
    assert_same(out, expected, where=seen)
    gradient = jax.jit(jax.grad(lambda args: jnp.sum(ours(*args, mask=mask) ** 2)))(args)
    assert all(np.isfinite(x).all() for x in gradient)


def test_values_may_have_other_channels():
    query, key, _ = tensors()
    value = random_bias(BATCH, 6, 2, 3)
    out = ours(query, key, value)
    padded = theirs(query, key, as_array(np.pad(value, ((0, 0),) * 3 + ((0, 5),))))
    assert_same(out, np.asarray(padded)[..., :3])


ERRORS = {
    "heads": (lambda q, k, v: (q[:, :, :3], k, v), {}, "key heads must divide query heads, got 2 and 3"),
    "channels": (lambda q, k, v: (q[..., :4], k, v), {}, "must share the head dimension, got 4 and 8"),
    "batch": (lambda q, k, v: (q[:1], k, v), {}, "must have the same batch axes"),
    "keys and values": (lambda q, k, v: (q, k, v[:, :3]), {}, "the same numbers of tokens and heads"),
    "mask shape": (lambda *x: x, {"mask": random_mask(BATCH, 3, 6, 6)}, r"mask must broadcast .* \[2, 4, 6, 6\]"),
    "mask type": (lambda *x: x, {"mask": random_bias(BATCH, 1, 6, 6)}, "mask must be a boolean array"),
    "bias shape": (lambda *x: x, {"bias": random_bias(BATCH, 1, 5, 6)}, r"bias must broadcast .* \[2, 4, 6, 6\]"),
    "lengths shape": (lambda *x: x, {"key_value_seq_lengths": jnp.array([1, 2, 3])}, "must have the batch's shape"),
    "lengths type": (lambda *x: x, {"key_value_seq_lengths": random_bias(2)}, "must be integers"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_an_error_in_both(name):
    change, options, message = ERRORS[name]
    args = [as_array(x) for x in change(*map(np.asarray, tensors()))]
    with pytest.raises((ValueError, TypeError), match=message):  # not the errors of the tests' shape checks
        inspect.unwrap(attention)(*args, method="exact", **options)
    with pytest.raises((ValueError, TypeError, AssertionError)), jax.numpy_rank_promotion("allow"):
        jax.nn.dot_product_attention(*args, **options)


UNSUPPORTED = {
    "a window with a bias": {"bias": random_bias(1, 1, 6, 6), "local_window_size": 2},
    "a window with a mask of each query": {"mask": random_mask(1, 1, 6, 6), "local_window_size": 2},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_says_so(name):
    with pytest.raises(NotImplementedError, match=r"method '(exact|local)' .*support"):
        attention(*tensors(), method="exact", **UNSUPPORTED[name])
