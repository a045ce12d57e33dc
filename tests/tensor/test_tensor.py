"""Tensor attention, exact and by the polynomial method, against sums over all tuples in float64."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import (
    AttentionState,
    bounds,
    determinant_attention,
    exact,
    merge,
    polynomial_attention,
    strassen_attention,
    tensor_attention,
    tensor_polynomial,
)
from approx_attention.tensor import (
    TensorSketch,
    anisotropic,
    exp_coefficients,
    running,
    running_tensor_polynomial,
    tensor_inputs,
    tensor_support_basis,
)
from approx_attention.tensor.exact import determinant_channels, strassen_channels
from approx_attention.tensor.inputs import check_causal, scaled
from tests.programs import equations
from tests.references import as_array, compiled
from tests.tensor.tuples import both_methods, brute, close, compiled_exact, compiled_polynomial, masks, tensors

FORMS = [
    (None, None),
    ("both", None),
    ("ordered", None),
    ("both", (3, 5, 4)),
    ("ordered", (5, 3, 7)),
    ("both", (1, 40, 25)),
]
forms = pytest.mark.parametrize(("is_causal", "window"), FORMS)
orders = pytest.mark.parametrize("order", [2, 3, pytest.param(4, marks=pytest.mark.slow)])


@forms
@orders
def test_exact_is_the_sum_over_tuples(x64, order, is_causal, window):
    lengths = [17, 11, 9][: order - 1] if is_causal is None else [13, 15, 11][: order - 1]
    q, keys, values = tensors(0, 13, lengths)
    window = None if window is None else window[: order - 1]
    options = {"is_causal": is_causal, "window": window, "kv_mask": masks(1, keys), "scale": 0.7}
    out, lse = brute(q, keys, values, **options)
    state = compiled(tensor_attention)(q, keys, values, return_state=True, **options)
    close(state.out, out)
    close(state.lse, lse)


@forms
@orders
@pytest.mark.parametrize("chunk_terms", [pytest.param(2**17, marks=pytest.mark.slow), 300])
def test_the_polynomial_method_is_the_sum_over_tuples_of_the_polynomial(
    x64, monkeypatch, order, is_causal, window, chunk_terms
):
    monkeypatch.setattr(running, "CHUNK_TERMS", chunk_terms)
    lengths = [29, 11, 9][: order - 1] if is_causal is None else [29, 31, 20][: order - 1]
    q, keys, values = tensors(2, 29, lengths)
    window = None if window is None else window[: order - 1]
    options = {"is_causal": is_causal, "window": window, "kv_mask": masks(3, keys), "scale": 0.5}
    if is_causal == "ordered" and window is not None:
        with pytest.raises(NotImplementedError, match="tensor_polynomial with is_causal='ordered' supports no window"):
            tensor_polynomial(q, keys, values, **options)
        return
    coefficients = (1.0, 0.9, 0.7, 0.1, 0.06)
    kernel = functools.partial(np.polynomial.polynomial.polyval, c=coefficients)
    out, lse = brute(q, keys, values, kernel=lambda x: kernel(x), **options)
    function = functools.partial(tensor_polynomial, coefficients=coefficients, return_state=True, **options)
    state = jax.jit(function)(q, keys, values)
    close(state.out, out, 1e-11)
    close(state.lse, lse, 1e-11)


@both_methods
def test_identities(x64, method):
    # In NumPy, because JAX compiles a program for each slice, copy and mean.
    q, (k, other), (v, w) = jax.tree.map(np.asarray, tensors(4, 9, (12, 12)))
    one_key, one_value = np.ones_like(other), np.ones_like(w)
    whole = np.asarray(method(q, (k, other), (v, w), scale=0.5))
    # A second set whose keys are all ones leaves attention of order 2, times the mean of its values.
    alone = np.asarray(method(q, (k,), (v,), scale=0.5))
    close(method(q, (k, one_key), (v, one_value), scale=0.5), alone)
    close(method(q, (k, one_key), (v, w), scale=0.5), alone * np.mean(w, axis=0))
    # The order of the sets, and of the keys in each, does not matter, and neither do copies.
    close(method(q, (other, k), (w, v), scale=0.5), whole)
    close(method(q, (k[::-1], other), (v[::-1], w), scale=0.5), whole)
    close(method(q[::-1], (k, other), (v, w), scale=0.5), whole[::-1])
    close(method(q, (np.tile(k, (2, 1)), other), (np.tile(v, (2, 1)), w), scale=0.5), whole)
    # Scaling a channel of one factor, and another inversely, changes nothing; the scale may be negative.
    gauge = np.array([2.0, -1.0, 0.5, -3.0])
    close(method(q * gauge, (k / gauge, other), (v, w), scale=0.5), whole)
    close(method(-q, (k, other), (v, w), scale=-0.5), whole)
    uniform = np.mean(v, axis=0) * np.mean(w, axis=0)
    close(method(0 * q, (k, other), (v, w), scale=0.5), np.broadcast_to(uniform, whole.shape))
    ones = np.ones_like(v), np.ones_like(w)
    close(method(q, (k, other), ones, scale=0.5), np.ones((9, 3)))
    stacked = method(q, np.stack([k, k]), np.stack([v, v]), scale=0.5)
    close(stacked, method(q, (k, k), (v, v), scale=0.5))


def test_order_two_is_ordinary_attention():
    q, (k,), (v,) = tensors(5, 40, (50,), dim=8, value_dim=8, dtype=jnp.float32)
    close(compiled_exact(q, k, v), compiled(exact)(q, k, v), 1e-6)
    close(compiled_exact(q, k, v, is_causal="both"), compiled(exact)(q, k, v, is_causal=True), 1e-6)
    close(compiled_polynomial(q, k, v, degree=3), compiled(polynomial_attention)(q, k, v, degree=3), 1e-5)


def test_polynomials_of_degree_zero_and_of_even_degree(x64):
    q, keys, values = tensors(6, 8, (9, 7), spread=3.0)
    uniform = np.mean(np.asarray(values[0]), axis=0) * np.mean(np.asarray(values[1]), axis=0)
    close(compiled_polynomial(q, keys, values, degree=0), np.broadcast_to(uniform, (8, 3)))
    for degree in (2, 4, 6):  # for logits of any size
        assert np.all(np.isfinite(compiled_polynomial(q, keys, values, degree=degree, return_state=True).lse))


@both_methods
@pytest.mark.parametrize("is_causal", ["both", "ordered"])
def test_the_first_token_answers_itself_and_no_later_one_matters(method, is_causal):
    q, keys, values = tensors(7, 150, (150, 150), dtype=jnp.float32, spread=0.5)
    out = method(q, keys, values, is_causal=is_causal)
    close(np.asarray(out)[0], np.asarray(values[0])[0] * np.asarray(values[1])[0], 1e-5)
    later = jax.tree.map(lambda x: np.where(np.arange(150)[:, None] < 70, x, np.float32(1e3)), (keys, values))
    close(np.asarray(method(q, *later, is_causal=is_causal))[:70], np.asarray(out)[:70], 1e-5)


@functools.partial(jax.jit, static_argnames=("method", "is_causal", "window"))
def value_and_gradients(inputs, kv_mask, *, method, is_causal, window):
    """A weighted sum of outputs with the state, and gradients of q, keys and values: one program for two tests."""
    weights = np.random.default_rng(0).normal(size=(5, 3))

    def value(inputs):
        state = method(*inputs, is_causal=is_causal, window=window, kv_mask=kv_mask, return_state=True)
        return jnp.sum(weights * state.out), state

    return jax.value_and_grad(value, has_aux=True)(inputs)


@both_methods
def test_padding_holds_anything_and_no_key_gives_zero(x64, method):
    q, keys, values = jax.tree.map(np.asarray, tensors(8, 5, (5, 5)))
    real = np.arange(5) < 3, np.arange(5) < 2
    filled = [
        tuple(np.where(mask[:, None], x, np.nan) for x, mask in zip(xs, real, strict=True)) for xs in (keys, values)
    ]
    for is_causal in (None, "both", "ordered"):
        call = functools.partial(value_and_gradients, method=method, is_causal=is_causal, window=None)
        (_, clean), _ = call((q, keys, values), real)
        (_, state), gradients = call((q, *filled), real)
        close(state.out, clean.out)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
        (_, nothing), _ = call((q, *filled), (np.zeros(5, bool), real[1]))
        close(nothing.out, np.zeros((5, 3)))
        assert np.all(np.isneginf(nothing.lse))


@both_methods
@pytest.mark.parametrize(("is_causal", "window"), [(None, None), ("both", None), ("ordered", None), ("both", (3, 2))])
def test_gradients_against_finite_differences(x64, method, is_causal, window):
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tensors(9, 5, (5, 5), spread=0.7)))
    ends = np.cumsum([x.size for x in leaves])[:-1]
    real = np.ones(5, bool), np.arange(5) != 3

    def flat(x):
        parts = [part.reshape(leaf.shape) for part, leaf in zip(np.split(x, ends), leaves, strict=True)]
        (value, _), gradients = value_and_gradients(
            jax.tree.unflatten(structure, parts), real, method=method, is_causal=is_causal, window=window
        )
        return float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradients)])

    inputs = np.concatenate([np.ravel(x) for x in leaves])
    gradient = flat(inputs)[1]
    for i in range(0, inputs.size, 7):
        step = 1e-5 * (np.arange(inputs.size) == i)
        close(gradient[i], (flat(inputs + step)[0] - flat(inputs - step)[0]) / 2e-5, 1e-7)


def test_states_of_parts_of_a_set_merge(x64):
    q, (k, other), (v, w) = tensors(10, 8, (12, 7))
    whole = compiled_exact(q, (k, other), (v, w), return_state=True)
    k, v = np.asarray(k), np.asarray(v)
    parts = [compiled_exact(q, (k[s], other), (v[s], w), return_state=True) for s in (slice(6), slice(6, None))]
    merged = compiled(merge)(*parts)
    close(merged.out, whole.out)
    close(merged.lse, whole.lse)
    assert isinstance(whole, AttentionState)


def test_large_logits_stay_finite():
    q, keys, values = tensors(11, 6, (9, 7), dtype=jnp.float32)
    out = compiled_exact(1e3 * np.asarray(q), keys, values, scale=1.0)
    assert np.all(np.isfinite(out))
    pairs = np.einsum("id,jd,ld->ijl", q, *keys).reshape(6, -1).argmax(axis=1)
    expected = np.asarray(values[0])[pairs // 7] * np.asarray(values[1])[pairs % 7]
    close(out, expected, 1e-3)


@both_methods
def test_every_row_and_head_alone(method):
    q, keys, values = tensors(12, 6, (9, 7), dtype=jnp.float32)
    rows, out = np.asarray(q), np.asarray(method(q, keys, values))
    close(np.concatenate([method(row[None], keys, values) for row in rows]), out, 1e-5)
    heads = np.asarray(jax.jit(jax.vmap(lambda q: method(q, keys, values)))(np.stack([rows, 2 * rows])))
    close(heads[0], out, 1e-5)
    close(heads[1], method(2 * rows, keys, values), 1e-5)
    half = method(*jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), (q, keys, values)))
    assert half.dtype == jnp.bfloat16
    close(np.asarray(half, np.float32), out, 0.1)


def test_exact_blocks_do_not_matter(x64, monkeypatch):
    from approx_attention.tensor import inputs as floor

    q, keys, values = tensors(13, 70, (130, 90), dim=3)
    options = {"kv_mask": masks(1, keys)}

    def both():
        calls = ({}, {"is_causal": "ordered", "window": (20, 30)})
        return [jax.jit(functools.partial(tensor_attention, **call, **options))(q, keys, values) for call in calls]

    whole, causal = both()
    monkeypatch.setattr(floor, "LEAST_TILE", 500)
    monkeypatch.setattr(floor, "LEAST_ROWS", 7)
    for found, expected in zip(both(), (whole, causal), strict=True):
        close(found, expected)


REMATERIALISED = {
    "exact": functools.partial(tensor_attention),
    "window": functools.partial(tensor_attention, is_causal="both", window=(256, 32)),
    "polynomial": functools.partial(tensor_polynomial, degree=4),
    "polynomial causal": functools.partial(tensor_polynomial, degree=4, is_causal="ordered"),
    "polynomial window": functools.partial(tensor_polynomial, degree=4, is_causal="both", window=512),
}


@pytest.mark.all_forms
@pytest.mark.parametrize("name", REMATERIALISED)
def test_no_array_of_a_derivative_is_of_the_size_of_all_pairs(name):
    def gradient(q, k, v):
        return jax.vjp(REMATERIALISED[name], q, k, v)[1](jnp.ones((2**15, 8)))

    q, k = jax.ShapeDtypeStruct((2**15, 8), jnp.float32), jax.ShapeDtypeStruct((2, 2**15, 8), jnp.float32)
    sizes = [
        math.prod(x.aval.shape)
        for equation, _ in equations(jax.make_jaxpr(gradient)(q, k, k).jaxpr)
        for x in (*equation.invars, *equation.outvars)
        if hasattr(x.aval, "shape")
    ]
    assert max(sizes) <= 2**23


@pytest.mark.slow
def test_what_a_derivative_computes_again_does_not_matter(x64, monkeypatch):
    from approx_attention.tensor import inputs as shared

    monkeypatch.setattr(running, "CHUNK_TERMS", 300)
    monkeypatch.setattr(shared, "LEAST_TILE", 1)
    monkeypatch.setattr(shared, "LEAST_ROWS", 4)
    inputs = tensors(21, 45, (45, 45))
    for method, options in (
        (tensor_attention, {}),
        (tensor_polynomial, {"is_causal": "both", "window": (17, 30)}),
    ):
        call = lambda *inputs: jnp.sum(method(*inputs, **options) ** 2)  # noqa: B023, E731
        gradient = jax.value_and_grad(call, (0, 1, 2))
        held = jax.jit(gradient)(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(shared, "GREATEST_TILE", 0)
            patch.setattr(running, "GREATEST_TILE", 0)
            again = jax.jit(lambda *inputs: gradient(*inputs))(*inputs)  # noqa: B023
        jax.tree.map(close, again, held)


def test_a_decoder_has_one_dtype_and_ignores_padding(x64):
    q, keys, values = tensors(22, 4, (4, 4))
    for dtype in (jnp.float32, jnp.float64):
        decoder = running_tensor_polynomial(4, dtype=dtype)
        real = np.array([True, False, True, True])
        first, second, third = jax.tree.map(lambda x: np.asarray(x, dtype), (q, keys, values))  # noqa: B023
        step = jax.jit(decoder.step)
        start = jax.jit(decoder.init, static_argnums=0)(3)
        state, out = step(start, first, second, third, (real, real))
        assert all(x.dtype == dtype for x in jax.tree.leaves((state, out)))
        filled = jax.tree.map(lambda x: np.where(real[:, None], x, dtype(np.nan)), (second, third))  # noqa: B023
        close(step(start, first, *filled, (real, real))[1].out, out.out)
    with pytest.raises(ValueError, match="is_causal must be one of both, ordered; got None"):
        inspect.unwrap(running_tensor_polynomial)(4, is_causal=None)
    with pytest.raises(TypeError, match="order must be an integer known when tracing, got '3'"):
        inspect.unwrap(running_tensor_polynomial)(4, order="3")


@pytest.mark.parametrize("is_causal", ["both", "ordered"])
def test_decoding_is_the_causal_form(x64, is_causal):
    q, keys, values = tensors(14, 20, (20, 20, 20))
    decoder = running_tensor_polynomial(4, order=4, degree=3, is_causal=is_causal, dtype=jnp.float64)
    whole = np.asarray(compiled_polynomial(q, keys, values, degree=3, scale=0.5, is_causal=is_causal))
    q, keys, values = jax.tree.map(np.asarray, (q, keys, values))
    state, start, step = jax.jit(decoder.init, static_argnums=0)(3), 0, jax.jit(decoder.step)
    size = jax.tree.map(jnp.shape, state)
    for length in (1, 6, 1, 6, 6):
        part = slice(start, start + length)
        tokens = tuple(k[part] for k in keys), tuple(v[part] for v in values)
        state, answer = step(state, 0.5 * q[part], *tokens)
        close(answer.out, whole[part])
        start += length
    assert jax.tree.map(jnp.shape, state) == size


def test_windows_that_cover_all_are_causal(x64):
    q, keys, values = tensors(15, 20, (20, 20))
    for method in (compiled_exact, compiled_polynomial):
        close(method(q, keys, values, is_causal="both", window=20), method(q, keys, values, is_causal="both"))


def test_determinants_are_volumes_that_rotations_leave_alone(x64):
    q, keys, values = tensors(16, 5, (6, 7), dim=6)
    grouped = [np.asarray(x).reshape(-1, 2, 3) for x in (q, *keys)]
    logits = np.zeros((5, 6, 7))
    for i, j, n, g in itertools.product(range(5), range(6), range(7), range(2)):
        logits[i, j, n] += np.linalg.det(np.stack([grouped[0][i, g], grouped[1][j, g], grouped[2][n, g]]))
    weights = np.exp(logits / math.sqrt(6))
    expected = np.einsum("ijl,jc,lc->ic", weights, *values) / weights.sum(axis=(1, 2))[:, None]
    determinant = compiled(determinant_attention)
    close(determinant(q, keys, values), expected)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    turned = [(x @ rotation).reshape(x.shape[0], 6) for x in grouped]
    close(determinant(*jax.device_put((turned[0], tuple(turned[1:]))), values), expected)
    close(determinant(q, keys, values, scale=None), expected)
    with pytest.raises(ValueError, match="two sets of keys and 3 n channels, got 1 and 6"):
        determinant_channels(q, keys[0])
    with pytest.raises(ValueError, match="two sets of keys and 3 n channels, got 2 and 4"):
        determinant_attention(*jax.tree.map(lambda x: as_array(np.asarray(x)[:, :4], x.dtype), (q, keys)), values)


def test_strassen_attention_is_that_of_its_channels(x64):
    f, (g, h), values = tensors(17, 6, (9, 7))
    real = masks(5, (g, h))
    strassen = jax.jit(strassen_attention)
    channels = jax.jit(strassen_channels)
    for queries in (f, 20 * np.asarray(f)):
        lifted = compiled_exact(*channels(queries, (g, h)), values, scale=0.5, kv_mask=real)
        close(strassen(queries, (g, h), values, kv_mask=real), lifted)
    none = (np.zeros(9, bool), real[1])
    close(strassen(f, (g, h), values, kv_mask=none), np.zeros((6, 3)))
    slopes = jax.jit(jax.grad(lambda xs: jnp.sum(strassen_attention(*xs, kv_mask=none))))((f, (g, h), values))
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(slopes))
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        strassen_attention(f, (g, h), values, scale=math.inf)
    with pytest.raises(ValueError, match="strassen_channels needs two sets of keys, got 1"):
        strassen_channels(f, g)
    # If cancellation leaves nothing of any pair, the output is NaN, not a wrong number.
    f, g, h = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), np.array([[-5.0, 1.0], [5.0, -1.0]])
    values = np.ones((1, 1)), np.ones((2, 1))
    assert np.all(np.isnan(strassen(f, (g, h), values, scale=1e3)))
    close(compiled_exact(*channels(f, (g, h)), values, scale=1e3), np.ones((1, 1)))


def test_large_rows_are_exact_in_the_support_basis(x64):
    q, keys, values = jax.tree.map(np.array, tensors(18, 12, (14, 13), spread=0.2))
    q[3] *= 50
    keys[0][[2, 9]] *= 40
    keys[1][5] *= 60
    real = masks(6, keys)
    options = {"kv_mask": real, "scale": 0.5}
    expected = np.asarray(compiled_exact(q, keys, values, **options))
    large = {"num_large_queries": 1, "num_large_keys": 2}
    split = jax.jit(functools.partial(tensor_support_basis, degree=6, **large))(q, keys, values, **options)
    assert np.max(np.abs(split - expected)) < 1e-8
    assert np.max(np.abs(compiled_polynomial(q, keys, values, degree=6, **options) - expected)) > 1e-2
    everything = {"num_large_queries": 0, "num_large_keys": 13}
    inputs = q, (keys[0][:13], keys[1]), (values[0][:13], values[1])
    close(jax.jit(functools.partial(tensor_support_basis, **everything))(*inputs), compiled_exact(*inputs))
    with pytest.raises(ValueError, match="num_large_keys must be at most the number of tokens, 13, got 14"):
        tensor_support_basis(*jax.tree.map(jax.device_put, (q, keys, values)), num_large_keys=14)


@pytest.mark.slow
def test_kinds_of_coefficients_and_features(x64):
    q, keys, values = tensors(20, 16, (18, 17), spread=0.7)
    q = q * jnp.array([2.0, 1.0, 0.3, 0.05])[None]
    expected = tensor_attention(q, keys, values, scale=0.5)
    beta = float(bounds.logit_bound(q, keys, scale=0.5))

    def error(**options):
        out = jax.jit(functools.partial(tensor_polynomial, scale=0.5, **options))(q, keys, values)
        return float(np.max(np.abs(out - expected)))

    named = error(degree=4, coefficients="minimax", bound=beta)
    close(named, error(coefficients=exp_coefficients("minimax", 4, bound=beta)), 1e-9)
    with pytest.raises(ValueError, match="minimax needs bound"):
        error(degree=4, coefficients="minimax")
    for options, told in (
        ({"bound": -3.0}, "bound=-3.0 with 'taylor'"),
        ({"coefficients": (1.0, 1.0, 0.5), "rms": 2.0}, "rms=2.0 with coefficients that are numbers"),
    ):
        with pytest.raises(ValueError, match=f"is only for coefficients .*, got {told}"):
            error(**options)
        with pytest.raises(ValueError, match=f"is only for coefficients .*, got {told}"):
            bounds.tensor_certificate(q, keys, values, scale=0.5, **options)
    largest = [np.max(np.abs(x), axis=0) for x in (q, *keys)]
    indices, _ = anisotropic(tuple(0.5 * largest[0] * largest[1] * largest[2]), 35)
    assert error(features=indices) < error(degree=3)  # with as many features
    # A sketch of the highest degree alone, large enough to be near.
    maps = TensorSketch.draw(jax.random.key(0), 4096, 4, 3, order=3, exact_degree=2)
    assert error(features=maps) < 3 * error(degree=3)
    pair = TensorSketch.draw(jax.random.key(0), 16, 4, 3, order=2)
    ordinary = (method(q, keys[0], values[0], features=pair) for method in (polynomial_attention, tensor_polynomial))
    close(*ordinary, 1e-9)
    with pytest.raises(ValueError, match="features must be 3 maps, that of queries first, got 2"):
        error(features=maps[:2])
    with pytest.raises(ValueError, match="degree must be 2, that of the 3 coefficients, got 4"):
        error(degree=4, coefficients=(1.0, 1.0, 0.5))
    with pytest.raises(ValueError, match="degree must be that of the features, 3, got 4"):
        error(degree=4, features=maps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((2, 5, 3))}, "q and k must share the head dimension, got 4 and, in set 0, 3"),
        ({"v": jnp.ones((1, 5, 3))}, "the same number of sets of tokens, got 2 and 1"),
        ({"v": (jnp.ones((5, 3)), jnp.ones((4, 3)))}, r"v must be \[S, Dv\] for each set of keys"),
        ({"v": jnp.ones((2, 5, 0))}, r"at least one query, key and channel; got .* and v \(5, 0\)"),
        ({"kv_mask": (None,)}, "one mask for each of 2 sets of keys, got 1"),
        ({"window": 3}, "needs is_causal='both' or 'ordered'"),
        ({"window": (3, 2, 1), "is_causal": "both"}, "one count for each of 2 sets of keys"),
        ({"window": 0, "is_causal": "both"}, "window must be at least 1, got 0"),
        ({"scale": math.inf}, "scale must be finite"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"q": jnp.ones((5, 4)), "k": jnp.ones((2, 5, 4)), "v": jnp.ones((2, 5, 3)), **change}
    for method in (tensor_attention, tensor_polynomial):
        with pytest.raises(ValueError, match=message):
            method(**arguments)
    with pytest.raises(ValueError, match="is_causal must be one of both, ordered"):
        check_causal(True, None, 2)
    with pytest.raises(ValueError, match=r"q must be \[T, D\], one head without batch axes"):
        tensor_inputs(jnp.ones((2, 5, 4)), jnp.ones((2, 5, 4)), jnp.ones((2, 5, 3)))
    with pytest.raises(TypeError, match="kv_mask must be a boolean array or a tuple of them, got True"):
        tensor_attention(jnp.ones((5, 4)), jnp.ones((2, 5, 4)), jnp.ones((2, 5, 3)), kv_mask=True)
    with pytest.raises(TypeError, match="window must be an integer known when tracing, got 2.5"):
        check_causal("both", 2.5, 2)
    with pytest.raises(TypeError, match="scale must be one number, got"):
        inspect.unwrap(scaled)(jnp.ones((5, 4)), [1.0])
    with pytest.raises(TypeError, match="k must be a floating-point array"):
        tensor_attention(jnp.ones((5, 4)), jnp.ones((2, 5, 4), int), jnp.ones((2, 5, 3)))
