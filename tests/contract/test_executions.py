"""Both executions of causal forms, in turn (CPU) and all at once (accelerators), compute the same function."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import METHODS, Decoder, Proposal
from approx_attention.core import causal
from tests.cases import CAUSAL, LENGTH, every_method, running_of, settings, unless_slow, with_gradients
from tests.forms import one_form
from tests.references import having, random_head

# A method without blocks has one form, or its two are tested with their tiles (tests/core/test_streamed.py).
BLOCKS = [name for name in CAUSAL if METHODS[name].block in settings(name) and name not in ("sparse_coreset",)]


@contextlib.contextmanager
def running(form, groups):
    """Trace one form; that for accelerators in groups of few blocks or all at once."""
    with pytest.MonkeyPatch.context() as patched, one_form(form) as choices:
        if groups:
            patched.setattr(causal, "_blocks_at_once", lambda *_: 3)
        yield choices


def compiled_as(form, function, groups=True, has_forms=True):
    """Compile a function in the form for CPUs, ``"cpu"``, or that for accelerators, ``"default"``."""

    # Only a new function object is traced again.
    def traced(*arguments):
        with running(form, groups) as choices:
            found = function(*arguments)
        assert choices or not has_forms
        return found

    return jax.jit(traced)


def value_and_gradients(name, is_causal=True, **others):
    """The outputs of a method on one head, and the gradients of a sum that depends on all of them."""
    options = settings(name) | ({"is_causal": True} if is_causal else {}) | others

    def function(q, k, v, **arrays):
        def answer(*tensors):
            return METHODS[name].function(*tensors, jax.random.key(7), **options, **arrays)

        out, pull = jax.vjp(answer, q, k, v)
        return out, *pull(jnp.cos(out))

    return lambda q, k, v, kv_mask=None: function(q, k, v, **({} if kv_mask is None else {"kv_mask": kv_mask}))


def compare(at_once, in_turn, tolerance):
    for ours, expected in zip(at_once, in_turn, strict=True):
        np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=tolerance)


@functools.cache
def form_of(form, name, groups=True):
    """The outputs and gradients of a method in one form: one program for all tests with tensors of the same shapes."""
    return compiled_as(form, value_and_gradients(name), groups=groups)


@pytest.mark.parametrize(
    ("name", "num_queries", "num_keys"),
    [(name, 41, 30) for name in BLOCKS]
    + [pytest.param(name, *shape, marks=pytest.mark.slow) for name in BLOCKS for shape in ((30, 41), (41, 41))],
)
def test_both_executions_agree(x64, name, num_queries, num_keys):
    tensors = random_head(0, num_queries, num_keys, dtype=jnp.float64)
    in_turn, in_groups = form_of("cpu", name), form_of("default", name)
    for kv_mask in (np.ones(num_keys, bool), np.arange(num_keys) % 5 != 2):
        compare(in_groups(*tensors, kv_mask), in_turn(*tensors, kv_mask), 1e-12)


@pytest.mark.parametrize(
    ("name", "num_queries", "num_keys"),
    [unless_slow(name, 41, 30) for name in BLOCKS]
    + [pytest.param(name, *shape, marks=pytest.mark.slow) for name in BLOCKS for shape in ((30, 41), (41, 41))],
)
def test_one_group_of_all_blocks_agrees_too(x64, name, num_queries, num_keys):
    tensors, nothing = random_head(0, num_queries, num_keys, dtype=jnp.float64), np.ones(num_keys, bool)
    compare(form_of("default", name, groups=False)(*tensors), form_of("cpu", name)(*tensors, nothing), 1e-12)


# The bidirectional forms of the other methods have one execution.
FORMS_ON_ALL_KEYS = {"bigbird", "favor", "lara", "scatterbrain", "sparse_coreset"}


@every_method
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_forms_of_both_platforms_agree_on_all_keys(x64, name, backward):
    num_keys = 41 if METHODS[name].capabilities.cross else 52
    tensors = random_head(6, 52, num_keys, dtype=jnp.float64)
    function = value_and_gradients(name, is_causal=False)
    forward = functools.partial(METHODS[name].function, key=jax.random.key(7), **settings(name))
    with running("cpu", groups=True) as choices:
        jax.eval_shape(lambda *tensors: (function if backward else forward)(*tensors), *tensors)
    assert bool(choices) == (name in FORMS_ON_ALL_KEYS)
    if choices and not backward:
        elsewhere, on_cpu = (compiled_as(form, function)(*tensors) for form in ("default", "cpu"))
        compare(elsewhere, on_cpu, 1e-11)


RNG = np.random.default_rng(4)
# Options that change how prefixes are summarised, and sizes that are no multiple of the block.
VARIANTS = [
    ("favor", {"features": "hyperbolic"}),
    ("favor", {"features": "relu"}),
    ("favor", {"proposal": Proposal(jnp.full(8, 0.1), 1.2 * jnp.eye(8))}),
    ("rfa", {"gate_logits": jnp.asarray(RNG.normal(size=41), jnp.float32)}),
    ("mean_pool", {"num_landmarks": 3}),
    ("eva", {"num_chunks": 3, "chunk_size": 2}),
    ("eva", {"pooling_vectors": tuple(jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(2, 8)))}),
    ("priority", {"noise": jnp.asarray(RNG.uniform(size=41), jnp.float32)}),
    ("uniform_sample", {"noise": jnp.asarray(RNG.uniform(size=41), jnp.float32)}),
    ("coreset", {"streaming": "counter", "algorithm": "kmeans_merge", "sinks": 3}),
    ("coreset", {"streaming": "refit", "sinks": 3}),
    ("linformer", {"projection_k": jnp.asarray(RNG.uniform(size=(6, 41)), jnp.float32), "renormalize": True}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{name}-{next(iter(x))}" for name, x in VARIANTS])
def test_both_executions_agree_with_other_options(name, options):
    tensors, function = random_head(5, 41, 41), value_and_gradients(name, **options)
    in_turn, at_once = (compiled_as(form, function)(*tensors) for form in ("cpu", "default"))
    compare(at_once, in_turn, 2e-5)


@pytest.mark.parametrize("name", [unless_slow(name) for name in BLOCKS])
def test_both_executions_agree_in_float32(name):
    tensors, function = random_head(1, LENGTH, LENGTH, 8, 6), value_and_gradients(name)
    out, *gradients = compiled_as("default", function)(*tensors)
    expected, of_cotangents = with_gradients(name, *tensors, np.cos(out), is_causal=True)
    compare((out, *gradients), (expected, *of_cotangents), 1e-5)


@pytest.mark.parametrize(
    ("name", "num_queries", "masked"),
    [(name, 41, True) for name in BLOCKS] + [pytest.param(name, 30, False, marks=pytest.mark.slow) for name in BLOCKS],
)
def test_what_comes_later_reaches_nothing_before_it(x64, name, num_queries, masked):
    q, k, v = (np.asarray(x) for x in random_head(2, num_queries, 30, dtype=jnp.float64))
    at_once, kv_mask = form_of("default", name), (np.ones(30, bool),) if masked else ()

    def changed(at, x):
        hit = (np.arange(30) == at)[:, None]
        return at_once(q, np.where(hit, x, k), np.where(hit, x, v), *kv_mask)[0]

    before, later, broken = at_once(q, k, v, *kv_mask)[0], changed(9, 1e4), changed(18, np.nan)
    np.testing.assert_array_equal(later[:9], before[:9])
    # Within its block, whose logits are one product, a NaN may reach other rows.
    np.testing.assert_array_equal(broken[:16], before[:16])
    assert np.all(np.isnan(broken[18]))


@pytest.mark.parametrize("name", [unless_slow(name) for name in having(decode=True)])
def test_prefill_agrees_too(name):
    q, k, v = random_head(3, 33, 33)
    decoder = Decoder(running=running_of(name, 36), head_dim=8, value_dim=8, block_size=4)

    def in_parts(q, k, v):
        cache, outs = decoder.init(), []
        for start, stop in ((0, 1), (1, 6), (6, 6 + 16), (22, 33)):
            real = stop - start - (stop == 22)  # the last of them is padding
            out, cache = decoder.prefill(cache, q[start:stop], k[start:stop], v[start:stop], real)
            outs.append(out)
        return jnp.concatenate(outs), cache

    expected, at_once = (compiled_as(form, in_parts)(q, k, v) for form in ("cpu", "default"))
    np.testing.assert_allclose(at_once[0], expected[0], atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(at_once[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
