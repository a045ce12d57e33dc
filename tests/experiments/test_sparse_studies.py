"""Shortcuts of two studies of sparse patterns against the direct computation."""

import itertools

import jax
import pytest

from approx_attention import SparsePattern, realize_sparse_pattern
from experiments.sparse_patterns.one_channel import supports_of_patterns
from experiments.sparse_patterns.search import accepted

NUM_TOKENS = 48


@pytest.mark.parametrize(("method", "channels"), [("projection", 17), ("wls", 14)])
def test_a_sample_for_permutations_is_accepted_as_by_certificates(method, channels):
    @jax.jit
    def by_both(seed):
        keys = jax.random.split(jax.random.key(seed))
        pattern = SparsePattern.random(keys[0], NUM_TOKENS, 1)
        realized = realize_sparse_pattern(pattern, 0.5, 1.0, d=channels, key=keys[1], method=method, max_draws=1)
        return accepted(realized.inputs[:, channels:], channels, method=method), realized.certificate.ok

    verdicts = {tuple(map(bool, by_both(seed))) for seed in range(8)}
    assert verdicts == {(False, False), (True, True)}


def test_every_set_of_supports_is_there_once():
    orders = list(itertools.permutations(range(3)))
    classes = {
        min(tuple(sorted(sum(1 << order[i] for i in range(3) if s >> i & 1) for s in rows)) for order in orders)
        for size in (1, 2, 3)
        for rows in itertools.combinations(range(1, 8), size)
    }
    assert sum(map(len, supports_of_patterns(3))) == len(classes)
