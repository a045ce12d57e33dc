"""The two executions of causal forms, in turn as on a CPU and together as on accelerators, are one function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from approx_attention import METHODS, Decoder
from approx_attention.core import causal
from approx_attention.registry import accepted
from tests.cases import CAUSAL, every_method, settings, sized, unless_slow
from tests.references import having, random_head

# Without blocks of their own there is one form, or the two are tested with their tiles (tests/core/test_streamed.py).
BLOCKS = [name for name in CAUSAL if METHODS[name].block in settings(name) and name not in ("sparse_coreset",)]


@pytest.fixture
def together(monkeypatch):
    """Runs a function as an accelerator would, on this machine, in groups of few blocks or all at once."""

    def run(function, *arguments, groups=True):
        with monkeypatch.context() as patched:
            patched.setattr(lax, "platform_dependent", lambda *args, cpu, default: default(*args))
            if groups:
                patched.setattr(causal, "GROUP_NUMBERS", 1)
                patched.setattr(causal, "LEAST_GROUP", 12)
            # A new function is traced anew.
            return jax.jit(lambda *arguments: function(*arguments))(*arguments)

    return run


def value_and_gradients(name, is_causal=True, **others):
    """A method on one head: its outputs, and its gradients of a sum that depends on all of them."""

    def function(q, k, v):
        options = settings(name) | ({"is_causal": True} if is_causal else {}) | others
        out, pull = jax.vjp(lambda *tensors: METHODS[name].function(*tensors, jax.random.key(7), **options), q, k, v)
        return out, *pull(jnp.cos(out))

    return function


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "masked", "groups"),
    [(41, 41, False, False), (41, 30, True, True), pytest.param(30, 41, False, True, marks=pytest.mark.slow)],
)
def test_both_executions_agree(together, x64, name, num_queries, num_keys, masked, groups):
    tensors = random_head(0, num_queries, num_keys, dtype=jnp.float64)
    function = value_and_gradients(name, **({"kv_mask": jnp.arange(num_keys) % 5 != 2} if masked else {}))
    in_turn, at_once = jax.jit(function)(*tensors), together(function, *tensors, groups=groups)
    for ours, expected in zip(at_once, in_turn, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-12, rtol=1e-12)


@every_method
def test_forms_of_both_platforms_agree_on_all_keys(together, x64, name):
    num_keys = 41 if METHODS[name].capabilities.cross else 52
    tensors = random_head(6, 52, num_keys, dtype=jnp.float64)
    function = value_and_gradients(name, is_causal=False)
    on_cpu, elsewhere = jax.jit(function)(*tensors), together(function, *tensors)
    for ours, expected in zip(elsewhere, on_cpu, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-11, rtol=1e-11)


RNG = np.random.default_rng(4)
# What changes how prefixes are summarised; sizes that no block divides.
VARIANTS = [
    ("favor", {"features": "hyperbolic"}),
    ("favor", {"features": "relu"}),
    ("rfa", {"gate_logits": jnp.asarray(RNG.normal(size=41), jnp.float32)}),
    ("mean_pool", {"num_landmarks": 3}),
    ("eva", {"num_chunks": 3, "chunk_size": 2}),
    ("eva", {"pooling_vectors": tuple(jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(2, 8)))}),
    ("uniform_sample", {"noise": jnp.asarray(RNG.uniform(size=41), jnp.float32)}),
    ("coreset", {"streaming": "counter", "algorithm": "kmeans_merge", "sinks": 3}),
    ("linformer", {"projection_k": jnp.asarray(RNG.uniform(size=(6, 41)), jnp.float32), "renormalize": True}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{name}-{next(iter(x))}" for name, x in VARIANTS])
def test_both_executions_agree_with_other_options(together, name, options):
    tensors = random_head(5, 41, 41)
    function = value_and_gradients(name, **options)
    in_turn, at_once = jax.jit(function)(*tensors), together(function, *tensors)
    for ours, expected in zip(at_once, in_turn, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [unless_slow(name) for name in BLOCKS])
def test_both_executions_agree_in_float32(together, name):
    tensors = random_head(1, 37, 37)
    function = value_and_gradients(name)
    in_turn, at_once = jax.jit(function)(*tensors), together(function, *tensors)
    for ours, expected in zip(at_once, in_turn, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_comes_later_reaches_nothing_before_it(together, name):
    q, k, v = random_head(2, 40, 40)
    function = functools.partial(METHODS[name].function, key=jax.random.key(7), is_causal=True, **settings(name))

    def outputs(q, k, v):
        later = function(q, k.at[13].set(1e4), v.at[13].set(1e4))
        return function(q, k, v), later, function(q, k.at[30].set(jnp.nan), v.at[30].set(jnp.nan))

    before, later, broken = together(outputs, q, k, v)
    np.testing.assert_array_equal(later[:13], before[:13])
    # Within its block, whose logits are one product, a NaN may reach others.
    np.testing.assert_array_equal(broken[:28], before[:28])
    assert np.all(np.isnan(broken[30]))


@pytest.mark.parametrize("name", [unless_slow(name) for name in having(decode=True)])
def test_prefill_agrees_too(together, name):
    q, k, v = random_head(3, 33, 33)
    method = METHODS[name]
    hyperparameters = sized(name, 8) if method.size else accepted(method.running, {"max_length": 36})
    running = method.running(8, jax.random.key(7), **hyperparameters)
    decoder = Decoder(running=running, head_dim=8, value_dim=8, block_size=4)

    def in_parts(q, k, v):
        cache, outs = decoder.init(), []
        for start, stop in ((0, 1), (1, 6), (6, 6 + 16), (22, 33)):
            real = stop - start - (stop == 22)  # the last of them is padding
            out, cache = decoder.prefill(cache, q[start:stop], k[start:stop], v[start:stop], real)
            outs.append(out)
        return jnp.concatenate(outs), cache

    expected, at_once = jax.jit(in_parts)(q, k, v), together(in_parts, q, k, v)
    np.testing.assert_allclose(at_once[0], expected[0], atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(at_once[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
