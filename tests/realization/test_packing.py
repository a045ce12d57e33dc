"""The lower bound on channels holds for every head, also for causal heads with huge hidden logits."""

import math

import jax
import numpy as np
import pytest

from approx_attention import SparsePattern, certify, dimension_bound, realize_sparse_pattern
from approx_attention.realization import realizable_in_one_dimension
from tests.references import causal_mask


def head(queries, keys):
    """Inputs and projections of self-attention with logits ``queries @ keys.T``."""
    d = queries.shape[1]
    w_q = np.zeros((2 * d, d), np.float32)
    w_k = w_q.copy()
    w_q[:d], w_k[d:] = np.eye(d) * math.sqrt(d), np.eye(d)
    inputs = np.concatenate([queries, keys], axis=1)
    return tuple(map(jax.device_put, (inputs.astype(np.float32), w_q, w_k)))


dense_of = jax.jit(SparsePattern.to_dense)


def lower(certificate, pattern):
    seen = np.asarray(dense_of(pattern)) > 0
    return dimension_bound(
        pattern.num_queries,
        int(seen.sum(1).max()),
        math.exp(float(certificate.log_eps1)),
        0.1,
        kind="packing",
        max_logit=float(certificate.logit_absmax),
        rows_per_key=int(seen.sum(0).max()),
    )


@pytest.mark.parametrize(("num_tokens", "base"), [(96, 2.0), pytest.param(32, 1.5, marks=pytest.mark.slow)])
def test_the_causal_identity_needs_one_channel_whatever_its_length(num_tokens, base):
    gap = math.log(10)
    largest = 1.01 * gap * base / (base - 1)
    powers = base ** np.arange(num_tokens)
    pattern = SparsePattern.banded(num_tokens, [0])
    arrays = head(largest / powers[:, None], powers[:, None])
    certificate = certify(*arrays, pattern, is_causal=True, eps1=0.1, eps2=0.1)
    assert bool(certificate.ok)
    np.testing.assert_allclose(certificate.visible_logit_absmax, largest, rtol=1e-5)
    np.testing.assert_allclose(certificate.logit_absmax, largest * base ** (num_tokens - 1), rtol=1e-5)
    np.testing.assert_allclose(certificate.rho * certificate.visible_logit_absmax, -certificate.log_eps1, rtol=1e-5)
    assert lower(certificate, pattern).dim == 1
    # One channel is enough for the causal head, but not for one that sees all keys.
    assert not realizable_in_one_dimension(pattern)
    assert not bool(certify(*arrays, pattern, eps1=0.1, eps2=0.1).ok)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_no_head_has_fewer_channels_than_the_bound(d, is_causal):
    random, n, width, held = np.random.default_rng(d), 48, 2, 0
    for _ in range(12):
        steepness = float(random.uniform(0, 0.5))
        order = np.arange(n)[:, None]
        queries = random.normal(size=(n, d)) * 2.0 ** (-steepness * order) * 10
        keys = random.normal(size=(n, d)) * 2.0 ** (steepness * order)
        # The pattern: the keys to which the head gives most weight.
        logits = np.where(causal_mask(n, n) | (not is_causal), queries @ keys.T, -np.inf)
        rows = [np.argsort(-row)[: min(width, np.isfinite(row).sum())].tolist() for row in logits]
        pattern = SparsePattern.from_indices(rows, num_keys=n)
        certificate = certify(*head(queries, keys), pattern, is_causal=is_causal)
        if float(certificate.log_eps1) < 0:
            assert lower(certificate, pattern).dim <= d
            held += 1
    assert held > 6


def test_logits_are_those_of_all_pairs():
    random = np.random.default_rng(0)
    queries, keys = random.normal(size=(2, 300, 4))
    logits = np.abs(queries @ keys.T)
    pattern = SparsePattern.banded(300, [0])
    for is_causal in (False, True):
        certificate = certify(*head(queries, keys), pattern, is_causal=is_causal)
        visible = np.where(causal_mask(300, 300), logits, 0) if is_causal else logits
        np.testing.assert_allclose(certificate.logit_absmax, logits.max(), rtol=1e-5)
        np.testing.assert_allclose(certificate.visible_logit_absmax, visible.max(), rtol=1e-5)


def test_a_limit_on_logits_is_one_for_hidden_pairs_too():
    pattern, options = SparsePattern.banded(12, [-1, 0], is_causal=True), {"d": 10, "key": jax.random.key(0)}
    free = realize_sparse_pattern(pattern, 0.1, 0.1, is_causal=True, max_draws=1, **options).certificate
    assert bool(free.ok)
    assert float(free.visible_logit_absmax) < float(free.logit_absmax)
    for factor, ok in ((1.01, True), (0.99, False)):
        limit = factor * float(free.logit_absmax)
        limited = realize_sparse_pattern(pattern, 0.1, 0.1, is_causal=True, max_draws=1, max_logit=limit, **options)
        assert bool(limited.certificate.ok) is ok
