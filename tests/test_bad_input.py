"""Bad input gives one clear error that names the argument: counts, arrays, flags, lengths, decoders, compression."""

import functools
import inspect
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from approx_attention import (
    Decoder,
    HeadsDecoder,
    SparsePattern,
    WeightedKV,
    attention,
    bounds,
    compress_cache,
    compress_tokens,
    linen,
    ra,
)
from approx_attention.core import as_pair, causal_state, check_count, check_counts
from approx_attention.coresets import (
    BalanceKV,
    Halving,
    KMeansMerge,
    PivotedNystrom,
    Stratified,
    SubGen,
    refitted,
    running_coreset,
)
from approx_attention.decoding import CompressedDecoder, compress_heads, pyramid_budgets, shared_sizes, token_budget
from approx_attention.evaluation import Problem, Tensors
from approx_attention.evaluation.arms import build_arms
from approx_attention.methods import running_exact
from approx_attention.nnx import ApproxAttention, Eva, Lara, LinformerAttention, Rfa, TensorAttention
from approx_attention.tensor import running_tensor_polynomial
from tests.references import as_array, compiled, quick_process

ROOT = pathlib.Path(__file__).parent.parent
KEY = jax.random.key(0)

# The function as users have it, without the signature checks that the tests install.
plain_attention = inspect.unwrap(attention)


@pytest.mark.parametrize("module", ["tests.bad_input", "tests.bad_values"])
def test_every_function_names_what_it_cannot_take(module):
    """Check methods and other functions in a process without the signature checks that the tests install."""
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=quick_process(), capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


@pytest.mark.parametrize("count", [np.uint8(200), np.int8(100), np.int64(7), 7, 2**31 - 1])
def test_a_count_is_the_int_that_it_stands_for(count):
    assert check_count("n", count) == int(count)
    assert type(check_count("n", count)) is int
    assert as_pair("n", (count, count)) == (int(count),) * 2
    assert check_counts(a=count, b=1) == (int(count), 1)


def test_what_is_no_count_is_said_on_one_line():
    for value in (2.0, "7", None, True, np.bool_(True), jnp.int32(7), np.array(7), [7], jnp.arange(3)):
        with pytest.raises(TypeError, match=r"^n must be an integer known when tracing, got [^\n]*$"):
            check_count("n", value)
    for value in (2**31, 2**63, 10**20, np.uint64(2**63)):
        with pytest.raises(ValueError, match=rf"^n must be at most 2\*\*31 - 1, got .*{int(value)}"):
            check_count("n", value)
    with pytest.raises(ValueError, match="at most 2[*][*]31 - 1, got an integer of 16610 bits"):
        check_count("n", 10**5000)
    assert check_count("bytes", 10**20, most=None) == 10**20
    for value in (3, (1,), (1, 2, 3), "ab", jnp.arange(2)):
        with pytest.raises(TypeError, match="n must be a pair of integers known when tracing"):
            as_pair("n", value)


def test_algorithms_keep_the_ints():
    for made, name in (
        (Halving(block=np.uint8(200)), "block"),
        (Stratified(sample=np.uint8(200)), "sample"),
        (BalanceKV(octaves=np.uint8(200)), "octaves"),
        (KMeansMerge(steps=np.uint8(200)), "steps"),
        (PivotedNystrom(bins=np.uint8(200)), "bins"),
        (SubGen(reservoir=np.uint8(200)), "reservoir"),
    ):
        assert type(getattr(made, name)) is int
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            type(made)(**{name: 0})
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            type(made)(**{name: 1.5})


def test_sizes_of_layers():
    byte, rngs = np.uint8(200), nnx.Rngs(0)
    options = {"window_size": byte, "overlap": byte}
    assert Eva(4, 2, options=options, local_bias=True).local_bias().shape == (200, 600)
    # Only shapes, because the arrays are large.
    make = functools.partial(LinformerAttention, byte, 300, num_slots=byte, sharing="none")
    linformer = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert linformer.projections["projection_k"].shape == (200, 200, 300)
    assert Rfa(byte, byte, rngs=rngs).bandwidth.shape == (200, 200)
    for make in (
        lambda n: Eva(n, 2, options={}),
        lambda n: Lara(n, rngs=rngs),
        lambda n: LinformerAttention(2, n, rngs=rngs),
        lambda n: Rfa(n, 2, rngs=rngs),
        lambda n: TensorAttention(8, num_heads=2, head_dim=n, rngs=rngs),
    ):
        with pytest.raises(ValueError, match="must be at most 2"):
            make(10**20)
        with pytest.raises(TypeError, match="must be an integer"):
            make(2.5)


TENSORS = tuple(as_array(np.ones((2, 6, heads, 4))) for heads in (4, 2, 2))


@pytest.mark.parametrize("name", ["query_seq_lengths", "key_value_seq_lengths"])
def test_lengths_are_those_of_the_sequences(name):
    for lengths, error in (
        (jnp.array([-1, 3]), "must be from 0 to 6, got -1 to 3"),
        (np.array([7, 3]), "must be from 0 to 6, got 3 to 7"),
        ([7, 3], "must be from 0 to 6, got 3 to 7"),
        (3, r"must have the batch's shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=f"{name} {error}"):
            plain_attention(*TENSORS, method="exact", **{name: lengths})
    for lengths in (jnp.ones(2), jnp.ones(2, bool), "ab", [1.0, 2.0]):
        with pytest.raises(TypeError, match=f"{name} must be integers"):
            plain_attention(*TENSORS, method="exact", **{name: lengths})
    # Traced lengths are clipped.
    cut = jax.jit(lambda lengths: plain_attention(*TENSORS, method="exact", **{name: lengths}))(jnp.array([-1, 9]))
    np.testing.assert_array_equal(cut[0], 0)
    np.testing.assert_allclose(cut[1], 1, atol=1e-6)


@pytest.mark.parametrize("value", ["x", 1, None, jnp.array(True), np.array(True)])
def test_whether_attention_is_causal_is_known(value):
    message = "is_causal must be True or False, known when tracing, got"
    with pytest.raises(TypeError, match=message):
        plain_attention(*TENSORS, method="exact", is_causal=value)
    with pytest.raises(TypeError, match=message):
        ApproxAttention("exact", is_causal=value)
    with pytest.raises(TypeError, match=message):
        ApproxAttention("exact")(*TENSORS, is_causal=value)
    with pytest.raises(TypeError, match=message):
        linen.ApproxAttention("exact", is_causal=value)
    with pytest.raises(TypeError, match=message):
        build_arms(Problem(Tensors(*TENSORS), is_causal=value), ["favor"], [4])
    with pytest.raises(TypeError, match="return_residual must be True or False"):
        plain_attention(*TENSORS, method="exact", return_residual=value)


def test_a_numpy_truth_and_what_is_traced():
    causal = plain_attention(*TENSORS, method="exact", is_causal=np.True_)
    np.testing.assert_array_equal(causal, plain_attention(*TENSORS, method="exact", is_causal=True))
    traced = jax.jit(lambda is_causal: plain_attention(*TENSORS, method="exact", is_causal=is_causal))
    with pytest.raises(TypeError, match="is_causal must be True or False, known when tracing"):
        traced(True)
    traced = jax.jit(lambda window: plain_attention(*TENSORS, method="exact", local_window_size=window))
    with pytest.raises(TypeError, match="local_window_size must be an integer known when tracing"):
        traced(2)


@pytest.mark.parametrize(
    ("window", "error"),
    [
        (-1, ValueError), ((1, -1), ValueError), (10**20, ValueError), ([1, 2], TypeError), ((1, 2, 3), TypeError),
        (2.5, TypeError), ((1.5, 2), TypeError), ("x", TypeError), (True, TypeError), (jnp.int32(2), TypeError),
    ],
)  # fmt: skip
def test_windows(window, error):
    with pytest.raises(error, match="^local_window_size must be "):
        plain_attention(*TENSORS, method="exact", local_window_size=window)


def test_windows_of_narrow_integers():
    out = plain_attention(*TENSORS, method="exact", local_window_size=(np.uint8(200), np.uint8(250)))
    np.testing.assert_allclose(out, 1, atol=1e-6)


@pytest.mark.parametrize("value", [[[0.0]], 1.0, "x", ()])
def test_what_is_no_array(value):
    for name, method in (("bias", "exact"), ("mask", "exact"), ("mask", "favor"), ("gate_logits", "rfa")):
        own = {"is_causal": True} if name == "gate_logits" else {}
        with pytest.raises(TypeError, match=f"{name} must be "):
            plain_attention(*TENSORS, method=method, rng=KEY, **own, **{name: value})
    with pytest.raises(TypeError, match="per_head must be a mapping"):
        plain_attention(*TENSORS, method="rfa", rng=KEY, per_head=value)
    with pytest.raises(TypeError, match=r"per_head\['bandwidth'\] must be arrays \[K, ...\]"):
        plain_attention(*TENSORS, method="rfa", rng=KEY, per_head={"bandwidth": [1.0, 2.0]})


def test_a_function_that_takes_any_argument_takes_arrays_by_head():
    def scaled_mean(q, k, v, key=None, **options):
        return options["factor"] * jnp.mean(v, axis=0, keepdims=True) * jnp.ones((q.shape[0], 1))

    query, key, value = TENSORS
    factor = jnp.array([1.0, 2.0])
    out = plain_attention(query, key, value, method=scaled_mean, per_head={"factor": factor})
    # The values are ones; two query heads share a key head.
    np.testing.assert_allclose(out, np.array([1.0, 1.0, 2.0, 2.0])[:, None] * np.ones(out.shape), rtol=1e-6)


# Decoders.


def heads_decoder(**options):
    return HeadsDecoder("favor", num_kv_heads=2, **{"head_dim": 4, "num_features": 4, "block_size": 4} | options)


@functools.cache
def started():
    decoder = heads_decoder()
    return decoder, decoder.init(2, KEY)


@functools.cache
def filled():
    decoder = HeadsDecoder("exact", num_kv_heads=2, head_dim=4, max_length=8, block_size=4)
    return decoder, jax.jit(decoder.extend)(decoder.init(2), *TENSORS)[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q.astype(int), k, v), TypeError, "query must be a floating-point array, got dtype int"),
        (lambda q, k, v: (q > 0, k, v), TypeError, "query must be a floating-point array, got dtype bool"),
        (
            lambda q, k, v: (q.astype(complex), k, v),
            TypeError,
            "query must be a floating-point array, got dtype complex",
        ),
        (lambda q, k, v: (q, k.astype(complex), v), TypeError, "key must be a floating-point array, got dtype complex"),
        (lambda q, k, v: (q, k, v.astype(int)), TypeError, "value must be a floating-point array, got dtype int"),
        (lambda q, k, v: ([1], k, v), TypeError, "query must be a floating-point array, got list"),
        (lambda q, k, v: (q, 3, v), TypeError, "key must be a floating-point array, got int"),
        (lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0]), ValueError, r"query must be \[B, T, heads, channels\]"),
        (lambda q, k, v: (q[:, :, :0], k, v), ValueError, r"query must be \[B, T, heads, channels\]"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), ValueError, "B = 2"),
        (lambda q, k, v: (q, k[:, :3], v), ValueError, r"must be \[B, T, heads, channels\]"),
    ],
)
def test_tensors_of_a_heads_decoder(change, error, message):
    decoder, cache = started()
    with pytest.raises(error, match=message):
        decoder.extend(cache, *change(*TENSORS))


@pytest.mark.parametrize("dtype", ["foo", "bfloat16", jnp.float16, jnp.int32, None, 3])
def test_dtypes_of_decoders(dtype):
    for start in (
        lambda: heads_decoder(dtype=dtype),
        lambda: Decoder(running=running_exact(4, max_length=8), head_dim=4, value_dim=4, block_size=4, dtype=dtype),
    ):
        with pytest.raises(TypeError, match="dtype of a cache must be float32 or float64, got"):
            start()


def test_lengths_of_a_heads_decoder():
    decoder = heads_decoder()
    cache = decoder.init(2, KEY, ragged=True)
    for lengths, error in (
        (jnp.array([-1, 9]), ValueError), (np.array([1, 7]), ValueError), ([1, 2], TypeError), (3, TypeError),
        (jnp.ones(2), TypeError), (jnp.ones(2, bool), TypeError), (jnp.ones((2, 1), int), ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match="lengths must be "):
            decoder.extend(cache, *TENSORS, lengths)
    for name in ("head_dim", "value_dim", "num_features", "block_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            heads_decoder(**{name: 0}).init(2, KEY)
        with pytest.raises(ValueError, match=f"{name} must be at most 2"):
            heads_decoder(**{name: 10**20}).init(2, KEY)
    for scale, error in (("x", TypeError), (1j, TypeError), (True, TypeError), (0.0, ValueError), (np.nan, ValueError)):
        with pytest.raises(error, match="scale must be "):
            heads_decoder(scale=scale)
    narrow = heads_decoder(block_size=np.uint8(200), head_dim=np.uint8(4))
    out, _ = jax.eval_shape(narrow.extend, narrow.init(np.uint8(2), KEY), *TENSORS)
    assert out.shape == (2, 6, 4, 4)


def test_tensors_of_a_decoder():
    decoder = Decoder(running=running_exact(4, max_length=8), head_dim=np.uint8(4), value_dim=4, block_size=np.uint8(8))
    assert type(decoder.block_size) is int
    x, cache = jnp.ones((3, 4)), decoder.init()
    for bad in (x.astype(int), x > 0, x.astype(complex), [[1.0] * 4], 3):
        for call in (
            lambda bad: decoder.append(cache, bad, x),
            lambda bad: decoder.append(cache, x, bad),
            lambda bad: decoder.attend(cache, bad),
            lambda bad: decoder.prefill(cache, bad, x, x),
            lambda bad: decoder.prefill(cache, x, bad, x),
        ):
            with pytest.raises(TypeError, match="^[qkv] must be a floating-point array, got"):
                call(bad)
    for call in (
        lambda: decoder.append(cache, x[:0], x[:0]),
        lambda: decoder.attend(cache, x[:0]),
        lambda: decoder.prefill(cache, x[:0], x[:0], x[:0]),
    ):
        with pytest.raises(ValueError, match=r"got shape \(0, 4\)"):
            call()
    for num_real, error in (
        (-1, ValueError), (4, ValueError), (jnp.int32(4), ValueError), (np.int8(-1), ValueError),
        (1.5, TypeError), (True, TypeError), ("x", TypeError), ([1], TypeError), (jnp.array([1]), TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="num_real must be "):
            decoder.prefill(cache, x, x, x, num_real)
    for scale, error in (("x", TypeError), (jnp.ones(2), TypeError), (-1.0, ValueError)):
        with pytest.raises(error, match="scale must be "):
            Decoder(running=running_exact(4, max_length=8), head_dim=4, value_dim=4, scale=scale)


@pytest.mark.parametrize(
    "options", [{"logits_soft_cap": 5.0}, {"cache_bits": 8}, {"method": "coreset", "certify": 0.1}], ids=str
)
def test_what_a_decoder_of_compressed_caches_lacks(options):
    options = {"method": "exact", "num_kv_heads": 1, "head_dim": 4, "max_length": 64} | options
    (name,) = options.keys() & {"logits_soft_cap", "cache_bits", "certify"}
    with pytest.raises(NotImplementedError, match=f"CompressedDecoder does not support {name}, got"):
        CompressedDecoder(prefix_budget=16, **options)


# Compression and budgets.

K = as_array(np.random.default_rng(1).normal(size=(50, 4)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": -5}, ValueError, "size must be from 0 to 40, got -5"),
        ({"size": 41}, ValueError, "size must be from 0 to 40, got 41"),
        ({"size": jnp.int32(41)}, ValueError, "size must be from 0 to 40, got 41"),
        ({"size": 2.5}, TypeError, "size must be an integer, got 2.5"),
        ({"size": jnp.float32(2)}, TypeError, "size must be integers"),
        ({"size": True}, TypeError, "size must be one number, got bool"),
        ({"size": [3]}, TypeError, "size must be one number, got list"),
        ({"budget": 0}, ValueError, "budget must be at least 1"),
        ({"budget": 40.0}, TypeError, "budget must be an integer"),
        ({"budget": 10**20}, ValueError, "budget must be at most"),
        ({"sinks": -1}, ValueError, "sinks must be at least 0"),
        ({"recent": 1.5}, TypeError, "recent must be an integer"),
        ({"query_radius": float("nan")}, ValueError, "query_radius must be finite and not negative, got nan"),
        ({"query_radius": -1.0}, ValueError, "query_radius must be finite and not negative, got -1.0"),
        ({"query_radius": jnp.float32(jnp.inf)}, ValueError, "query_radius must be finite"),
        ({"query_radius": "x"}, TypeError, "query_radius must be one number, got str"),
        ({"queries": jnp.ones((60, 4))}, ValueError, r"queries must be \[T, D\] = \[1 to 50, 4\].* \(60, 4\)"),
        ({"queries": jnp.ones((0, 4))}, ValueError, r"queries must be \[T, D\]"),
        ({"queries": jnp.ones((5, 3))}, ValueError, r"queries must be \[T, D\]"),
        ({"queries": [[1.0] * 4]}, TypeError, "queries must be a floating-point array, got list"),
        ({"queries": jnp.ones((5, 4), int)}, TypeError, "queries must be a floating-point array, got dtype int"),
        ({"mass_correction": 1}, TypeError, "mass_correction must be True, False or .fitted."),
    ],
)
def test_compressing_tokens(options, error, message):
    with pytest.raises(error, match=message):
        compress_tokens(K, K, **{"budget": 40, "policy": "knorm"} | options)


def test_compressing_what_is_no_tensor_or_cache():
    with pytest.raises(TypeError, match="k must be a floating-point array, got list"):
        compress_tokens([[1.0]], K, budget=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="v must be a floating-point array, got dtype int"):
        compress_tokens(K, K.astype(int), budget=4)
    decoder = Decoder(running=running_exact(4, max_length=40), head_dim=4, value_dim=4, block_size=8)
    cache = compiled(decoder.append)(decoder.init(), K[:30], K[:30])
    with pytest.raises(ValueError, match="size must be from 0 to 8, got 9"):
        compress_cache(cache, budget=8, sinks=0, policy="knorm", size=9)
    with pytest.raises(ValueError, match=r"queries must be \[T, D\] = \[1 or more, 4\].* \(50, 3\)"):
        compress_cache(cache, budget=8, sinks=0, policy="h2o", queries=K[:, :3])
    with pytest.raises(ValueError, match="query_radius must be finite"):
        compress_cache(cache, KEY, budget=8, query_radius=float("nan"))
    with pytest.raises(TypeError, match="compress_cache needs the Cache of a Decoder, got tuple"):
        compress_cache((), budget=8)  # pyright: ignore[reportArgumentType]
    narrow = compiled(compress_cache)(cache, budget=np.uint8(16), sinks=np.uint8(2), policy="knorm")
    assert narrow.past.prefix.fixed.mass.shape == (16,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"queries": TENSORS[0][0]},
            ValueError,
            r"queries must be .* = \[2, 1 or more, .*, 4\], got shape",
        ),
        ({"queries": TENSORS[0][:1]}, ValueError, r"queries must be \[B, T, N, D\].* got shape \(1, 6, 4, 4\)"),
        ({"queries": TENSORS[0][:, :, :3]}, ValueError, r"a multiple of 2, 4\], got shape \(2, 6, 3, 4\)"),
        ({"queries": TENSORS[0][:, :0]}, ValueError, r"queries must be .* got shape \(2, 0, 4, 4\)"),
        ({"queries": TENSORS[0][..., :3]}, ValueError, r"queries must be .* got shape \(2, 6, 4, 3\)"),
        ({"queries": [[1.0]]}, TypeError, "queries must be a floating-point array, got list"),
        ({"sizes": jnp.ones(3, int)}, ValueError, r"sizes must be \[K\] = \[2\], got shape \(3,\)"),
    ],
)
def test_compressing_the_caches_of_heads(options, error, message):
    decoder, cache = filled()
    with pytest.raises(error, match=message):
        inspect.unwrap(compress_heads)(decoder, cache, KEY, budget=4, sinks=0, policy="h2o", **options)


def test_budgets():
    for num_bytes in (2500.5, 2500.0, "x", jnp.float32(2500)):
        with pytest.raises(TypeError, match="num_bytes must be an integer"):
            token_budget(num_bytes, 4, 4)
    assert type(token_budget(np.int64(2500), np.uint8(200), np.uint8(200))) is int
    assert token_budget(10**20, 4, 4) == 10**20 // 36
    for steepness, error in ((np.nan, ValueError), (np.inf, ValueError), (0.5, ValueError), ("x", TypeError)):
        with pytest.raises(error, match="steepness must be "):
            pyramid_budgets(8, 100, steepness=steepness)
    for scores, error in (
        (jnp.full((2, 8), jnp.nan), ValueError), (jnp.ones(8), ValueError), (jnp.ones((2, 0)), ValueError),
        ([[1.0]], TypeError), (jnp.ones((2, 8), int), TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="scores must be "):
            shared_sizes(scores, 3)
    for budget, error in ((3.5, TypeError), (-1, ValueError), (10**20, ValueError)):
        with pytest.raises(error, match="budget must be "):
            shared_sizes(jnp.ones((2, 8)), budget)
    traced = jax.jit(lambda scores: shared_sizes(scores, 3))(as_array([[np.nan] * 8, [1] * 8]))
    np.testing.assert_array_equal(traced, [0, 6])


def test_arguments_that_no_path_may_ignore():
    q, k, v = (jnp.ones((6, 4)) for _ in range(3))
    for radius, error in ((-1.0, ValueError), (float("nan"), ValueError), ("x", TypeError)):
        with pytest.raises(error, match="query_radius must be "):
            refitted(WeightedKV.of_tokens(k, v), WeightedKV.of_tokens(k[:2], v[:2]), query_radius=radius)
        with pytest.raises(error, match="radius must be "):
            bounds.sensitivity(k, radius)
    with pytest.raises(TypeError, match="refitted needs a WeightedKV, got tuple"):
        refitted((k, v), WeightedKV.of_tokens(k, v))
    with pytest.raises(ValueError, match=r"kv_mask must be \[S\] = \[6\], got shape \(3,\)"):
        inspect.unwrap(bounds.sensitivity)(k, 1.0, kv_mask=jnp.ones(3, bool))
    for queries in (q[:0], jnp.ones((6, 5))):
        with pytest.raises(ValueError, match="needs at least one query|share the head dimension, got 5 and 4"):
            causal_state(queries, k, v, running_exact(4, max_length=8), block_size=4)
    decoder = running_tensor_polynomial(4)
    with pytest.raises(ValueError, match="step needs 2 sets of keys and of values, got 1 and 1"):
        decoder.step(decoder.init(4), q[:1], (k[:1],), (v[:1],))
    indices = jnp.zeros((6, 3), int)
    assert jax.eval_shape(functools.partial(ra, indices=indices), q, k, v, KEY).shape == (6, 4)


def test_a_radius_of_a_running_coreset():
    for radius in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="query_radius must be finite and not negative"):
            running_coreset(4, KEY, streaming="counter", algorithm="halving", query_radius=radius)


def test_patterns_of_narrow_integers():
    narrow, wide = (SparsePattern.strided(n(200), n(100)) for n in (np.uint8, int))
    np.testing.assert_array_equal(narrow.indices, wide.indices)
