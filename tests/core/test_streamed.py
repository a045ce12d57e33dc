"""Both executions of streamed attention equal brute force in value, normaliser and gradient, at one program size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.core import HIDDEN, dense_state, streamed_state
from approx_attention.kernels import AttentionState, fused
from tests.kernels.cases import by_brute_force, forget_programs
from tests.references import causal_mask, random_head

pytestmark = pytest.mark.all_forms

TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-5}


@pytest.fixture(params=["cpu", "accelerator"])
def execution(request, monkeypatch):
    """Run the tiles for CPUs, or those for other platforms, on this machine."""
    if request.param == "cpu":
        yield request.param
        return
    for function in (fused._forward, fused._backward):
        monkeypatch.setattr(function, "cpu", function.default)
    forget_programs()
    yield request.param
    monkeypatch.undo()
    forget_programs()


def visible_keys(num_queries, num_keys, is_causal, kv_mask=None):
    visible = causal_mask(num_queries, num_keys) if is_causal else np.ones((num_queries, num_keys), bool)
    return visible if kv_mask is None else visible & np.asarray(kv_mask)


def cotangents(num_queries, value_dim):
    """Cotangents of outputs and of normalisers."""
    random = np.random.default_rng(1)
    return random.normal(size=(num_queries, value_dim)), random.normal(size=num_queries)


def in_float64(q, k, v, scale, visible):
    """State and gradients of queries, keys, values and the scale, in float64."""
    state, (d_q, d_k, d_v, _, d_scale) = by_brute_force(q, k, v, None, scale, visible, *cotangents(len(q), v.shape[1]))
    return AttentionState(*state), (d_q, d_k, d_v, d_scale)


def streamed_gradients(q, k, v, scale, kv_mask, is_causal):
    d_out, d_lse = cotangents(len(q), v.shape[1])

    @jax.jit
    def both(q, k, v, scale, kv_mask):
        def state(*tensors):
            return streamed_state(*tensors[:3], kv_mask, scale=tensors[3], is_causal=is_causal)

        found, pull = jax.vjp(state, q, k, v, scale)
        of_lse = jnp.where(jnp.isfinite(found.lse), d_lse.astype(found.lse.dtype), 0)
        return found, pull(AttentionState(d_out.astype(found.out.dtype), of_lse))

    return both(q, k, v, scale, kv_mask)


def assert_close(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = np.abs(np.asarray(b)[np.isfinite(b)]).max(initial=1)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * size)


# Lengths around one tile of each execution, around its strips, and over several tiles.
LENGTHS = [(1, 1, 0), (129, 127, 0), (1100, 1300, 1), (1500, 700, 1), (2100, 2100, 0)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "masked", "dtype"),
    [(*lengths, jnp.float64) for lengths in LENGTHS] + [(1100, 1300, 1, jnp.float32)],
)
def test_values_and_gradients_equal_brute_force(execution, x64, is_causal, num_queries, num_keys, masked, dtype):
    (*head, kv_mask), expected = case(num_queries, num_keys, masked, dtype, is_causal)
    found = streamed_gradients(*head, np.asarray(0.7, dtype), kv_mask, is_causal)
    # Keys that no query sees are padding, set to zero, whose gradient is not needed.
    assert_close(found, expected, TOLERANCE[dtype])


@functools.cache
def case(num_queries, num_keys, masked, dtype, is_causal):
    """A head with a mask, and what both executions must give."""
    q, k, v = (np.asarray(x) for x in random_head(4, num_queries, num_keys, 4, 3, dtype, spread=0.7))
    kv_mask = None
    if masked:
        # In the causal form the first queries see no key.
        kv_mask = (np.arange(num_keys) % 5 != 3) & (np.arange(num_keys) > 5)
        k, v = (np.where(kv_mask[:, None], x, 0) for x in (k, v))
    return (q, k, v, kv_mask), in_float64(q, k, v, 0.7, visible_keys(num_queries, num_keys, is_causal, kv_mask))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_in_weights_and_outputs_alone(execution, x64, is_causal, dtype):
    q, k, v = random_head(5, 1300, 1300, 16, dtype=dtype, spread=0.7)
    state, gradients = streamed_gradients(q, k, v, np.float32(0.25), None, is_causal)
    out, lse = state.out, state.lse
    expected, of_gradients = in_float64(q, k, v, 0.25, visible_keys(1300, 1300, is_causal))
    assert out.dtype == lse.dtype == jnp.float32
    # Products of half-precision numbers are exact in float32, so the normalisers are those of float32.
    np.testing.assert_allclose(lse, expected.lse, atol=1e-5)
    unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(out, expected.out, atol=2 * unit * np.abs(np.asarray(v, np.float64)).max())
    for a, b in zip(gradients[:3], of_gradients[:3], strict=True):
        assert a.dtype == dtype
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= 3 * unit * np.linalg.norm(b)


def test_gradients_of_shared_keys_are_added_before_they_are_rounded(execution):
    q, k, v = random_head(6, 64, 64, 8, dtype=jnp.bfloat16)
    many = np.broadcast_to(np.asarray(q), (256, *q.shape))
    of = lambda q, k, v: jnp.sum(streamed_state(q, k, v).out * v.astype(jnp.float32))  # noqa: E731
    one = jax.jit(jax.grad(of, 1))(*(np.asarray(x, np.float32) for x in (q, k, v)))
    all_heads = jax.jit(jax.grad(lambda k: jnp.sum(jax.vmap(of, (0, None, None))(many, k, v))))(k)
    relative = np.linalg.norm(np.asarray(all_heads, np.float32) / 256 - one) / np.linalg.norm(one)
    assert relative < 0.006


@pytest.mark.parametrize("is_causal", [False, True])
def test_second_derivatives(execution, x64, is_causal):
    q, k, v = random_head(7, 7, 7, 3, dtype=jnp.float64)
    bias = np.where(visible_keys(7, 7, is_causal), 0.0, HIDDEN)
    tiles = lambda q: jnp.sum(streamed_state(q, k, v, is_causal=is_causal).out ** 2)  # noqa: E731
    expected = dense_hessian(q, k, v, bias)
    np.testing.assert_allclose(jax.jit(jax.hessian(tiles))(q), expected, atol=1e-10)
    np.testing.assert_allclose(jax.jit(jax.jacrev(jax.jacrev(tiles)))(q), expected, atol=1e-10)


@jax.jit
@jax.hessian
def dense_hessian(q, k, v, bias):
    return jnp.sum(dense_state(q, k, v, bias).out ** 2)


def lowered(function, length, platform):
    head = jax.ShapeDtypeStruct((length, 16), jnp.bfloat16)
    return jax.jit(function).trace(head, head, head).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("platform", "lengths"), [("tpu", (1024, 131072)), ("cpu", (8192, 131072))])
def test_the_program_does_not_grow_with_the_sequence(platform, lengths, is_causal):
    # The gradient contains the forward pass.
    function = jax.value_and_grad(lambda *x: jnp.sum(streamed_state(*x, is_causal=is_causal).out), (0, 1, 2))
    sizes = {lowered(function, length, platform).count(" = ") for length in lengths}
    assert len(sizes) == 1


def test_accelerators_make_no_copy_of_tensors_in_float32():
    forward = functools.partial(streamed_state, scale=0.25, is_causal=True, implementation="xla")
    text = lowered(lambda *x: forward(*x).out.astype(jnp.bfloat16), 4096, "cuda")
    assert "xbf16>) -> tensor<512x512xf32>" in text
    assert "(tensor<4096x16xbf16>) -> tensor<4096x16xf32>" not in text
    assert "(tensor<512x16xbf16>) -> tensor<512x16xf32>" not in text


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_of_the_streamed_form_is_linear(is_causal, optimized):
    def temporary_bytes(length, backward):
        x = jax.ShapeDtypeStruct((length, 16), jnp.float32)
        function = lambda q, k, v: streamed_state(q, k, v, is_causal=is_causal).out  # noqa: E731
        if backward:
            function = jax.grad(
                lambda q, k, v: jnp.sum(streamed_state(q, k, v, is_causal=is_causal).out), argnums=(0, 1, 2)
            )
        return jax.jit(function).lower(x, x, x).compile(optimized).memory_analysis().temp_size_in_bytes

    for backward in (False, True):
        once, fourfold = temporary_bytes(2**14, backward), temporary_bytes(2**16, backward)
        assert fourfold < 4.5 * once
        assert fourfold < 2**16 * 2**16 * 4 / 64
