"""One program for all platforms: it is exported from any machine, and follows the platform that it is lowered for."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import attention
from approx_attention.kernels import export_checks
from tests.cases import ALL, CAUSAL, settings
from tests.references import random_heads

pytestmark = pytest.mark.all_forms

PLATFORMS = ("cpu", "cuda", "tpu")
# One method with features, one with chunks, one with pairs of tokens; slow tests cover all.
FEW = ("favor", "eva", "exact")
# One method of each kind of causal or platform-dependent execution, beyond those.
KINDS = (
    "block_linformer",
    "coreset",
    "lara",
    "linformer",
    "local",
    "lsh_top_k",
    "mean_pool",
    "nystrom",
    "priority",
    "rfa",
)
SHAPE = {"batch": 1, "num_queries": 64, "num_keys": 64, "num_heads": 2, "num_kv_heads": 2}

few_methods = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in ALL]
)


def program(name, *, outputs=False, gradients=True, dtype=jnp.float32, head_dim=8, **options):
    """A method's attention over heads, its gradients or both, as one program, and its arguments."""
    options |= {"is_causal": True} if name in CAUSAL else {}
    forward = functools.partial(attention, method=name, **settings(name, block_size=16), **options)

    def function(query, key, value, rng):
        attend = functools.partial(forward, rng=rng)
        # Outputs alone too: with gradients, custom rules may compute them.
        out = (attend(query, key, value),) if outputs else ()
        return out + (jax.vjp(attend, query, key, value)[1](query) if gradients else ())

    tensors = (x.astype(dtype) for x in random_heads(0, **SHAPE, head_dim=head_dim))
    return jax.jit(function), (*tensors, jax.random.key(7))


def exported_for_all(function):
    return jax.export.export(function, platforms=PLATFORMS, disabled_checks=export_checks())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in ALL if name not in FEW],
)
def test_every_gradient_is_exported_for_all_platforms_in_one(name):
    function, arguments = program(name)
    assert exported_for_all(function)(*arguments).platforms == PLATFORMS


def texts(traced_anew, monkeypatch, platforms, function, arguments):
    """A program as text for each platform, as traced and lowered in a process on a GPU and in one on a CPU."""
    for backend in ("gpu", "cpu"):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda backend=backend: backend)
            traced_anew()
            traced = function.trace(*arguments)
            yield [traced.lower(lowering_platforms=(platform,)).as_text() for platform in platforms]


@few_methods
def test_a_program_is_the_same_wherever_it_is_lowered_and_computes_the_same_when_exported(
    traced_anew, monkeypatch, name
):
    function, arguments = program(name, outputs=True)
    on_gpu, on_cpu = texts(traced_anew, monkeypatch, ("cuda", "cpu"), function, arguments)
    assert on_gpu == on_cpu
    # The last trace, which takes longest, serves the export and the direct call.
    exported = exported_for_all(function)(*arguments)
    assert exported.platforms == PLATFORMS
    again = jax.export.deserialize(exported.serialize())
    outputs, expected = (jax.tree.leaves(f(*arguments)) for f in (again.call, function))
    for ours, direct in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(ours, direct, atol=2e-6, rtol=1e-5)


def test_the_shapes_of_fused_kernels_change_no_program(traced_anew, monkeypatch):
    """In half precision a process on a GPU could choose cuDNN's attention, by the GPU of that process."""
    made = program("exact", outputs=True, gradients=False, dtype=jnp.bfloat16, head_dim=64)
    on_gpu, on_cpu = texts(traced_anew, monkeypatch, ("cuda", "tpu"), *made)
    assert on_gpu == on_cpu
