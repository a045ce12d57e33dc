"""The forms of the fused operation, and brute force in float64."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from approx_attention import kernels
from approx_attention.core import heads
from approx_attention.kernels import HIDDEN, cpu, fused, mosaic
from tests.programs import OPERATIONS
from tests.references import as_array

FORMS = (
    "cpu",
    "tile",
    "xla",
    "interpret",
    "interpret_gpu",
)
# The smallest tiles: short sequences have several blocks, of several strips.
TILES = mosaic.Tiles(mosaic.Tile(128, 256, 128), mosaic.Tile(256, 128, 128))


@contextlib.contextmanager
def running(form):
    """Run one form on this machine; yields the option that selects it."""
    with pytest.MonkeyPatch.context() as patched:
        if form == "xla":
            for function in (fused._forward, fused._backward):
                patched.setattr(function, "cpu", function.default)
        if form == "cpu":
            patched.setattr(cpu, "ONE_TILE", 0)
        if form == "interpret":
            for name in ("forward", "backward"):
                patched.setattr(mosaic, name, functools.partial(getattr(mosaic, name), tiles=TILES))
        forget_programs()
        yield form if form.startswith("interpret") else None
    forget_programs()


def forget_programs():
    """Clear the programs of the operation after its forms have changed; other jitted functions must be new ones."""
    programs = fused._state, state_and_gradients, heads.over_heads, *(x._compiled for x in OPERATIONS.values())
    for program in programs:
        program.clear_cache()


def seen_pairs(num_queries, num_keys, offset=0, left=None, right=None):
    distance = np.arange(num_keys)[None, :] - np.arange(num_queries)[:, None] - offset
    return (distance >= (-np.inf if left is None else -left)) & (distance <= (np.inf if right is None else right))


def by_brute_force(q, k, v, bias, scale, seen, d_out, d_lse):
    """Outputs, normalisers, and gradients of q, k, v, the bias and the scale, in float64."""
    q, k, v, scale, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, scale, d_out, d_lse))
    if bias is None:
        bias = np.zeros(len(k))
    bias = np.asarray(bias, np.float64)
    seen = seen & (bias > HIDDEN / 2)
    rows, keys = seen.any(1), bias > HIDDEN / 2
    k, v = (np.where(keys[:, None], x, 0) for x in (k, v))
    products = q @ k.T
    logits = np.where(seen, scale * products + np.where(keys, bias, 0), -np.inf)
    peak = np.where(rows, logits.max(1, initial=-np.inf), 0)
    weights = np.where(seen, np.exp(logits - peak[:, None]), 0)
    total = np.where(rows, weights.sum(1), 1)
    weights /= total[:, None]
    out = weights @ v
    d_out, d_lse = np.where(rows[:, None], d_out, 0), np.where(rows, d_lse, 0)
    d_logits = weights * (d_out @ v.T - np.sum(d_out * out, 1, keepdims=True) + d_lse[:, None])
    gradients = scale * d_logits @ k, scale * d_logits.T @ q, weights.T @ d_out, d_logits.sum(0)
    lse = np.where(rows, peak + np.log(total), -np.inf)
    return (out, lse), (*gradients, np.sum(d_logits * products))


def random_operands(seed, num_queries, num_keys, head_dim=8, value_dim=None, dtype=np.float32, hidden=0.0):
    """q, k, v, a bias and a scale, and cotangents of outputs and normalisers."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.normal(size=shape)  # noqa: E731
    value_dim = head_dim if value_dim is None else value_dim
    bias = np.where(random.uniform(size=num_keys) < hidden, HIDDEN, normal(num_keys))
    q, k, v = normal(num_queries, head_dim), normal(num_keys, head_dim), normal(num_keys, value_dim)
    wide = np.float64 if dtype == np.float64 else np.float32
    tensors = [as_array(x, dtype) for x in (q, k, v)]
    others = bias, head_dim**-0.5, normal(num_queries, value_dim), normal(num_queries)
    return *tensors, *(as_array(x, wide) for x in others)


@functools.partial(jax.jit, static_argnames=("offset", "left", "right", "implementation"))
def state_and_gradients(q, k, v, bias, scale, d_out, d_lse, **options):
    """Outputs and normalisers, and gradients of all five operands, or four without a bias."""

    def outputs(q, k, v, bias, scale):
        state = kernels.state(q, k, v, bias, scale=scale, **options)
        return state.out, state.lse

    found, transpose = jax.vjp(outputs, q, k, v, bias, scale)
    return found, transpose((d_out, d_lse))


def assert_close(found, expected, tolerance, size=1.0):
    """Compare relative to the largest number, or to ``size`` if that is larger; infinite entries must agree."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    size = np.abs(expected[np.isfinite(expected)]).max(initial=size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size)
