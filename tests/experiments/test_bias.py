"""The squared bias of `experiments.control_variates.bias` and its standard error are those of their definition."""

import numpy as np

from experiments.control_variates.bias import squared_bias


def test_the_standard_error_is_the_scatter_of_estimates_without_a_bias():
    parts = np.random.default_rng(0).normal(size=(4000, 16, 3, 2))
    estimates, errors = np.array([squared_bias(one) for one in parts]).T
    # Both have a relative noise of about one in a hundred here.
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), estimates.std(), rtol=0.07)
    assert abs(estimates.mean()) < 4 * estimates.std() / np.sqrt(4000)


def test_a_bias_is_found_whatever_the_noise():
    parts = 0.5 + np.random.default_rng(1).normal(size=(4000, 16, 3, 2))
    estimates = np.array([squared_bias(one)[0] for one in parts])
    assert abs(estimates.mean() - 6 * 0.25) < 4 * estimates.std() / np.sqrt(4000)
