"""Programs of causal forms for accelerators: the number of sequential steps does not depend on the length."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from approx_attention import attention
from tests.forms import one_form
from tests.programs import loop_steps, lowered_for

pytestmark = pytest.mark.all_forms


def test_steps_of_loops_multiply_and_follow_the_platform():
    def inner(x):
        return lax.fori_loop(2, 5, lambda i, x: x + 1, x)

    def function(x):
        x, _ = lax.scan(lambda x, y: (jax.jit(inner)(x), None), x, jnp.arange(7))
        return lax.platform_dependent(x, cpu=inner, default=lambda x: inner(inner(x)))

    x = jnp.zeros(())
    assert loop_steps(lowered_for("cpu", function, x)) == 7 * (1 + 3) + 3
    assert loop_steps(lowered_for("cuda", function, x)) == 7 * (1 + 3) + 2 * 3
    branches = functools.partial(lax.cond, False, inner, lambda x: x)
    assert loop_steps(lowered_for("tpu", lambda x: lax.cond(x > 0, inner, branches, x), x)) == 3
    with pytest.raises(ValueError, match="not known"):
        loop_steps(lowered_for("cpu", lambda n: lax.fori_loop(0, n, lambda i, x: x * 2, 1), 5))


def causal(method, **options):
    """Outputs and gradients in the form for accelerators, traced alone."""
    forward = functools.partial(attention, method=method, is_causal=True, rng=jax.random.key(0), **options)

    def outputs_and_gradients(query, key, value, cotangent):
        with one_form("default"):
            out, pull = jax.vjp(forward, query, key, value)
            return out, pull(cotangent)

    return outputs_and_gradients


@pytest.mark.parametrize(("method", "options"), [("favor", {"num_features": 64}), ("eva", {"num_chunks": 64})])
def test_no_more_steps_in_sequence_for_more_tokens(method, options):
    steps = [
        loop_steps(lowered_for("cuda", causal(method, **options), *4 * [tokens]))
        for length in (2048, 8192)
        for tokens in [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.bfloat16)]
    ]
    assert steps[0] == steps[1] <= 64
