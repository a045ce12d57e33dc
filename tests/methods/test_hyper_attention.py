"""HyperAttention against a loop over queries."""

import jax
import numpy as np

from approx_attention import hyper_attention
from approx_attention.coresets import random_places
from tests.methods.case import Case
from tests.methods.test_coreset import KEY
from tests.references import as_array, compiled, random_head

CASES = {"hyper_attention": Case(unseen="kv", changes={"num_hashes": 1})}


def test_hyper_attention_against_a_loop():
    q, k, v = random_head(45, 20, 26, 6, 3)
    kv_mask = np.arange(26) % 6 != 2
    options = {"sample_size": 5, "block_size": 7, "num_hashes": 3, "scale": 1.0}
    out = np.asarray(compiled(hyper_attention)(q, k, v, KEY, **options, kv_mask=as_array(kv_mask, bool)))
    q, k, v = map(np.asarray, (q, k, v))
    key_hash, key_sample = jax.random.split(KEY)
    planes = np.asarray(jax.random.normal(key_hash, (6, 3)))
    gray = {
        (0, 0, 0): 0,
        (0, 0, 1): 1,
        (0, 1, 1): 2,
        (0, 1, 0): 3,
        (1, 1, 0): 4,
        (1, 1, 1): 5,
        (1, 0, 1): 6,
        (1, 0, 0): 7,
    }
    rank_q, rank_k = ([gray[tuple(row)] for row in (x @ planes > 0).astype(int)] for x in (q, k))
    order_q = sorted(range(20), key=lambda t: (rank_q[t], t))
    order_k = sorted(range(26), key=lambda j: (not kv_mask[j], rank_k[j], j))
    # There are 22 real keys: each of three blocks sees eight, and the sample is over ranks of real keys.
    ranks = np.asarray(compiled(random_places)(as_array(np.arange(26) < 22), 5, key_sample))
    sampled = np.flatnonzero(kv_mask)[ranks]
    for place, t in enumerate(order_q):
        own = [j for j in order_k[place // 7 * 8 : place // 7 * 8 + 8] if kv_mask[j]]
        others = [j for j in sampled if j not in order_k[place // 7 * 8 : place // 7 * 8 + 8]]
        keys = own + others
        weights = np.exp(k[keys].astype(np.float64) @ q[t].astype(np.float64))
        weights[len(own) :] *= kv_mask.sum() / 5
        np.testing.assert_allclose(out[t], weights @ v[keys] / weights.sum(), atol=1e-5)
