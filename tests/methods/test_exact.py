"""Exact attention: the derivatives of its two forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import attention, exact
from tests.methods.case import Case
from tests.references import random_head, random_heads

CASES = {"exact": Case(fast=True, always_exact=True, devices={})}


def loss(function):
    return lambda *args: jnp.sum(function(*args) ** 2)


def test_a_hessian_of_exact_attention_is_that_of_its_dense_form(x64):
    q, k, v = random_head(2, 5, 5, 3, dtype=jnp.float64)

    def hessian(implementation, is_causal):
        function = functools.partial(exact, implementation=implementation, is_causal=is_causal)
        return jax.jit(jax.hessian(lambda q: loss(function)(q, k, v)))(q)

    for is_causal in (False, True):
        np.testing.assert_allclose(hessian("blocked", is_causal), hessian("dense", is_causal), atol=1e-10)


def test_cudnn_is_used_where_it_is_asked_for_alone(monkeypatch):
    calls = []

    def library(query, key, value, *, scale, is_causal, implementation):
        calls.append(implementation)
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    q, k, v = (x[0, :, 0].astype(jnp.bfloat16) for x in random_heads(11, 2, 9, 11, 4, 2, 8))
    exact(q, k, v)
    assert calls == []
    fused = functools.partial(exact, implementation="cudnn")
    fused(q, k, v, is_causal=True)
    assert calls == ["cudnn"]
    for tensors, options in (
        ((q, k, v), {"kv_mask": jnp.ones(11, bool)}),
        ((q, k, v), {"return_state": True}),
        ((q, k, v), {"bias": jnp.zeros((9, 11))}),
        ((q, k, v[:, :5]), {}),
        ((q[:, :4], k[:, :4], v[:, :4]), {}),
        ((q.astype(jnp.float32), k, v), {}),
    ):
        with pytest.raises(ValueError, match="'cudnn' needs a GPU"):
            fused(*tensors, **options)
    assert calls == ["cudnn"]


def test_cudnn_says_that_there_is_no_gpu():
    tensors = [x.astype(jnp.bfloat16) for x in random_heads(11, 2, 9, 11, 4, 2, 8)]
    with pytest.raises(ValueError, match="'cudnn' needs a GPU"):
        attention(*tensors, method="exact", implementation="cudnn")
