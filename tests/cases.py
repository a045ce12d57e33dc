"""Every method with small settings: the cases of `tests.methods`, and calls that many tests share."""

import functools
import importlib
import inspect
import pkgutil

import jax
import numpy as np
import pytest

from approx_attention import METHODS, attention
from tests import methods
from tests.methods.case import Case
from tests.references import having


def _collected():
    found = {}
    for module in pkgutil.iter_modules(methods.__path__):
        cases = getattr(importlib.import_module(f"{methods.__name__}.{module.name}"), "CASES", {})
        if twice := found.keys() & cases.keys():
            raise ValueError(f"two cases of {', '.join(twice)}, the second in {module.name}")
        found |= cases
    return found


CASES: dict[str, Case] = _collected()


def case_of(name):
    """Return the case of a method, or the default one; the contract tests report a missing case."""
    return CASES.get(name, Case())


# The methods that the contract tests run over.

ALL = list(METHODS)
CAUSAL = having(causal=True)
DIRECTIONS = [(name, c) for name in ALL for c in ([False, True] if name in CAUSAL else [False])]


def unless_slow(name, *others, also=()):
    """Parameters of a test of the lifting rather than of the method: a slow test for most methods."""
    return pytest.param(name, *others, marks=() if case_of(name).fast or name in also else pytest.mark.slow)


every_method = pytest.mark.parametrize("name", ALL)
lifted = pytest.mark.parametrize("name", [unless_slow(name) for name in ALL])
# A method with a causal form is tested in that form; its bidirectional form is a slow test.
one_direction = pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, name in CAUSAL) for name in ALL] + [pytest.param(name, False, marks=pytest.mark.slow) for name in CAUSAL],
)
lifted_one_direction = pytest.mark.parametrize(
    ("name", "is_causal"),
    [unless_slow(name, name in CAUSAL) for name in ALL]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in CAUSAL],
)
lifted_both_directions = pytest.mark.parametrize(("name", "is_causal"), [unless_slow(*x) for x in DIRECTIONS])


def settings(name, size=8, block_size=4):
    """Hyper-parameters that make a method small."""
    chosen = sized(name, size)
    if METHODS[name].block in inspect.signature(METHODS[name].function).parameters:
        chosen[METHODS[name].block] = block_size
    return chosen


def sized(name, size):
    """The hyper-parameter that makes a summary of this size."""
    method = METHODS[name]
    return {method.size: case_of(name).size(size)} if method.size else {}


def running_of(name, max_length):
    """The running summary for heads of 8 channels, with a fixed key, and with `max_length` if the method needs it."""
    running = METHODS[name].running
    room = inspect.signature(running).parameters.get("max_length")
    known = {"max_length": max_length} if room and room.default is room.empty else {}
    return running(8, jax.random.key(7), **sized(name, 8), **known)


def call(name, q, k, v, *, size=8, block_size=4, key=None, **options):
    """A method on one head, compiled, with small settings and a fixed key."""
    key = jax.random.key(7) if key is None else key
    options = {**settings(name, size, block_size), **options}
    arrays = {option: x for option, x in options.items() if isinstance(x, jax.Array)}
    fixed = tuple((option, x) for option, x in options.items() if option not in arrays)
    return _compiled(METHODS[name].function, fixed)(q, k, v, key, arrays)


def dense(q, k, v, *, is_causal=False):
    """Exact attention of one head, computed from the whole matrix."""
    return call("exact", q, k, v, is_causal=is_causal, implementation="dense")


def call_heads(name, query, key, value, *, rng=None, **options):
    """A method over batch and heads, compiled, with small settings and a fixed key."""
    arrays = {option: x for option, x in options.items() if isinstance(x, jax.Array)}
    fixed = {**settings(name), **{option: x for option, x in options.items() if option not in arrays}, "method": name}
    rng = jax.random.key(7) if rng is None else rng
    return _compiled(_attention, tuple(fixed.items()))(query, key, value, rng, arrays)


def _attention(query, key, value, rng, **options):
    return attention(query, key, value, rng=rng, **options)


def pulled_back(function):
    """Compile ``(q, k, v, d_out, *others) -> out, gradients`` of ``function(q, k, v, *others)`` as one program."""

    @jax.jit
    def both(q, k, v, d_out, *others):
        out, pull = jax.vjp(lambda *tensors: function(*tensors, *others), q, k, v)
        return out, pull(d_out.astype(out.dtype))

    return both


def with_gradients(
    name, q, k, v, d_out=None, *, kv_mask=None, key=None, size=8, block_size=4, is_causal=False, **options
):
    """Outputs of a method on one head, with small settings, and gradients of q, k and v.

    All calls of the same shapes share one program, because the mask is an argument.
    """
    key = jax.random.key(7) if key is None else key
    d_out = np.ones((len(q), v.shape[1]), np.float32) if d_out is None else d_out
    options = {**settings(name, size, block_size), **options, **({"is_causal": True} if is_causal else {})}
    return _with_gradients(name, tuple(options.items()))(q, k, v, d_out, kv_mask, key)


@functools.cache
def _with_gradients(name, fixed):
    function = METHODS[name].function
    return pulled_back(lambda q, k, v, kv_mask, key: function(q, k, v, key, kv_mask=kv_mask, **dict(fixed)))


# Lengths for `with_gradients`: of a sequence without padding, and of one with padding.
LENGTH, PADDED_LENGTH = 27, 52


@functools.lru_cache(maxsize=256)
def _compiled(function, fixed):
    """One compiled program for all tests that make the same call."""
    return jax.jit(lambda q, k, v, key, arrays: function(q, k, v, key, **dict(fixed), **arrays))
