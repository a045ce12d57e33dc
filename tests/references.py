"""References for tests: brute force in float64, small inputs, and functions compiled as one program."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from approx_attention import METHODS


def brute_force(q, k, v, *, scale=None, mask=None, bias=None):
    """Softmax attention of one head in float64: outputs and log-normalisers, 0 and -inf where nothing is seen."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = q @ k.T * (1 / np.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    seen = np.ones(logits.shape, bool) if mask is None else np.broadcast_to(mask, logits.shape)
    v = np.where(seen.any(0)[:, None], v, 0)
    logits = np.where(seen, logits, -np.inf)
    peak = np.where(seen.any(1), np.max(logits, axis=1, initial=-np.inf, where=seen), 0)
    weights = np.where(seen, np.exp(np.where(seen, logits - peak[:, None], 0)), 0)
    total = weights.sum(1)
    with np.errstate(divide="ignore"):
        return weights @ v / np.where(total > 0, total, 1)[:, None], peak + np.log(total)


def kernelised_attention(q, k, v, *, scale=None):
    """Gaussian weights of one head in float64, without a normaliser: what Skyformer approximates."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    return np.exp(-scale * np.sum((q[:, None] - k[None]) ** 2, axis=-1) / 2) @ v


def causal_mask(num_queries, num_keys):
    return np.arange(num_keys)[None, :] <= np.arange(num_queries)[:, None]


def without_padding(q, k, v, kv_mask, is_causal=False):
    """The tokens without padding, and the mask of the remaining queries: those at real keys, if positions match."""
    real, rows = np.asarray(kv_mask), np.ones(len(q), bool)
    if is_causal or len(q) == len(k):
        rows[: len(k)] = real[: len(q)]
    return q[rows], k[real], v[real], rows


def scaled(q, k):
    """Queries and keys in scaled space, as NumPy arrays: logits are their products."""
    return tuple(np.asarray(x) / q.shape[1] ** 0.25 for x in (q, k))


def as_array(x, dtype=jnp.float32):
    """A JAX array of numbers from numpy, without the program that ``jnp.asarray`` compiles for each shape."""
    array = jax.device_put(np.asarray(x, dtype))
    assert array.dtype == dtype, f"{array.dtype}, because the test lacks the fixture x64"
    return array


def random_head(seed, num_queries, num_keys, head_dim=8, value_dim=None, dtype=jnp.float32, spread=1.0):
    """q [T, D], k [S, D], v [S, Dv] with standard normal entries, times ``spread`` for q and k."""
    random = np.random.default_rng(seed)
    value_dim = head_dim if value_dim is None else value_dim
    q, k = (spread * random.normal(size=(n, head_dim)) for n in (num_queries, num_keys))
    return tuple(as_array(x, dtype) for x in (q, k, random.normal(size=(num_keys, value_dim))))


def random_heads(seed, batch, num_queries, num_keys, num_heads, num_kv_heads, head_dim=8):
    """query [B, T, N, D], key and value [B, S, K, D]."""
    random = np.random.default_rng(seed)
    shapes = (batch, num_queries, num_heads, head_dim), *[(batch, num_keys, num_kv_heads, head_dim)] * 2
    return tuple(as_array(random.normal(size=shape)) for shape in shapes)


def compiled(*functions):
    """Compile functions as one program for each form of call; otherwise each operation is a separate program.

    Arguments that are no JAX arrays are constants of the program, and programs are cached: tests that change a
    module, or the options of the compiler, between calls cannot use it.
    """
    made = tuple(functools.wraps(function)(functools.partial(_as_one_program, function)) for function in functions)
    return made if len(made) > 1 else made[0]


def _as_one_program(function, /, *args, **options):
    leaves, structure = jax.tree.flatten((args, options))
    # Compared by type and text too: 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    constants = tuple(None if isinstance(x, jax.Array) else (x, type(x), repr(x)) for x in leaves)
    try:
        program = _program(function, structure, constants)
    except TypeError:  # a constant without a hash
        program = _program.__wrapped__(function, structure, constants)
    return program([x for x in leaves if isinstance(x, jax.Array)])


@functools.lru_cache(maxsize=256)
def _program(function, structure, constants):
    def program(arrays):
        rest = iter(arrays)
        leaves = [next(rest) if constant is None else constant[0] for constant in constants]
        args, options = jax.tree.unflatten(structure, leaves)
        return function(*args, **options)

    return jax.jit(program)


def quick_process():
    """The environment of a subprocess that compiles programs like the tests, and shares their cache."""
    return os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_TRACEBACK_FILTERING": "off",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def having(**capabilities):
    """Names of the methods with these capabilities."""
    return [
        name
        for name, method in METHODS.items()
        if all(getattr(method.capabilities, field) == value for field, value in capabilities.items())
    ]


def relative_error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)
