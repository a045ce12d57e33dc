"""Tree attention: exact messages against sums over all tuples in float64, and messages by approximate methods."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from approx_attention import AttentionState, exact, tensor_attention, tree_attention
from approx_attention.registry import bind
from tests.programs import equations
from tests.tensor.tuples import close, tensors

STATIC = ("parents", "is_causal", "return_state", "method", "num_landmarks", "coreset_size", "num_features",
          "num_chunks", "window_size")  # fmt: skip
compiled = jax.jit(tree_attention, static_argnames=STATIC)

TREES = {
    "path of 2": (-1, 0),
    "path of 3": (-1, 0, 1),
    "star of the query": (-1, -1, -1),
    "star of a node": (1, -1, 1),
    "binary tree": (-1, 0, 0, 1, 1),
}
trees = pytest.mark.parametrize("parents", TREES.values(), ids=TREES.keys())


def brute(q, k, v, parents, *, scale, node_queries=None, is_causal=False, kv_mask=None):
    """Outputs and logarithms of normalisers from every tuple of keys: axis 0 is the query, axis i + 1 node i."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    asking = [q, *(k if node_queries is None else np.asarray(node_queries, np.float64))]
    shape = (len(q), *(len(x) for x in k))
    place, logits, seen = np.indices(shape), np.zeros(shape), np.ones(shape, bool)
    for node, parent in enumerate(parents):
        above, own = place[parent + 1], place[node + 1]
        if kv_mask is not None:
            seen &= np.asarray(kv_mask[node])[own]
        logits = logits + scale * (asking[parent + 1] @ k[node].T)[above, own]
        if is_causal:
            seen &= own <= above
    weights = np.where(seen, np.exp(logits), 0)
    total = weights.reshape(len(q), -1).sum(1)
    names = "jlprsu"[: len(k)]
    out = np.einsum(f"i{names},{','.join(name + 'c' for name in names)}->ic", weights, *v)
    with np.errstate(divide="ignore"):
        return out / np.where(total > 0, total, 1)[:, None], np.log(total)


def tree_tensors(seed, num_queries, num_keys, num_nodes, dtype=jnp.float64, spread=1.0, dim=4):
    """q [T, D]; k, v and node queries [m, S, .]; in NumPy, because JAX compiles a program for each slice."""
    q, keys, values = tensors(seed, num_queries, (num_keys,) * num_nodes, spread=spread, dtype=dtype, dim=dim)
    _, others, _ = tensors(seed + 100, 1, (num_keys,) * num_nodes, dtype=dtype, dim=dim)
    return np.asarray(q), np.stack(keys), np.stack(values), np.stack(others)


def lifted(q, k, parents, node_queries):
    """Queries and keys of the equivalent tensor attention: separate channels for each edge, 1 at nodes outside it."""

    def channels(x, node):
        own = [k[node] if node == child else node_queries[node] if node == parent else jnp.ones_like(x)
               for child, parent in enumerate(parents)]  # fmt: skip
        return jnp.concatenate(own, axis=1)

    asked = [q if parent == -1 else jnp.ones_like(q) for parent in parents]
    return jnp.concatenate(asked, axis=1), tuple(channels(x, node) for node, x in enumerate(k))


@trees
@pytest.mark.parametrize("is_causal", [False, True])
def test_messages_are_the_sum_over_tuples(x64, parents, is_causal):
    num_queries, num_keys = (7, 5) if is_causal else (3, 6)
    q, k, v, u = tree_tensors(0, num_queries, num_keys, len(parents))
    # The first keys of node 0 are hidden: in the causal form the first queries see no tuple.
    mask = np.random.default_rng(1).random((len(parents), num_keys)) < 0.7
    mask[0] = np.arange(num_keys) > 1
    options: dict[str, Any] = {"scale": 0.6, "is_causal": is_causal}
    state_of = functools.partial(compiled, q, k, v, parents=parents, return_state=True, **options)
    both = state_of(node_queries=u, kv_mask=mask)
    # By default keys ask, and nothing is hidden; in the causal form these are arguments of the same program.
    plain = state_of(node_queries=k, kv_mask=np.ones_like(mask)) if is_causal else state_of()
    given: list[tuple[AttentionState, dict[str, Any]]] = [(plain, {}), (both, {"node_queries": u, "kv_mask": mask})]
    for state, more in given:
        out, lse = brute(q, k, v, parents, **options, **more)
        close(state.out, out)
        close(state.lse, lse)
    out, lse = np.asarray(both.out), np.asarray(both.lse)
    assert not is_causal or (np.all(np.isneginf(lse[:2])) and not np.any(out[:2]))


@pytest.mark.parametrize("parents", [(-1, 0), (-1, 0, 1), (-1, -1, -1), (-1, 0, 0)])
def test_every_tree_is_tensor_attention_with_channels_for_each_edge(x64, parents):
    q, k, v, u = tree_tensors(2, 5, 5, len(parents))
    mask = np.arange(5) != 1
    causal = {"both": parents.count(-1) == len(parents), "ordered": parents in ((-1, 0), (-1, 0, 1)), None: True}
    for kind in [kind for kind, applies in causal.items() if applies]:
        tree = compiled(q, k, v, parents=parents, node_queries=u, kv_mask=mask, scale=0.6, is_causal=kind is not None)

        def over_tuples(q, k, v, u, kind=kind):
            return tensor_attention(*lifted(q, k, parents, u), v, kv_mask=mask, scale=0.6, is_causal=kind)

        close(tree, jax.jit(over_tuples)(q, k, v, u))


def test_one_node_is_attention_and_children_of_the_query_multiply(x64):
    q, k, v, _ = tree_tensors(3, 5, 6, 3)
    each = np.asarray(jax.jit(jax.vmap(exact, (None, 0, 0)))(q, k, v))
    close(compiled(q, k[0], v[0], parents=(-1,)), each[0])
    close(compiled(q, k, v, parents=(-1, -1, -1)), np.prod(each, axis=0))
    # Lengths may differ, and the order of the nodes does not matter.
    keys, values = (k[0], k[1, :4], k[2, :5]), (v[0], v[1, :4], v[2, :5])
    turned = compiled(q, keys[::-1], values[::-1], parents=(1, 2, -1))
    close(compiled(q, keys, values, parents=(-1, 0, 1)), turned)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_those_of_the_sum_over_tuples(x64, is_causal):
    parents = (1, -1, 1)
    q, k, v, u = tree_tensors(4, 5, 5, 3)
    mask = jax.device_put(np.arange(15).reshape(3, 5) >= 2)
    cotangent = tensors(5, 5, (5,))[2][0]

    def by_tuples(q, k, v, u):
        """The same sums in JAX, over all tuples."""
        place = jnp.indices((5,) * 4)
        asking, logits, seen = [q, *u], 0.0, jnp.ones((5,) * 4, bool)
        for node, parent in enumerate(parents):
            above, own = place[parent + 1], place[node + 1]
            logits = logits + 0.5 * (asking[parent + 1] @ k[node].T)[above, own]
            seen = seen & mask[node][own] & (own <= above if is_causal else True)
        weights = jnp.where(seen, jnp.exp(logits), 0)
        total = jnp.sum(weights, axis=(1, 2, 3))
        out = jnp.einsum("ijlp,jc,lc,pc->ic", weights, *v)
        return out / jnp.where(total > 0, total, 1)[:, None]

    def by_messages(q, k, v, u):
        return tree_attention(q, k, v, parents=parents, node_queries=u, is_causal=is_causal, kv_mask=mask)

    gradients = [
        jax.jit(jax.grad(lambda *args, f=f: jnp.sum(f(*args) * cotangent), (0, 1, 2, 3)))(q, k, v, u)
        for f in (by_tuples, by_messages)
    ]
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-11)


APPROXIMATE = {
    "coreset": {"coreset_size": 24},
    "mean_pool": {"num_landmarks": 24},
    "eva": {"num_chunks": 24, "window_size": 24},
    "local": {"window_size": 24},
    "favor": {"num_features": 4096},
}


@pytest.mark.parametrize(("method", "size"), APPROXIMATE.items())
def test_methods_with_room_for_all_keys_are_exact(method, size):
    """FAVOR+, which is never exact, comes near. Padding holds NaN."""
    q, k, v, _ = tree_tensors(6, 24, 24, 2, jnp.float32, spread=0.7)
    mask = np.arange(24) < 20
    k, v = (np.where(mask[None, :, None], x, np.float32(np.nan)) for x in (k, v))
    tolerance = 0.05 if method == "favor" else 2e-4
    expected = compiled(q, k, v, parents=(-1, 0), kv_mask=mask, return_state=True)
    state = compiled(
        q, k, v, jax.random.key(0), parents=(-1, 0), kv_mask=mask, method=method, return_state=True, **size
    )
    close(state.out, expected.out, tolerance)
    close(state.lse, expected.lse, tolerance)


def test_a_given_projection_takes_the_place_of_a_key():
    q, k, v, _ = tree_tensors(8, 8, 8, 2, jnp.float32)
    options = {"parents": (-1, 0), "method": "favor"}
    projection = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    with_key = compiled(q, k, v, jax.random.key(0), projection=projection, **options)
    np.testing.assert_array_equal(compiled(q, k, v, projection=projection, **options), with_key)
    with pytest.raises(ValueError, match="favor is random: pass a key"):
        jax.eval_shape(functools.partial(tree_attention, **options), q, k, v)


@pytest.mark.parametrize("method", ["mean_pool", "local"])
def test_causal_forms_with_room_for_all_keys_are_exact(method):
    q, k, v, _ = tree_tensors(7, 24, 24, 2, jnp.float32, spread=0.7)
    options = {"parents": (-1, 0), "is_causal": True, "kv_mask": np.arange(24) >= 3}
    expected = compiled(q, k, v, **options)
    close(compiled(q, k, v, method=method, **APPROXIMATE[method], **options), expected, 1e-4)


def test_errors_fall_with_the_size():
    """A path of two edges over 512 ordered keys on a curve, where a few means of neighbouring keys are accurate."""
    n = 512
    angle = np.linspace(0, 2 * np.pi, n)
    curve = np.stack([np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)], axis=1).astype(np.float32)
    k, v = np.stack([curve, curve[::-1]]), 1 + np.stack([curve, curve**2])
    expected = np.asarray(compiled(curve, k, v, parents=(-1, 0), scale=1.0))
    errors = [
        np.abs(
            compiled(curve, k, v, parents=(-1, 0), scale=1.0, method="mean_pool", num_landmarks=size) - expected
        ).max()
        for size in (16, 64)
    ]
    # The error of means of neighbours falls with the square of the size.
    assert errors[1] < errors[0] / 8
    assert errors[1] < 0.01, errors


@pytest.mark.all_forms
def test_summaries_make_no_array_of_all_pairs():
    n = 211
    q, k, v, _ = tree_tensors(10, n, n, 3, jnp.float32)
    call = functools.partial(tree_attention, parents=(-1, 0, 0), method="mean_pool", num_landmarks=8)
    shapes = {x.aval.shape for equation, _ in equations(jax.make_jaxpr(call)(q, k, v).jaxpr) for x in equation.outvars}
    assert (n, 4) in shapes
    assert not [shape for shape in shapes if shape.count(n) > 1]


def test_a_path_of_two_edges_composes_two_functions():
    """With tokens (x, f(x)) and (y, g(y)), a path at low temperature finds g(f(x)) in one layer."""
    n = 16
    random = np.random.default_rng(8)
    f, g = random.permutation(n), random.integers(0, n, n)
    one_hot, order = np.eye(n, dtype=np.float32), random.permutation(n)
    x, y = np.arange(n)[order], np.arange(n)[order[::-1]]
    k = np.stack([one_hot[x], one_hot[y]])
    v = np.stack([np.ones((n, n), np.float32), one_hot[g[y]]])
    u = np.stack([one_hot[f[x]], one_hot[y]])
    out = compiled(one_hot, k, v, parents=(-1, 0), node_queries=u, scale=40.0)
    close(out, one_hot[g[f]], 1e-6)


def test_vmap_equals_a_loop_and_large_logits_stay_finite():
    q, k, v, u = (
        np.stack(xs) for xs in zip(*(tree_tensors(s, 4, 5, 2, jnp.float32, 100.0) for s in (0, 1)), strict=True)
    )
    call = functools.partial(compiled, parents=(-1, 0), is_causal=True)
    together = jax.vmap(lambda q, k, v, u: call(q, k, v, node_queries=u))(q, k, v, u)
    apart = np.stack([call(q[i], k[i], v[i], node_queries=u[i]) for i in range(2)])
    assert np.all(np.isfinite(together))
    close(together, apart, 1e-5)


def test_a_bias_whose_range_underflows_is_seen():
    q, k, v, _ = tree_tensors(9, 6, 6, 1, jnp.float32)
    bias = np.array([0.0, 0, 0, 500, 500, 500], np.float32)
    under_bias = jax.jit(bind("local", {"window_size": 1}).state_under_bias)
    state = under_bias(q, k[0], v[0], bias)
    out, lse = np.asarray(state.out), np.asarray(state.lse)
    assert np.all(np.isnan(out[:3]))
    assert np.all(np.isnan(lse[:3]))
    close(out[3:], v[0, 3:], 1e-6)
    hidden = under_bias(q, k[0], v[0], np.where(bias == 0, -np.inf, bias).astype(np.float32))
    assert isinstance(hidden, AttentionState)
    assert np.all(np.isfinite(hidden.out))


Q, KV = jnp.ones((4, 3)), jnp.ones((2, 4, 3))
TREE = "parents must contain, for each of 2 nodes, its parent or -1 for the query"


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, f"{TREE}, without a cycle; got (1, 0)", {"parents": (1, 0)}),
        (ValueError, f"{TREE}, without a cycle; got (-1, 1)", {"parents": (-1, 1)}),
        (ValueError, f"{TREE}; got (-1,)", {"parents": (-1,)}),
        (ValueError, f"{TREE}; got (-1, 2)", {"parents": (-1, 2)}),
        (ValueError, "parents must be at least -1, got -2", {"parents": (-1, -2)}),
        (TypeError, f"{TREE}, as a tuple of integers; got 'x'", {"parents": "x"}),
        (TypeError, "parents must be an integer known when tracing, got 0.5", {"parents": (-1, 0.5)}),
        (ValueError, "node_queries must have the shapes of the keys [(4, 3), (4, 3)], got [(4, 3)]",
         {"node_queries": KV[:1]}),
        (TypeError, "node_queries must be a floating-point array, got str", {"node_queries": "x"}),
        (TypeError, "is_causal must be True or False", {"is_causal": "both"}),
        (ValueError, "scale must be positive and finite", {"scale": -1.0}),
        (ValueError, "favor is random: pass a key", {"method": "favor"}),
        (TypeError, "method 'exact' has no argument 'size'", {"size": 3}),
        (NotImplementedError, "method 'nystrom' does not support a bias of each key; those that do: exact, local",
         {"method": "nystrom"}),
        (NotImplementedError, "method 'lara' does not support is_causal", {"method": "lara", "is_causal": True}),
        (NotImplementedError, "the causal form of method 'mean_pool' does not support a mask for each node",
         {"method": "mean_pool", "is_causal": True, "kv_mask": jnp.ones((2, 4), bool)}),
        (NotImplementedError, "method 'local' does not support a mask for each node",
         {"method": "local", "kv_mask": jnp.ones((2, 4), bool)}),
        (NotImplementedError, "method 'exact' does not support implementation under a bias",
         {"implementation": "dense"}),
    ],
)  # fmt: skip
def test_bad_input(error, message, given):
    with pytest.raises(error, match=re.escape(message)):
        tree_attention(Q, KV, KV, **{"parents": (-1, 0), **given})
