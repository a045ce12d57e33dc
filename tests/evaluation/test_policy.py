"""Policies for whole models: the knapsack, the choices and their budget, the file, and the check on other text."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from approx_attention import InputError, attention, cli
from approx_attention.evaluation import (
    HeadChoice,
    Layer,
    LayerPolicy,
    Measurement,
    Policy,
    Tensors,
    check_policy,
    model_plans,
    plan_model,
    runs,
    save_layers,
    shared_programs,
)
from approx_attention.evaluation.error_laws import split_within_heads
from approx_attention.evaluation.knapsack import CELLS, choose
from approx_attention.nnx import replace_attention
from tests.evaluation.test_compare import refusal
from tests.references import as_array

MEASURED = {}
PROGRAMS = {}


@pytest.fixture(autouse=True)
def measured_once(monkeypatch):
    """Share measurements: plans of the same tensors differ in the choice, not in the measurement."""
    head_curves = model_plans.head_curves

    def remembered(problem, settings, measurement, **options):
        # The tensors are kept alive, so that no other object gets the same id.
        asked = id(problem.tensors.query), *settings
        if asked not in MEASURED:
            MEASURED[asked] = head_curves(problem, settings, measurement, **options)
        return MEASURED[asked]

    monkeypatch.setattr(model_plans, "head_curves", remembered)
    monkeypatch.setattr(model_plans, "shared_programs", lambda own: shared_programs(PROGRAMS))


# the knapsack


def brute_force(costs, losses, budget):
    """The least loss of all choices within the budget, or infinity."""
    least = np.inf
    for picks in itertools.product(*(range(len(own)) for own in costs)):
        if sum(own[pick] for own, pick in zip(costs, picks, strict=True)) <= budget:
            least = min(least, sum(own[pick] for own, pick in zip(losses, picks, strict=True)))
    return least


def instance(random, largest):
    costs = [random.integers(0, largest, random.integers(1, 5)).tolist() for _ in range(random.integers(1, 6))]
    return costs, [random.random(len(own)).round(1).tolist() for own in costs]


def test_the_knapsack_is_brute_force_where_units_are_few():
    random = np.random.default_rng(0)
    for _ in range(300):
        (costs, losses), budget, unit = instance(random, 30), int(random.integers(1, 90)), int(random.integers(1, 5000))
        picks = choose([[unit * cost for cost in own] for own in costs], losses, unit * budget + unit // 2)
        best = brute_force(costs, losses, budget)
        if picks is None:
            assert best == np.inf
            continue
        assert sum(own[pick] for own, pick in zip(costs, picks, strict=True)) <= budget
        assert sum(own[pick] for own, pick in zip(losses, picks, strict=True)) == pytest.approx(best)


def test_the_knapsack_keeps_its_promise_where_costs_are_rounded():
    random = np.random.default_rng(1)
    for _ in range(40):
        costs, losses = instance(random, 10**9)
        budget = int(random.integers(10**8, 10**9)) * len(costs)
        picks = choose(costs, losses, budget)
        near = brute_force(costs, losses, budget * (1 - len(costs) / CELLS))
        if picks is None:
            assert near == np.inf
            continue
        assert sum(own[pick] for own, pick in zip(costs, picks, strict=True)) <= budget
        assert sum(own[pick] for own, pick in zip(losses, picks, strict=True)) <= near + 1e-12


# the plan


def layer(seed, sharpness, num_heads=4, length=64, dim=8, **given):
    """A layer in which pairs of query heads share a key head, and later heads are sharper."""
    random = np.random.default_rng(seed)
    scales = sharpness * 4.0 ** np.arange(num_heads // 2) / 4
    q = np.repeat(scales, 2)[:, None] * random.normal(size=(2, length, num_heads, dim))
    k, v = (random.normal(size=(2, length, num_heads // 2, dim)) for _ in range(2))
    return Layer(Tensors(*map(as_array, (q, k, v + 0.5))), None, **given)


LAYERS = {"first": layer(0, 0.2), "second": layer(1, 1.0)}
ALL_BYTES = 4 * 64 * 16 * 4
PLAN = {"tolerance": 0.1, "methods": ["mean_value", "uniform_sample"], "measurement": Measurement(num_seeds=2)}


@functools.cache
def planned(**options):
    return plan_model(LAYERS, **PLAN, **options)


def heads(policy):
    return [head for own in policy.layers.values() for head in own.heads]


def test_without_a_budget_every_head_takes_the_cheapest_that_is_predicted_to_meet_the_tolerance():
    made = planned()
    assert made.is_met
    assert all(head.error_bound <= 0.1 for head in heads(made.policy))
    # Heads of small logits are nearly averages; a sharp head needs all keys.
    assert heads(made.policy)[0].cache_bytes < ALL_BYTES / 16
    assert heads(made.policy)[3].method == "exact"
    assert made.policy.cache_bytes < ALL_BYTES


@pytest.mark.parametrize("max_bytes", [500, 3e3, 12_000, ALL_BYTES])
def test_the_budget_is_that_of_all_heads_and_never_exceeded(max_bytes):
    made = planned(max_bytes=max_bytes)
    assert made.policy.cache_bytes <= max_bytes
    assert made.is_met == (max_bytes >= planned().policy.cache_bytes)
    # One method for all heads is among the choices.
    squares = [sum(head.predicted_error**2 for head in heads(policy)) for policy in (made.policy, planned().policy)]
    if max_bytes >= planned().policy.cache_bytes:
        assert squares[0] <= squares[1]
    if max_bytes == ALL_BYTES:
        assert {head.method for head in heads(made.policy)} == {"exact"}
    elif not made.is_met:
        total = {
            name: np.sqrt(sum(np.sum(x**2) for x in own.values()))
            for name, own in (("policy", made.errors), ("uniform", made.uniform_errors))
        }
        assert total["policy"] < 1.05 * total["uniform"]


def test_held_out_queries_choose_nothing_and_calibration_queries_check_nothing():
    split = split_within_heads((2, 64, 4, 8), 2, 0.5, 0)
    # Other queries in the held-out part change its errors, but no choice.
    run = np.arange(64) * 8 // 64
    is_held = np.zeros((2, 64, 4), bool)
    for unit in split.held_out:
        sequence, head, number = np.unravel_index(unit, split.shape)
        is_held[sequence, run == number, 2 * head : 2 * head + 2] = True
    query, key, value = LAYERS["second"].tensors
    changed = as_array(np.where(is_held[..., None], -3 * np.asarray(query), query))
    other = {"second": Layer(Tensors(changed, key, value), None)}
    before, after = (plan_model(layers, **PLAN, max_bytes=3000) for layers in ({"second": LAYERS["second"]}, other))
    for mine, its in zip(heads(before.policy), heads(after.policy), strict=True):
        assert (mine.label, mine.error_bound) == (its.label, pytest.approx(its.error_bound, rel=1e-4))
        assert mine.held_out_error != pytest.approx(its.held_out_error, rel=1e-2)


def test_layers_of_a_stack_share_a_policy():
    stack = {f"blocks[{i}]": own for i, own in enumerate(LAYERS.values())}
    policy = plan_model(stack, **PLAN, max_bytes=4000).policy
    first, second = policy.layers.values()
    assert first.methods == second.methods
    assert policy.of_layer("blocks").methods == first.methods
    with pytest.raises(ValueError, match="stacked at 'blocks' .* theirs differ"):
        Policy({"blocks[0]": first, "blocks[1]": planned().policy.layers["second"]}, 0.1).of_layer("blocks")


def test_padding_is_as_if_it_were_not_there():
    whole = [np.asarray(x) for x in LAYERS["second"].tensors]
    real = np.arange(64) < 48
    padded = Tensors(*(as_array(np.where(real[None, :, None, None], x, np.nan)) for x in whole))
    layers = (
        Layer(Tensors(*(as_array(x[:, :48]) for x in whole)), None),
        Layer(padded, np.broadcast_to(real, (2, 64))),
    )
    options = {"tolerance": 0.9, "methods": ["mean_value"], "measurement": Measurement(num_seeds=2)}
    short, long = (plan_model({"": own}, **options).policy for own in layers)
    for fields in ("predicted_error", "error_bound", "held_out_error", "relative_error"):
        mine, its = ([getattr(head, fields) for head in heads(policy)] for policy in (short, long))
        np.testing.assert_allclose(mine, its, rtol=1e-4)
    np.testing.assert_allclose(*(check_policy(short, {"": own}).errors[""] for own in layers), rtol=1e-4)


# the file


def test_a_policy_comes_back_from_its_file(tmp_path):
    policy = planned(max_bytes=3e3).policy
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    pair = HeadChoice("local", {"window_size": (4, 8)}, 0.1, 0.2, 0.1, 0.1, 640)
    Policy({"": LayerPolicy((pair,), is_causal=False, scale=0.5)}, 0.2).save(tmp_path / "pair.json")
    loaded = Policy.load(tmp_path / "pair.json")
    assert loaded.layers[""].heads[0].hyperparameters == {"window_size": (4, 8)}
    hash(loaded.layers[""].methods)


def first(document):
    return document["layers"]["first"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(version=2), "version 2, but this library reads version 1"),
        (lambda document: document.pop("tolerance"), "the policy lacks tolerance"),
        (lambda document: document.update(layers={}), "at least one layer"),
        (lambda document: document["layers"]["first"].update(heads=[]), "layer 'first' .* at least one key head"),
        (
            lambda document: document["layers"]["first"]["heads"][1].update(method="favour"),
            "head 1 of layer 'first': .*favor",
        ),
        (
            lambda document: document["layers"]["first"]["heads"][0].update(cache_bytes="x"),
            "cache_bytes must be int, got 'x'",
        ),
        (
            lambda document: document["layers"]["second"]["heads"][0].update(hyperparameters={"size": 3}),
            "head 0 of layer 'second': method .* has no argument 'size'",
        ),
        (lambda document: document["layers"]["first"].update(is_causual=True), "did you mean 'is_causal'"),
    ],
)
def test_a_file_that_is_no_policy(tmp_path, change, message):
    path = tmp_path / "policy.json"
    planned().policy.save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        Policy.load(path)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "text.json").write_text("{")
    for name, message in (("none.json", "cannot be read"), ("text.json", "is not JSON")):
        with pytest.raises(InputError, match=message):
            Policy.load(tmp_path / name)
    with pytest.raises(InputError, match="directory does not exist"):
        planned().policy.save(tmp_path / "none" / "policy.json")


# the check


def test_the_check_on_the_planned_text_gives_what_was_promised():
    policy = planned(max_bytes=3e3).policy
    check = check_policy(policy, LAYERS, num_seeds=2)
    for path, own in check.promised.items():
        np.testing.assert_allclose(check.errors[path], own, rtol=1e-4, atol=1e-6)
    failed = [
        (path, i) for path, own in policy.layers.items() for i, h in enumerate(own.heads) if h.relative_error > 0.1
    ]
    assert check.failures == failed
    assert failed


def test_the_check_measures_what_a_model_computes_on_other_text():
    policy = planned(max_bytes=3e3).policy
    first = dataclasses.replace(policy.layers["first"], scale=0.9)
    policy = dataclasses.replace(policy, layers={**policy.layers, "first": first})
    other = {"first": layer(7, 0.2), "second": layer(8, 4.0)}
    check = check_policy(policy, other, num_seeds=1, seed=3)
    for path, own in policy.layers.items():
        answer = functools.partial(attention, rng=jax.random.key(3), scale=own.scale)
        out, exact = (
            np.asarray(jax.jit(functools.partial(answer, method=method))(*other[path].tensors))
            for method in (own.methods, "exact")
        )
        by_head = np.asarray([out - exact, exact]).reshape(2, 2, 64, 2, 2, 8)
        wrong, whole = np.sqrt((by_head**2).sum((1, 2, 4, 5)))
        np.testing.assert_allclose(check.errors[path], wrong / whole, rtol=1e-3, atol=1e-6)
    assert check.errors["second"][1] > policy.tolerance
    assert ("second", 1) in check.failures
    with pytest.raises(InputError, match="the policy is for second, but the layers are first"):
        check_policy(policy, {"first": other["first"]})
    with pytest.raises(InputError, match="layer 'first': there are methods for 2 key heads, but the layer has 1"):
        check_policy(policy, {**other, "first": layer(7, 0.2, num_heads=2)})


# in a model


def of_heads(*methods, scale=None):
    choices = tuple(HeadChoice(name, given, 0.0, 0.0, 0.0, 0.0, 0) for name, given in methods)
    return LayerPolicy(choices, is_causal=False, scale=scale)


@pytest.mark.usefixtures("models")
def test_a_policy_in_a_model():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = (nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            return self.last(self.first(x))

    model, x = Two(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 12, 16))
    pool = ("mean_pool", {"num_landmarks": 4})
    policy = Policy({"last": of_heads(("exact", {}), pool, scale=0.1)}, 0.1)
    before = model.first.attention_fn
    assert replace_attention(model, policy=policy) == ["last"]
    assert model.first.attention_fn is before

    @nnx.jit
    def as_planned(model, x):
        y = model.first(x)
        q, k, v = model.last.query(y), model.last.key(y), model.last.value(y)
        return model.last.out(attention(q, k, v, method=policy.layers["last"].methods, scale=0.1))

    call = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(call(model, x), as_planned(model, x), atol=1e-5)
    # If all heads share a method, the layer gets that one method.
    same, one = Two(nnx.Rngs(0)), Two(nnx.Rngs(0))
    replace_attention(same, policy=Policy(dict.fromkeys(["first", "last"], of_heads(pool, pool)), 0.1))
    replace_attention(one, "mean_pool", num_landmarks=4)
    np.testing.assert_array_equal(call(same, x), call(one, x))
    for given, message in (
        ({"policy": Policy({"middle": of_heads(pool, pool)}, 0.1)}, "policy is for middle, .* first, last"),
        ({"policy": Policy({"first": of_heads(pool)}, 0.1)}, "methods for 1 key heads, but the layer has 2"),
        ({"policy": policy, "only": lambda path, layer: path == "first"}, "the policy is for last"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_attention(model, **given)
    with pytest.raises(TypeError, match="got both or neither"):
        replace_attention(model)
    with pytest.raises(TypeError, match="Policy.load reads it from a file"):
        replace_attention(model, policy="policy.json")


@pytest.mark.usefixtures("models")
def test_a_policy_in_a_stack_of_layers():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stacked(rngs):
        return nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return x + layer(x)

    x = jax.random.normal(jax.random.key(1), (2, 12, 16))
    layers, exact = stacked(nnx.Rngs(0)), stacked(nnx.Rngs(0))
    own = of_heads(("exact", {}), ("uniform_sample", {"sample_size": 12}))
    assert replace_attention(layers, policy=Policy({"[0]": own, "[1]": own}, 0.1), rngs=nnx.Rngs(1)) == [""]
    assert layers.attention_fn.stream.key.shape == (2,)
    with pytest.raises(ValueError, match="1 of the 2 layers stacked"):
        replace_attention(exact, policy=Policy({"[0]": own}, 0.1), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(run(layers, x), run(exact, x), atol=1e-5)  # a sample of all keys is exact


# the command line


def test_the_commands_plan_a_model_and_check_its_policy(tmp_path, capsys):
    texts = [{path: layer(seed + 10 * text, 0.5) for seed, path in enumerate("ab")} for text in (0, 1)]
    for number, text in enumerate(texts):
        arrays = {path: dict(zip("qkv", map(np.asarray, own.tensors), strict=True)) for path, own in text.items()}
        causal = {"is_causal": np.asarray(True)}
        save_layers(tmp_path / f"{number}.npz", {path: {**own, **causal} for path, own in arrays.items()})
    policy, options = tmp_path / "policy.json", ["--layers", "*", "--seeds", "2", "--methods", "mean_value"]
    arguments = ["plan", tmp_path / "0.npz", "--policy", policy, "--tolerance", "0.3", "--max-bytes", "9000", *options]
    assert cli.main([*map(str, arguments), "--out", str(tmp_path / "plan")]) == 0
    assert "The best single method at this cost is mean_value" in " ".join(capsys.readouterr().out.split())
    made = Policy.load(policy)
    assert made.cache_bytes <= 9000
    assert all(own.is_causal for own in made.layers.values())
    arguments = ["check", policy, tmp_path / "1.npz", "--out", tmp_path / "check", "--seeds", "1"]
    assert cli.main([*map(str, arguments)]) == 0
    written = json.loads((tmp_path / "check" / "check.json").read_text())
    expected = check_policy(made, texts[1], num_seeds=1)
    for path, own in expected.errors.items():
        np.testing.assert_allclose(written["errors"][path], own, rtol=1e-4, atol=1e-6)
    assert {(of["layer"], of["head"]) for of in written["failures"]} == set(expected.failures)
    assert (tmp_path / "check" / "check.md").read_text().count("| `a`") == 2
    for name in ("plan/plan.png", "check/check.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "is not JSON" in refusal(capsys, "check", tmp_path / "0.npz", tmp_path / "1.npz", "--out", tmp_path / "x")
    both = ["--max-bytes", 1, "--max-milliseconds", 1, "--out", tmp_path / "x"]
    arguments = ["plan", tmp_path / "0.npz", "--policy", policy, "--tolerance", 1, *options, *both]
    assert "one budget" in refusal(capsys, *arguments)
    plan = ["plan", tmp_path / "0.npz", "--tolerance", 1, *options, "--out", tmp_path / "x"]
    assert f"cannot write {tmp_path}: it is a directory" in refusal(capsys, *plan, "--policy", tmp_path)
    assert "--decode can only be given with --policy" in refusal(capsys, *plan, "--decode")


@pytest.mark.usefixtures("empty_figures")
def test_commands_take_causality_and_scale_from_captured_layers(tmp_path, monkeypatch, capsys):
    programs = {}
    monkeypatch.setattr(runs, "shared_programs", lambda own: shared_programs(programs))
    arrays = dict(zip("qkv", map(np.asarray, layer(0, 1.0).tensors), strict=True))
    own = {"is_causal": np.asarray(True), "scale": np.float32(0.7)}
    save_layers(tmp_path / "captured.npz", {"a": {**arrays, **own}, "b": {**arrays, "is_causal": np.asarray(False)}})
    save_layers(tmp_path / "plain.npz", {"a": arrays})
    errors = {}
    for name, given in (("captured", []), ("plain", ["--causal", "--scale", 0.7])):
        asked = [tmp_path / f"{name}.npz", "--layers", "*", "--methods", "mean_value", "--budget", 4, "--seeds", 1]
        assert cli.main([str(x) for x in ("compare", *asked, *given, "--out", tmp_path / name)]) == 0
        document = json.loads((tmp_path / name / "compare.json").read_text())
        rows = document["layers"]["a"]["rows"]
        errors[name] = [row["relative_error"] for row in rows if row["method"] == "mean_value"]
    assert errors["captured"] == errors["plain"] != []
    titles = capsys.readouterr().out
    assert "captured.npz, a: causal" in titles
    assert "captured.npz, b: bidirectional" in titles
