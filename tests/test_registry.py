"""The registry describes the arguments of methods correctly, and a method is checked when it is bound."""

import functools
import gc
import inspect
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, HeadsDecoder, attention, favor
from approx_attention import linen as linen_layers
from approx_attention import nnx as flax_layers
from approx_attention.registry import BoundMethod, arguments, bind
from tests.references import as_array, random_heads

RUNNING = [name for name, method in METHODS.items() if method.running]


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("name", METHODS)
def test_fields_name_arguments_of_the_function(name):
    method = METHODS[name]
    named = {*method.noise, *method.per_token, *method.values, *method.indifferent}
    if method.size is not None:
        named.add(method.size)
    assert named <= parameters(method.function).keys()
    for argument in (*method.noise, *method.per_token):
        if argument in method.noise and method.capabilities.needs_key:
            continue  # without noise and key a random method is an error, which the contract tests
        assert parameters(method.function)[argument].default is None, argument
    assert bool(method.windowed) <= (method.windowed in METHODS)
    assert (method.window is not None) == (method.sharding == "halos")


def summary_of(name, num_keys):
    """The running summary after ``num_keys`` tokens, as shapes."""
    room = {"max_length": num_keys} if METHODS[name].grows else {}
    bound = bind(name).for_decoding(**room)

    def read(key):
        running = bound.running(8, key)
        return running.read(running.init(4, jnp.float32))

    return jax.eval_shape(read, jax.random.key(0))


@pytest.mark.parametrize("name", RUNNING)
def test_the_class_of_a_summary_and_whether_it_grows(name):
    short, long = summary_of(name, 1024), summary_of(name, 4096)
    assert isinstance(short, METHODS[name].summary)
    assert (jax.tree.map(jnp.shape, short) != jax.tree.map(jnp.shape, long)) == METHODS[name].grows


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.summarize])
def test_the_class_of_a_summary_of_all_keys(name):
    k, v = (jax.ShapeDtypeStruct((64, dim), jnp.float32) for dim in (8, 4))
    made = jax.eval_shape(bind(name).summarize, k, v, jax.random.key(0))
    assert isinstance(made, METHODS[name].summary)


def test_a_bound_method_is_called_decoded_and_bound_further():
    query, key, value = random_heads(0, 2, 24, 24, 4, 2)
    rng = jax.random.key(1)
    plain = attention(query, key, value, method="favor", rng=rng, num_features=16, block_size=8, is_causal=True)
    bound = bind("favor", {"num_features": 16})
    assert bound == bind("favor", {"num_features": 16})
    assert hash(bound) == hash(bind("favor", {"num_features": 16}))
    further = attention(query, key, value, method=bound, rng=rng, block_size=8, is_causal=True)
    np.testing.assert_array_equal(further, plain)
    sizes = {"num_kv_heads": key.shape[2], "head_dim": key.shape[3], "value_dim": value.shape[3]}
    decoder = HeadsDecoder(bind(bound, {"block_size": 8}), **sizes)
    out, _ = jax.jit(lambda rng, *tokens: decoder.extend(decoder.init(2, rng), *tokens))(rng, query, key, value)
    np.testing.assert_allclose(out, plain, atol=1e-5)


def test_a_function_of_the_registry_is_its_method():
    assert bind(favor).registered is METHODS["favor"]
    assert bind(lambda q, k, v, key: v).registered is None


def test_what_a_method_does_not_have_is_said_when_it_is_bound():
    with pytest.raises(TypeError, match="method 'favor' has no argument 'num_feature'; did you mean 'num_features'"):
        bind("favor", {"num_feature": 16})
    with pytest.raises(TypeError, match="method 'favor' has no argument 'is_causal'"):
        bind("favor", {"is_causal": True})
    with pytest.raises(ValueError, match="favour"):
        bind("favour")
    with pytest.raises(TypeError, match="method must be a registered name or a function"):
        bind(3)  # type: ignore[arg-type]
    assert isinstance(bind("favor", {"scale": 1.0}, options=("scale",)), BoundMethod)


def test_bound_methods_compare_whatever_they_hold():
    ordered = [{"num_features": 8, "block_size": 4}, {"block_size": 4, "num_features": 8}]
    first, second = (bind("favor", given) for given in ordered)
    assert first == second
    assert hash(first) == hash(second)
    assert first != bind("favor", {"num_features": 8, "block_size": 8})
    projection = as_array(np.ones((4, 8)))
    with_array = bind("favor", {"projection": projection})
    assert with_array == bind("favor", {"projection": projection})
    assert with_array != bind("favor", {"projection": as_array(np.ones((4, 8)))})
    assert with_array != bind("favor", {"projection": None})


def test_layers_take_bound_methods():
    query, key, value = random_heads(1, 1, 16, 16, 2, 2)
    bound = bind("local", {"window_size": 2})
    expected = attention(query, key, value, method="local", window_size=2)
    np.testing.assert_array_equal(flax_layers.ApproxAttention(bound)(query, key, value), expected)
    np.testing.assert_array_equal(linen_layers.ApproxAttention(bound).apply({}, query, key, value), expected)
    sample = bind("uniform_sample", {"noise": as_array(np.linspace(0, 1, 16)), "sample_size": 4})
    with_noise = attention(query, key, value, method=sample)
    np.testing.assert_array_equal(flax_layers.ApproxAttention(sample)(query, key, value), with_noise)
    with pytest.raises(TypeError, match="method 'local' has no argument gate_logits with one number per key"):
        flax_layers.ApproxAttention(bound)(query, key, value, gate_logits=None)


def test_a_block_size_of_none_is_none_while_decoding_too():
    with pytest.raises(TypeError, match="window_size must be an integer"):
        HeadsDecoder("eva", num_kv_heads=1, head_dim=8, num_chunks=4, window_size=None)


def test_functions_are_remembered_no_longer_than_they_live():
    function = functools.partial(favor, num_features=4)
    assert "num_features" in arguments(function)
    kept = weakref.ref(function)
    del function
    if kept() is not None:  # only if it is in a cycle; a collection takes seconds after many traces
        gc.collect()
    assert kept() is None
