"""Exact attention: the derivatives of its two forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import attention, exact
from tests.methods.case import Case
from tests.references import as_array, causal_mask, random_head, random_heads

CASES = {"exact": Case(fast=True, always_exact=True, devices={})}


def test_a_hessian_of_exact_attention_is_that_of_its_dense_form(x64):
    q, k, v = random_head(2, 5, 5, 3, dtype=jnp.float64)

    def hessian(**options):
        return jax.hessian(lambda q: jnp.sum(exact(q, k, v, **options) ** 2))(q)

    dense = jax.jit(lambda mask: hessian(implementation="dense", mask=mask))
    for is_causal, mask in ((False, np.ones((5, 5), bool)), (True, causal_mask(5, 5))):
        blocked = jax.jit(functools.partial(hessian, implementation="blocked", is_causal=is_causal))()
        np.testing.assert_allclose(blocked, dense(mask), atol=1e-10)


def test_cudnn_is_used_where_it_is_asked_for_alone(monkeypatch):
    calls = []

    def library(query, key, value, *, scale, is_causal, implementation):
        calls.append(implementation)
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    q, k, v = (np.asarray(x, jnp.bfloat16) for x in random_head(11, 9, 11))
    jax.eval_shape(exact, q, k, v)
    assert calls == []

    def fused(*tensors, **options):
        jax.eval_shape(functools.partial(exact, implementation="cudnn", **options), *tensors)

    fused(q, k, v, is_causal=True)
    assert calls == ["cudnn"]
    for tensors, options in (
        ((q, k, v), {"kv_mask": as_array(np.ones(11), bool)}),
        ((q, k, v), {"return_state": True}),
        ((q, k, v), {"bias": as_array(np.zeros((9, 11)))}),
        ((q, k, v[:, :5]), {}),
        ((q[:, :4], k[:, :4], v[:, :4]), {}),
        ((q.astype(np.float32), k, v), {}),
    ):
        with pytest.raises(ValueError, match="'cudnn' needs a GPU"):
            fused(*tensors, **options)
    assert calls == ["cudnn"]


def test_cudnn_says_that_there_is_no_gpu():
    tensors = [as_array(x, jnp.bfloat16) for x in random_heads(11, 2, 9, 11, 4, 2, 8)]
    with pytest.raises(ValueError, match="'cudnn' needs a GPU"):
        attention(*tensors, method="exact", implementation="cudnn")
