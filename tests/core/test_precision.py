"""Products that an accelerator may round, read from the programs that are lowered for one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from approx_attention import METHODS, SparsePattern, WeightedKV, bounds, certify, realize_sparse_pattern
from approx_attention.core import in_float32, leverages
from approx_attention.coresets import ALGORITHMS
from approx_attention.evaluation import Arm, Tensors, compare, plan, spectrum, sup_error
from approx_attention.realization import match3
from tests.forms import FORM
from tests.programs import equations, products
from tests.references import as_array, random_head, random_heads

NUM_QUERIES, NUM_KEYS, HEAD_DIM, VALUE_DIM = 40, 48, 4, 5


@pytest.fixture(autouse=True)
def of_a_user():
    """The precision of a user who has set none; the tests use float32."""
    with jax.default_matmul_precision("default"):
        yield


def tokens():
    return random_head(0, NUM_QUERIES, NUM_KEYS, HEAD_DIM, VALUE_DIM)


def precision():
    return jax.config.jax_default_matmul_precision


def test_the_context_and_the_decorator_are_the_same():
    assert precision() == "default"
    with in_float32():
        assert precision() == "float32"
    assert in_float32()(precision)() == "float32"
    assert in_float32()(in_float32()(precision))() == "float32"
    assert precision() == "default"


def realized(eps1, method):
    pattern = SparsePattern.banded(16, [0, 1])
    return realize_sparse_pattern(pattern, eps1, 0.5, d=12, key=jax.random.key(0), method=method, num_steps=2).inputs


IN_FLOAT32 = {
    "spectrum": lambda q, k, v: spectrum(q, k),
    "sup_error": lambda q, k, v: sup_error(k, v, WeightedKV.of_tokens(k[:4], v[:4]), 1.0, num_steps=2),
    "certify": lambda q, k, v: certify(k, k.T @ k, k.T @ k, SparsePattern.banded(NUM_KEYS, [0])),
    "favor_mse": lambda q, k, v: bounds.favor_mse(q, k, 8),
    "sketch_mse": lambda q, k, v: bounds.sketch_mse(q @ k.T, v, 8),
    "row_sample_mse": lambda q, k, v: bounds.row_sample_mse(q @ k.T, v, 8, k[:, 0]),
    "merge_bound": lambda q, k, v: bounds.merge_bound(k, v, WeightedKV.of_tokens(k[:4], v[:4]), 1.0),
    "sensitivity": lambda q, k, v: bounds.sensitivity(k, 1.0),
    "logit_rms": lambda q, k, v: bounds.logit_rms(q, (k, k)),
    "leverages": lambda q, k, v: leverages(k),
    "match3": lambda q, k, v: match3(jnp.arange(8), 11),
    "svd": lambda q, k, v: METHODS["svd"].function(q, k, v, rank=3),
    **{f"realize {name}": lambda q, k, v, name=name: realized(0.5, name)
       for name in ("projection", "balanced", "wls", "max_margin", "learned", "trigonometric")},
}  # fmt: skip


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_diagnostics_certificates_and_references_are_not_rounded(name):
    function = IN_FLOAT32[name]
    # Products in the test itself, which makes the arguments, have the user's precision.
    given = {"certify": 2, "sketch_mse": 1, "row_sample_mse": 1}.get(name, 0)
    rounded = [rounds for _, rounds in products(function, *tokens())]
    assert len(rounded) > given
    assert sum(rounded) == given


def test_the_yardstick_is_not_rounded_in_its_derivative_either():
    q, k, v = tokens()

    def loss(q):
        return jnp.sum(METHODS["svd"].function(q, k, v, rank=3))

    assert not any(rounds for _, rounds in products(jax.grad(loss), q))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nystrom", {"inverse": "iterations"}),
        ("nystrom", {"inverse": "ridge"}),
        ("nystrom", {"inverse": "svd"}),
        ("skyformer", {}),
        ("coreset", {"algorithm": "kmeans_nystrom"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "".join(x.values()),
)
def test_an_inverse_is_not_rounded_and_products_over_all_tokens_are_as_the_user_says(name, options):
    method = METHODS[name]
    options = {**options, method.size: 6}

    def function(q, k, v):
        """The output and the gradients of its sum."""
        out, pull = jax.vjp(lambda *x: method.function(*x, jax.random.key(1), **options), q, k, v)
        return out, pull(jnp.ones_like(out))

    found = list(products(function, *tokens()))
    inverse = [rounds for shapes, rounds in found if all(max(shape) <= 6 for shape in shapes)]
    over_tokens = [rounds for shapes, rounds in found if max(max(shape) for shape in shapes) >= NUM_QUERIES]
    assert inverse
    assert not any(inverse)
    # Landmarks are spread over the tokens by distances, which are differences of squares.
    assert any(over_tokens) if name == "coreset" else all(over_tokens)
    with jax.default_matmul_precision("float32"):
        assert not any(rounds for _, rounds in products(function, *tokens()))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"svd", "nystrom", "skyformer", "cosformer"}))
def test_an_approximation_has_the_precision_that_its_user_sets(name):
    method = METHODS[name]
    options = {} if method.size is None else {method.size: 4}
    function = functools.partial(method.function, key=jax.random.key(1), **options)
    _, k, v = tokens()
    rounded = [rounds for _, rounds in products(function, k, k, v)]
    # These methods spread landmarks, or solve for leverages.
    assert any(rounded) if name in ("coreset", "sparse_coreset", "importance_sample") else all(rounded)


@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) - {"herding"}))  # which computes no distances
def test_no_distance_to_a_single_key_is_rounded(algorithm):
    _, k, v = tokens()
    options = {"key": jax.random.key(1), "coreset_size": 6, "algorithm": algorithm}
    # The traced program has the same distances as the lowered one, and is made in half the time.
    with FORM("all"):
        jaxpr = jax.make_jaxpr(lambda k, v: METHODS["coreset"].function(k, k, v, **options))(k, v).jaxpr
    for equation, _ in equations(jaxpr, platform="tpu"):
        if equation.primitive.name == "dot_general":
            shapes = [x.aval.shape for x in equation.invars]
            exact = equation.params["precision"] == 2 * (lax.Precision.HIGHEST,)
            assert exact or shapes != [(NUM_KEYS, HEAD_DIM), (HEAD_DIM,)]


def test_the_truth_of_a_comparison_is_not_rounded_and_configurations_are_those_of_the_user():
    traced = {}

    def arm(name, is_exact=False):
        def function(query, key, value, rng):
            traced.setdefault(name, []).append(precision())
            return value, jnp.zeros(value.shape[:-1])

        return Arm(name, function, is_exact=is_exact)

    x = as_array(np.ones((1, 4, 1, 2)))
    exact, window, mine = arm("exact", is_exact=True), arm("window"), arm("mine")
    compare([exact, mine], x, x, x, exact=exact, window=window, rounds=1)
    assert traced == {"exact": ["float32", "default"], "window": ["float32"], "mine": ["default"]}


def test_the_truth_of_a_plan_is_not_rounded(monkeypatch):
    traced = []
    from approx_attention.evaluation import bench

    compiled = bench.compile_arm
    monkeypatch.setattr(
        bench, "compile_arm", lambda arm, *args: traced.append((arm.method, precision())) or compiled(arm, *args)
    )
    q, k, v = (np.asarray(x) for x in random_heads(0, 1, 16, 16, 8, 8, 4))
    plan(Tensors(*map(as_array, (q, k, v + 1))), tolerance=0.5, methods=["mean_pool"])
    assert traced[0] == ("exact", "float32")
    assert {how for _, how in traced[1:]} == {"default"}
    assert ("exact", "default") in traced
