"""Padding in comparisons and plans: errors are those of real queries, and the contents of padding do not matter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import InputError
from approx_attention.evaluation import (
    Measurement,
    Problem,
    Tensors,
    compare,
    comparison,
    method_arm,
    plan_table,
    run_comparison,
)
from approx_attention.evaluation.arms import exact_arms
from approx_attention.evaluation.error_laws import split_units
from approx_attention.evaluation.programs import compile_arm
from approx_attention.evaluation.real_tokens import key_mask, query_mask
from tests.evaluation.test_plan import plan
from tests.references import as_array, brute_force, random_heads

LENGTHS = np.array([24, 9])


def spoilt(num_heads=4, num_kv_heads=2):
    """Tensors [2, 24, ...] of two lengths, and a copy with NaN, inf or large numbers in the padding."""
    clean = Tensors(*random_heads(0, 2, 24, 24, num_heads, num_kv_heads))
    real = np.arange(24) < LENGTHS[:, None]
    fill = iter((np.nan, np.inf, 1e30))
    return clean, Tensors(*(as_array(np.where(real[:, :, None, None], x, next(fill))) for x in clean))


def squares(tensors, is_causal=False, lengths=LENGTHS):
    """Squared norms over real queries, [B, N]: of the error of the mean of the values, and of the exact outputs."""
    error, norm, tensors = np.zeros((2, 4)), np.zeros((2, 4)), [np.asarray(x, np.float64) for x in tensors]
    for b, length in enumerate(lengths):
        for n in range(4):
            heads = zip(tensors, (n, n // 2, n // 2), strict=True)
            q, k, v = (x[b, :length, m] for x, m in heads)
            mask = np.tri(length, dtype=bool) if is_causal else np.ones((length, length), bool)
            exact = brute_force(q, k, v, mask=mask)[0]
            mean = mask @ v / mask.sum(1, keepdims=True)
            error[b, n], norm[b, n] = np.sum((mean - exact) ** 2), np.sum(exact**2)
    return error, norm


def compared(problem, programs):
    """The rows of a comparison with the mean, with programs that are compiled once, for the mask of keys."""

    def compiled_once(arm, *tensors):
        asked = arm.label, jax.config.jax_default_matmul_precision
        if asked not in programs:
            programs[asked] = compile_arm(arm, *tensors)
        return programs[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "compile_arm", compiled_once)
        patch.setattr(comparison, "compile_ahead", lambda arms, *tensors: (compiled_once(x, *tensors) for x in arms))
        return run_comparison(problem, ["mean_value"], [8], num_seeds=1, window_size=4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_errors_are_those_of_real_queries(is_causal):
    clean, noisy = spoilt()
    error, norm = squares(clean, is_causal)
    real = math.sqrt(error.sum() / norm.sum())
    mask, programs = np.arange(24) < LENGTHS[:, None], {}
    for tensors, padding in ((clean, {"lengths": LENGTHS}), (noisy, {"mask": mask}), (noisy, {"lengths": LENGTHS})):
        rows = compared(Problem.of(tensors, is_causal=is_causal, **padding), programs)
        row = next(row for row in rows if row.method == "mean_value")
        assert row.relative_error == pytest.approx(real, rel=1e-4)
        for row in rows:
            assert math.isfinite(row.worst_row_error)
            if row.is_exact:
                assert row.relative_error < 1e-5
                assert row.normalizer_error is None or row.normalizer_error < 1e-5
            if row.method == "local":
                assert 0 < row.far_error < math.inf
    # All queries together have another error.
    error, norm = squares(clean, is_causal, lengths=(24, 24))
    assert math.sqrt(error.sum() / norm.sum()) != pytest.approx(real, rel=1e-3)


def test_a_plan_measures_real_queries():
    clean, noisy = spoilt()
    error, norm = squares(clean)
    options = {"tolerance": 0.5, "methods": ["mean_pool"], "measurement": Measurement(num_seeds=2, rounds=1)}
    plans = [plan(tensors, lengths=LENGTHS, **options) for tensors in (clean, noisy)]
    for made in plans:
        assert made.split.by == "runs of queries"
        assert made.split.shape == (2, 2, 9)
        row = next(c for c in made.candidates if c.method == "mean_value")
        assert row.relative_error == pytest.approx(math.sqrt(error.sum() / norm.sum()), rel=1e-4)
        assert "times include padding, errors do not" in str(plan_table(made, "").caption)
    # Candidates are ordered by their times, which vary between runs.
    labels = [{c.label for c in made.candidates if not c.is_exact} for made in plans]
    assert labels[0] == labels[1]


def test_runs_are_of_real_queries():
    rows = np.random.default_rng(0).normal(size=(2, 10, 4)) ** 2
    mask = np.array([[True] * 10, [False, True] * 4 + [False, False]])
    split = split_units((2, 10, 4, 8), 2, 0.5, 0, mask)
    assert split.shape == (2, 2, 4)
    # Four runs of ten queries begin at 0, 2, 5 and 7; the second sequence has four real queries, one in each run.
    first = [rows[0, a:b, 2 * k : 2 * k + 2].sum() for k in range(2) for a, b in ((0, 2), (2, 5), (5, 7), (7, 10))]
    second = [rows[1, t, 2 * k : 2 * k + 2].sum() for k in range(2) for t in (1, 3, 5, 7)]
    np.testing.assert_allclose(split.sums(rows), first + second)
    rows[1, 0] = np.nan
    np.testing.assert_allclose(split.sums(rows), first + second)
    heads = split_units((2, 10, 16, 8), 8, 0.5, 0, mask)
    np.testing.assert_allclose(heads.sums(np.ones((2, 10, 16))), np.full(8, 28.0))
    with pytest.raises(InputError, match="at least 4 queries.* with 1 real queries in the shortest sequence"):
        split_units((1, 10, 1, 8), 1, 0.5, 0, np.arange(10)[None] < 1)


@pytest.mark.parametrize(
    ("padding", "told"),
    [
        ({"lengths": [24]}, r"lengths must be \[B\] = \[2\], got shape \[1\]"),
        ({"lengths": [[24, 9]]}, r"lengths must be \[B\] = \[2\], got shape \[1, 2\]"),
        ({"lengths": [24, 25]}, "lengths must be from 1 to S = 24, got 25 for sequence 1"),
        ({"lengths": [24, 0]}, "lengths must be from 1 to S = 24, got 0 for sequence 1"),
        ({"lengths": [-1, 9]}, "lengths must be from 1 to S = 24, got -1 for sequence 0"),
        ({"lengths": [24.0, 9.0]}, "lengths must be integers, got dtype float64"),
        ({"lengths": [True, True]}, "lengths must be integers, got dtype bool"),
        ({"lengths": "nine"}, "lengths must be integers, got dtype <U4"),
        ({"mask": np.ones((2, 24), int)}, "mask must be boolean, true where a key is real; got dtype int64"),
        ({"mask": np.ones((2, 23), bool)}, r"mask must be \[B, S\] = \[2, 24\] or \[S\] = \[24\], got shape \[2, 23\]"),
        ({"mask": np.ones((2, 24, 24), bool)}, r"got shape \[2, 24, 24\]"),
        ({"mask": np.zeros(24, bool)}, "every sequence must have a real key, but sequence 0 has none"),
        ({"lengths": 3, "mask": np.arange(24) > 5}, "sequence 0 has none"),
    ],
)
def test_what_does_not_fit(padding, told):
    tensors = Tensors(*random_heads(0, 2, 24, 24, 4, 2))
    (arm,) = (arm for arm in exact_arms(Problem(tensors)) if arm.method == "exact")
    calls = (
        lambda: run_comparison(Problem.of(tensors, **padding), ["mean_pool"], [8]),
        lambda: plan(tensors, tolerance=0.1, methods=["mean_pool"], **padding),
        lambda: compare([arm], *tensors, exact=arm, window=arm, **padding),
    )
    for call in calls:
        with pytest.raises(InputError, match=told):
            call()


def test_what_fits():
    assert key_mask((2, 3, 1, 4)) is None
    lengths = np.array([3, 1], np.uint8)
    expected = [[True, True, True], [True, False, False]]
    assert key_mask((2, 3, 1, 4), lengths=lengths).tolist() == expected
    assert key_mask((2, 3, 1, 4), mask=jnp.asarray(expected)[:, None, None]).tolist() == expected
    assert key_mask((2, 3, 1, 4), mask=expected[1]).tolist() == [expected[1]] * 2
    assert key_mask((2, 3, 1, 4), lengths=2).sum() == 4
    # The queries of cross-attention are all real.
    mask = key_mask((2, 3, 1, 4), lengths=lengths)
    assert query_mask(mask, 3) is mask
    assert query_mask(mask, 5).all()
    assert query_mask(None, 5) is None


def test_an_arm_sees_no_padding():
    clean, noisy = spoilt()
    mask = np.arange(24) < LENGTHS[:, None]
    problem = Problem.of(noisy, mask=mask)
    zeroed = problem.tensors
    for name in ("mean_pool", "uniform_sample"):
        answer = jax.jit(method_arm(problem, name, 4).function)
        outs = [np.asarray(answer(*tensors, jax.random.key(0))[0]) for tensors in (clean, zeroed)]
        np.testing.assert_allclose(outs[0][0], outs[1][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outs[0][1, :9], outs[1][1, :9], rtol=1e-5, atol=1e-6)
