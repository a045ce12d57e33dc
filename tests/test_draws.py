"""Random projections are sampled once from a key, and never if they are given: counted in traced programs.

The tests count the QR decompositions of `favor` and `scatterbrain`. Other methods sample numbers without one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from approx_attention import METHODS, HeadsDecoder, attention, distributed, linen
from approx_attention.evaluation import Tensors, compile_arm
from approx_attention.evaluation.arms import method_arm
from approx_attention.evaluation.problem import Problem
from approx_attention.nnx import ApproxAttention
from approx_attention.registry import bind
from tests.forms import FORM
from tests.programs import equations, num_decompositions_in
from tests.references import random_head, random_heads

SIZES = {"favor": {"num_features": 20, "block_size": 8}, "scatterbrain": {"num_features": 20, "window_size": 8}}
BATCH, NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, DIM = 2, 64, 4, 2, 8
names = pytest.mark.parametrize("name", sorted(SIZES))
causality = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


@functools.cache
def tensors():
    return random_heads(0, BATCH, NUM_TOKENS, NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, DIM)


@functools.cache
def projections(name):
    draw = functools.partial(bind(name, SIZES[name]).draw, num_kv_heads=NUM_KV_HEADS, head_dim=DIM)
    return jax.jit(draw)(jax.random.key(7))["projection"]


@functools.cache
def attended(name, is_causal):
    return attention(*tensors(), method=name, rng=jax.random.key(7), is_causal=is_causal, **SIZES[name])


def num_draws(function, *arguments):
    """The number of QR decompositions of a program, on CPUs and on other platforms: loops count once."""
    counts = []
    for form in ("cpu", "default"):
        with FORM(form):
            traced = jax.make_jaxpr(function)(*arguments)
        counts.append(sum(equation.primitive.name == "qr" for equation, _ in equations(traced.jaxpr)))
    assert counts[0] == counts[1]
    return counts[0]


def test_methods_that_decompose_are_these():
    x = jnp.zeros((NUM_TOKENS, DIM))
    for name, method in METHODS.items():
        own = {**SIZES.get(name, {} if method.size is None else {method.size: 4})}
        if name in ("svd", "polynomial"):
            continue
        call = functools.partial(method.function, x, x, x, **own)
        assert num_draws(call, jax.random.key(0)) == (name in SIZES), name


@names
@causality
def test_attention_draws_once_for_all_heads(name, is_causal):
    def function(*args):
        return attention(*args[:3], method=name, rng=args[3], is_causal=is_causal, **SIZES[name])

    def loss(*args):
        return jnp.sum(function(*args))

    for program in (function, jax.grad(loss)):
        assert num_draws(program, *tensors(), jax.random.key(0)) == 1


@names
@causality
def test_attention_draws_nothing_where_projections_are_given(name, is_causal):
    options = {"method": name, "is_causal": is_causal, **SIZES[name]}
    own, rng = projections(name), jax.random.key(7)
    routes = {
        "per head": lambda q, k, v, w: attention(q, k, v, per_head={"projection": w}, **options),
        "per head, with a key": lambda q, k, v, w: attention(q, k, v, rng=rng, per_head={"projection": w}, **options),
        "for all": lambda q, k, v, w: attention(q, k, v, projection=w[0], **options),
        "for all, with a key": lambda q, k, v, w: attention(q, k, v, rng=rng, projection=w[0], **options),
    }
    for route, function in routes.items():
        assert num_draws(function, *tensors(), own) == 0, route
    found = jax.jit(routes["per head"])(*tensors(), own)
    np.testing.assert_allclose(found, attended(name, is_causal), rtol=1e-5, atol=1e-6)


def test_calls_outside_a_program_compile_nothing_anew(caplog):
    head = random_head(0, NUM_TOKENS, NUM_TOKENS, DIM)

    def call():
        return attention(*tensors(), method="favor", rng=jax.random.key(0), **SIZES["favor"]).block_until_ready()

    def function():
        return METHODS["favor"].function(*head, jax.random.key(0), num_features=20).block_until_ready()

    for one in (call, function):
        one()
        caplog.clear()
        with jax.log_compiles():
            one()
        assert not [record for record in caplog.records if "Compiling" in record.message]


@names
def test_a_decoder_draws_when_its_cache_is_made(name):
    sizes = {"num_kv_heads": NUM_KV_HEADS, "head_dim": DIM}
    decoder = HeadsDecoder(name, **sizes, **SIZES[name])
    start = functools.partial(decoder.init, BATCH)
    assert num_draws(start, jax.random.key(0)) == 1
    cache = jax.eval_shape(start, jax.random.key(0))
    assert num_draws(decoder.extend, cache, *tensors()) == 0
    assert num_draws(decoder.extend, cache, *(x[:, :1] for x in map(np.asarray, tensors()))) == 0


@pytest.mark.parametrize("head_axis", [None, "heads"])
@pytest.mark.parametrize(("name", "is_causal"), [("favor", False), ("favor", True), ("scatterbrain", True)])
def test_devices_are_given_what_is_drawn_once(name, is_causal, head_axis):
    mesh = jax.make_mesh((4, 2), ("tokens", "heads"))
    options = {"method": name, "is_causal": is_causal, **SIZES[name]}
    devices = {"mesh": mesh, "axis": "tokens", "head_axis": head_axis}

    def function(q, k, v, rng):
        return distributed.attention(q, k, v, rng=rng, **devices, **options)

    def given(q, k, v, projection):
        return distributed.attention(q, k, v, rng=jax.random.key(7), projection=projection, **devices, **options)

    # The program of a mesh is lowered for its devices.
    drawing = jax.jit(function).lower(*tensors(), jax.random.key(7))
    assert num_decompositions_in(drawing.as_text()) == 1
    assert num_decompositions_in(jax.jit(given).lower(*tensors(), projections(name)[0]).as_text()) == 0
    found = drawing.compile()(*tensors(), jax.random.key(7))
    np.testing.assert_allclose(found, attended(name, is_causal), rtol=1e-4, atol=1e-5)


@names
def test_a_layer_draws_in_every_call_unless_it_learns_the_projection(name):
    q, k, v = tensors()
    kept = ApproxAttention(name, rngs=nnx.Rngs(0), **SIZES[name])
    assert num_draws(lambda q, k, v: kept(q, k, v, is_causal=True), q, k, v) == 1
    learned = ApproxAttention(name, rngs=nnx.Rngs(0), learned=("projection",), head_dim=DIM, **SIZES[name])
    assert num_draws(lambda q, k, v: learned(q, k, v, is_causal=True), q, k, v) == 0

    options = {"method": name, "is_causal": True, "options": SIZES[name]}
    for count, layer in (
        (1, linen.ApproxAttention(**options)),
        (0, linen.ApproxAttention(**options, learned=("projection",))),
    ):
        variables = jax.eval_shape(layer.init, jax.random.key(0), q, k, v)
        assert num_draws(layer.apply, variables, q, k, v) == count


@pytest.mark.parametrize("name", ["favor", "rfa", "coreset"])
def test_a_comparison_measures_programs_without_what_they_draw(name):
    q, k, v = tensors()
    arm = method_arm(Problem(Tensors(q, k, v)), name, 16)
    rng = jax.random.key(3)
    assert num_draws(arm.function, q, k, v, arm.draw(rng)) == 0
    expected = attention(q, k, v, method=name, rng=rng, **{METHODS[name].size: 16})
    out, _ = compile_arm(arm, q, k, v)[0](q, k, v, arm.draw(rng))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
