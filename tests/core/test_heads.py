"""Heads one by one, all at once, and in groups give the same result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention.core import heads

pytestmark = pytest.mark.all_forms


@pytest.mark.parametrize(
    ("count", "most", "groups"), [(6, 6, 1), (6, 4, 2), (7, 3, 3), (12, 5, 3), (5, 1, 5), (0, 4, 1)]
)
def test_groups_of_heads_change_no_head(monkeypatch, count, most, groups):
    monkeypatch.setattr(heads, "TOGETHER", 10 * most)
    slices = np.arange(10 * count, dtype=np.float32).reshape(count, 10)
    sizes = []

    def function(x):
        return jnp.cumsum(x) * 2

    def vmapped(function):
        def run(slices):
            sizes.append(slices.shape[0])
            return original(function)(slices)

        return run

    original = jax.vmap
    monkeypatch.setattr(jax, "vmap", vmapped)
    out = jax.jit(lambda slices: heads._at_once(function, slices))(slices)
    np.testing.assert_array_equal(out, np.cumsum(slices, axis=1) * 2)
    assert max(sizes, default=0) <= most


def test_each_follows_the_platform_of_the_program():
    traced = jax.jit(lambda x: heads.each(jnp.sin, x)).trace(np.ones((4, 3), np.float32))
    loops = {
        name: "stablehlo.while" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")
    }
    assert loops == {"cpu": True, "cuda": False, "tpu": False}
