"""One program for all platforms: it is exported from any machine, and follows the platform that it is lowered for."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import attention
from approx_attention.kernels import export_checks
from tests.cases import ALL, CAUSAL, every_method, settings
from tests.programs import lowered_for
from tests.references import random_heads

PLATFORMS = ("cpu", "cuda", "tpu")
# A sum of features, chunks in pairs, the pairs of tokens themselves. All when slow.
FEW = ("favor", "eva", "exact")
SHAPE = {"batch": 1, "num_queries": 64, "num_keys": 64, "num_heads": 2, "num_kv_heads": 2}

few_methods = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in ALL]
)
backward_or_not = pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradient"])


def program(name, backward, dtype=jnp.float32, head_dim=8, **options):
    """A method's attention over heads, or its gradient, and what it is called with."""
    options |= {"is_causal": True} if name in CAUSAL else {}
    forward = functools.partial(attention, method=name, **settings(name, block_size=16), **options)

    def gradient(query, key, value, cotangent, rng):
        return jax.vjp(functools.partial(forward, rng=rng), query, key, value)[1](cotangent)

    query, key, value = (x.astype(dtype) for x in random_heads(0, **SHAPE, head_dim=head_dim))
    rng = jax.random.key(7)
    if backward:
        return jax.jit(gradient), (query, key, value, query, rng)
    return jax.jit(lambda query, key, value, rng: forward(query, key, value, rng=rng)), (query, key, value, rng)


def exported_for_all(function):
    return jax.export.export(function, platforms=PLATFORMS, disabled_checks=export_checks())


@every_method
def test_every_gradient_is_exported_for_all_platforms_in_one(name):
    function, arguments = program(name, True)
    assert exported_for_all(function)(*arguments).platforms == PLATFORMS


@few_methods
@backward_or_not
def test_what_is_exported_for_all_platforms_computes_the_same(name, backward):
    function, arguments = program(name, backward)
    exported = exported_for_all(function)(*arguments)
    again = jax.export.deserialize(exported.serialize())
    outputs, expected = (jax.tree.leaves(f(*arguments)) for f in (again.call, function))
    for ours, direct in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(ours, direct, atol=2e-6, rtol=1e-5)


def texts(monkeypatch, platform, make):
    """A program as text, as lowered for one platform in a process on a CPU and in one on a GPU."""
    found = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        jax.clear_caches()  # traces of the other process
        function, arguments = make()
        found.append(lowered_for(platform, function, *arguments).as_text())
    jax.clear_caches()
    return found


@few_methods
@backward_or_not
@pytest.mark.parametrize("platform", ["cuda", "cpu"])
def test_a_program_is_the_same_wherever_it_is_lowered(monkeypatch, platform, name, backward):
    on_cpu, on_gpu = texts(monkeypatch, platform, functools.partial(program, name, backward))
    assert on_gpu == on_cpu


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_shapes_of_fused_kernels_change_no_program(monkeypatch, platform):
    """In half precision a process on a GPU could take cuDNN's attention, for which it asks its own GPU."""
    on_cpu, on_gpu = texts(monkeypatch, platform, functools.partial(program, "exact", False, jnp.bfloat16, 64))
    assert on_gpu == on_cpu
