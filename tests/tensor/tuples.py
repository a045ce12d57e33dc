"""Small tensors and sums over all tuples in float64; both methods compiled once for all tests of tensor attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import tensor_attention, tensor_polynomial
from tests.references import as_array

NAMES = "jlpr"
# Compiled once for all calls of one form; without jit, loops are compiled again at every call.
STATIC = ("is_causal", "window", "return_state")
compiled_exact = jax.jit(tensor_attention, static_argnames=STATIC)
compiled_polynomial = jax.jit(tensor_polynomial, static_argnames=(*STATIC, "degree"))


def tensors(seed, num_queries, lengths, dim=4, value_dim=3, spread=1.0, dtype=jnp.float64):
    """q [T, D] and, for each length, keys [S, D] and values [S, Dv]."""
    random = np.random.default_rng(seed)
    make = lambda spread, *shape: as_array(spread * random.normal(size=shape), dtype)  # noqa: E731
    q = make(spread, num_queries, dim)
    return q, tuple(make(spread, n, dim) for n in lengths), tuple(make(1, n, value_dim) for n in lengths)


def brute(q, keys, values, *, scale, kernel=np.exp, is_causal=None, window=None, kv_mask=None):
    """Outputs and logarithms of normalisers from every tuple of keys."""
    q, keys, values = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, keys, values))
    sets = NAMES[: len(keys)]
    terms = ",".join(["id", *(f"{name}d" for name in sets)])
    logits = scale * np.einsum(f"{terms}->i{sets}", q, *keys)
    place = np.indices(logits.shape)
    seen, newest = np.ones(logits.shape, bool), place[0]
    for a in range(len(keys)):
        if is_causal:
            seen &= place[a + 1] <= newest
            newest = place[a + 1] if is_causal == "ordered" else newest
        if window is not None:
            seen &= place[a + 1] > place[0] - window[a]
        if kv_mask is not None and kv_mask[a] is not None:
            seen &= np.asarray(kv_mask[a])[place[a + 1]]
    weights = np.where(seen, kernel(logits), 0)
    total = weights.reshape(len(q), -1).sum(axis=1)
    out = np.einsum(f"i{sets},{','.join(f'{name}c' for name in sets)}->ic", weights, *values)
    with np.errstate(divide="ignore"):
        return out / np.where(total > 0, total, 1)[:, None], np.log(total)


def masks(seed, keys):
    random = np.random.default_rng(seed)
    return tuple(jax.device_put(random.random(k.shape[0]) < 0.7) for k in keys)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


both_methods = pytest.mark.parametrize(
    "method", [compiled_exact, functools.partial(compiled_polynomial, degree=4)], ids=["exact", "polynomial"]
)
