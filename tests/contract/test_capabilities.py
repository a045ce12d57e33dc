"""The declared capabilities of methods hold: options, arguments and randomness."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, attention
from tests.cases import (
    ALL,
    CASES,
    CAUSAL,
    LENGTH,
    call,
    call_heads,
    case_of,
    every_method,
    lifted,
    settings,
    with_gradients,
)
from tests.references import causal_mask, compiled, having, random_head, random_heads


def test_every_method_has_a_case():
    # Each method has its case in the test file of its mathematics, in tests/methods.
    assert CASES.keys() == METHODS.keys()


@every_method
def test_signature_and_capabilities_agree(name):
    method = METHODS[name]
    arguments = inspect.signature(method.function).parameters
    capabilities = method.capabilities
    assert list(arguments)[:4] == ["q", "k", "v", "key"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(arguments.values())[4:])
    for argument, able in {
        "is_causal": capabilities.causal,
        "kv_mask": capabilities.padding,
        "mask": capabilities.dense_mask,
        "bias": capabilities.dense_mask,
        "logits_soft_cap": capabilities.soft_cap,
    }.items():
        assert (argument in arguments) == able, argument
    assert (method.running is not None) == capabilities.decode
    # Every argument has a default: a method works without learned arrays.
    assert all(p.default is not p.empty for p in list(arguments.values())[4:])
    assert method.size is None or method.size in arguments
    for function in (method.summarize, method.running, method.draw):
        assert function is None or method.size is None or method.size in inspect.signature(function).parameters


@every_method
def test_cross_attention_is_declared(name):
    q, k, v = random_head(13, 3, 9)
    if METHODS[name].capabilities.cross:
        assert call(name, q, k, v).shape == (3, 8)
    else:
        with pytest.raises(ValueError, match=name):
            METHODS[name].function(q, k, v, jax.random.key(0))


@pytest.mark.parametrize("name", having(trainable=True))
def test_learned_arrays_have_gradients(name):
    q, k, v = random_head(29, 12, 12)
    argument, (rows, columns) = case_of(name).learned
    projection = random_head(30, rows, 1, columns)[0]
    gradient = jax.grad(lambda x: jnp.sum(call(name, q, k, v, **{argument: x}) ** 2))(projection)
    assert (jnp.abs(gradient) > 1e-6).all()


ATTENTION = ("is_causal", "kv_mask", "q_mask", "mask", "bias", "scale", "logits_soft_cap")
OPTIONS = {
    "is_causal": ("causal", {"is_causal": True}),
    "key_value_seq_lengths": ("padding", {"key_value_seq_lengths": jnp.array([5, 9])}),
    "padding mask": ("padding", {"mask": jnp.arange(9).reshape(1, 1, 1, 9) < 6}),
    "mask": ("dense_mask", {"mask": jnp.asarray(causal_mask(9, 9))[None, None]}),
    "bias": ("dense_mask", {"bias": jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 9, 9)), jnp.float32)}),
    "return_residual": ("normalizer", {"return_residual": True}),
    "scale": (None, {"scale": 0.9}),
    "logits_soft_cap": ("soft_cap", {"logits_soft_cap": 0.5}),
    "query_seq_lengths": (None, {"query_seq_lengths": jnp.array([4, 9])}),
}


@lifted
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_an_effect_or_raises(name, option):
    capability, arguments = OPTIONS[option]
    tensors = random_heads(17, 2, 9, 9, 4, 2)
    if capability is not None and not getattr(METHODS[name].capabilities, capability):
        with pytest.raises(NotImplementedError, match=name):
            call_heads(name, *tensors, **arguments)
        return
    if option == "scale" and case_of(name).scale_cancels:
        pytest.skip(case_of(name).scale_cancels)
    plain, changed = call_heads(name, *tensors), call_heads(name, *tensors, **arguments)
    if option == "return_residual":
        assert changed[1].shape == tensors[0].shape[:-1]
        return
    assert np.any(np.abs(np.asarray(plain) - np.asarray(changed)) > 1e-4)


@lifted
def test_every_hyperparameter_has_an_effect(name):
    method, case = METHODS[name], case_of(name)
    function = compiled(method.function)
    # The settings have size 8 and blocks of 4.
    changes = {method.size: 5, method.block: 5, **case.changes}
    q, k, v = random_head(18, 40, 40)
    for argument in list(inspect.signature(method.function).parameters)[4:]:
        # Skipped: options of `attention`, tested above, and arguments that change the form of the output only.
        if argument in ATTENTION or argument in ("implementation", "return_state"):
            continue
        if argument in case.without_effect:
            continue
        causal = {"is_causal": True} if name in CAUSAL and case.changes_are_causal else {}
        base = {**settings(name), **causal, **case.contexts.get(argument, {})}
        plain = function(q, k, v, jax.random.key(7), **base)
        changed = function(q, k, v, jax.random.key(7), **{**base, argument: changes[argument]})
        assert np.any(np.abs(np.asarray(plain) - np.asarray(changed)) > 1e-4), argument


@every_method
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match=rf"'{name}' has no argument 'num_feetures'"):
        call_heads(name, *random_heads(0, 1, 4, 4, 1, 1), num_feetures=3)


def _is_random(name):
    return METHODS[name].capabilities.needs_key or METHODS[name].capabilities.takes_key


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, name in CAUSAL) for name in ALL if _is_random(name)]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in CAUSAL if _is_random(name)],
)
def test_the_key_decides_the_draw(name, is_causal):
    tensors = random_head(19, LENGTH, LENGTH, 8, 6)
    function = functools.partial(with_gradients, name, *tensors, is_causal=is_causal, **case_of(name).random)
    once, again, other = (np.asarray(function(key=jax.random.key(seed))[0]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)


@every_method
def test_needs_key_is_true(name):
    q, k, v = random_head(20, 9, 9)
    tensors = random_heads(20, 1, 9, 9, 1, 1)
    if METHODS[name].capabilities.needs_key:
        with pytest.raises(ValueError, match=rf"{name} is random"):
            METHODS[name].function(q, k, v, **settings(name))
        with pytest.raises(ValueError, match=rf"'{name}' is random: pass rng"):
            attention(*tensors, method=name, **settings(name))
        with pytest.raises(TypeError, match="typed PRNG key"):
            METHODS[name].function(q, k, v, jnp.zeros(2, jnp.uint32), **settings(name))
    else:
        function = functools.partial(METHODS[name].function, **settings(name))
        both = jax.jit(lambda key: [function(q, k, v, x) for x in (None, key)])
        assert np.allclose(*both(jax.random.key(7)), rtol=0, atol=1e-5) != METHODS[name].capabilities.takes_key
        jax.eval_shape(functools.partial(attention, method=name, **settings(name)), *tensors)
