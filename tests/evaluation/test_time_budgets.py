"""Policies within a time budget, with given times, so that no test depends on a clock."""

import itertools

import numpy as np
import pytest

from approx_attention import InputError, cli
from approx_attention.evaluation import Policy, layer_times, model_plans, plan_model, save_layers
from approx_attention.evaluation.head_choices import Item, Option, best_choice, fast_choice
from approx_attention.evaluation.policy_reports import plan_verdict
from approx_attention.evaluation.timing import Timing
from tests.evaluation.test_policy import LAYERS, PLAN, heads

# The choice

TOLERANCE = 0.4


def instance(random, num_heads):
    """Heads with the same configurations, the last of them exact; and all heads together."""
    costs = np.sort(random.integers(1, 60, 4)).tolist()
    losses = np.sort(random.random((num_heads, 3)).round(2), axis=1)[:, ::-1]
    items = []
    for head, own in enumerate(losses):
        options = zip(costs, [*own.tolist(), 0.0], "abcd", strict=True)
        items.append(
            Item([("", head)], [Option(cost, loss, label, loss <= TOLERANCE) for cost, loss, label in options])
        )
    together = [
        Option(num_heads * of[0].cost, sum(one.loss for one in of), of[0].label, all(one.meets for one in of))
        for of in zip(*(item.options for item in items), strict=True)
    ]
    return items, Item([head for item in items for head in item.heads], together)


def with_overhead(overhead):
    """The cost of a choice, with an overhead for each method after the first."""
    return lambda choice: choice.cost + overhead * (len(set(choice.labels.values())) - 1)


def all_choices(items):
    for options in itertools.product(*(item.options for item in items)):
        yield (not all(o.meets for o in options), sum(o.loss for o in options)), options


def test_without_overhead_a_choice_by_time_is_the_knapsack():
    random, time_of = np.random.default_rng(0), with_overhead(0)
    for _ in range(60):
        items, everyone = instance(random, 4)
        budget = int(random.integers(10, 240))
        within = [of for of, options in all_choices(items) if sum(o.cost for o in options) <= budget]
        if not within:
            with pytest.raises(InputError, match="fastest choices of all heads take"):
                fast_choice(items, everyone, budget, time_of)
            continue
        choice, time = fast_choice(items, everyone, budget, time_of)
        assert choice[:2] == pytest.approx(min(within))
        assert time == choice.cost <= budget


def test_the_time_of_a_choice_is_within_the_budget_and_one_method_for_all_is_no_better():
    random, tightened = np.random.default_rng(1), 0
    for _ in range(200):
        items, everyone = instance(random, 5)
        budget, time_of = int(random.integers(40, 300)), with_overhead(int(random.integers(0, 60)))
        uniform = best_choice([everyone], budget)
        if uniform is None:
            continue
        choice, time = fast_choice(items, everyone, budget, time_of)
        assert time == time_of(choice) <= budget
        assert choice[:2] <= uniform[:2]
        tightened += time_of(best_choice(items, budget)) > budget
    assert tightened > 50


def test_where_the_clock_disagrees_with_every_cost_the_error_says_the_least_time():
    items, everyone = instance(np.random.default_rng(2), 3)
    with pytest.raises(InputError, match=r"take 2 s in total, but max_seconds is 1e-06"):
        fast_choice(items, everyone, 1000, lambda choice: 2 * 10**9)


# The plan

QUICK = {**PLAN, "methods": ["mean_value"]}


@pytest.fixture
def times(monkeypatch):
    """Replace measured times by fixed nanoseconds per head and configuration, plus 30 for every program."""
    table = {"exact": 1000, "mean_value": 10}

    def of_call(curves, methods, measurement):
        groups = [group for own in methods.values() for group in own.groups]
        return sum(30 + len(numbers) * table[method.name] for method, numbers in groups)

    monkeypatch.setattr(model_plans, "nanoseconds", lambda curves, measurement: dict.fromkeys(curves, table))
    monkeypatch.setattr(model_plans, "call_nanoseconds", of_call)


@pytest.mark.usefixtures("times")
def test_a_plan_stays_within_its_time():
    # Two exact heads in one layer and two means in the other cost 2020, plus 60 for two programs.
    within = {}
    for nanoseconds in (4060, 2080, 2070, 100):
        made = plan_model(LAYERS, **QUICK, max_seconds=1e-9 * nanoseconds)
        assert made.seconds is not None
        assert made.seconds <= 1e-9 * nanoseconds
        assert made.policy.max_seconds == 1e-9 * nanoseconds
        within[nanoseconds] = [head.method for head in heads(made.policy)]
        share = {"exact": 1e-6, "mean_value": 1e-8}
        assert [head.seconds for head in heads(made.policy)] == pytest.approx([share[x] for x in within[nanoseconds]])
    assert set(within[4060]) == {"exact"}
    assert within[2080].count("exact") == 2
    assert within[2070].count("exact") < 2
    assert set(within[100]) == {"mean_value"}
    with pytest.raises(
        InputError, match=r"fastest choices of all heads take 1e-07 s in total, but max_seconds is 9e-08"
    ):
        plan_model(LAYERS, **QUICK, max_seconds=0.9e-7)


@pytest.mark.usefixtures("times")
def test_the_command_plans_for_a_time(tmp_path):
    arrays = {path: dict(zip("qkv", map(np.asarray, own.tensors), strict=True)) for path, own in LAYERS.items()}
    save_layers(tmp_path / "text.npz", arrays)
    arguments = ["plan", tmp_path / "text.npz", "--layers", "*", "--policy", tmp_path / "policy.json", "--seeds", 2]
    asked = ["--tolerance", 0.1, "--max-milliseconds", 2080e-6, "--methods", "mean_value", "--out", tmp_path / "plan"]
    assert cli.main([str(x) for x in (*arguments, *asked)]) == 0
    policy = Policy.load(tmp_path / "policy.json")
    assert policy.max_seconds == pytest.approx(2080e-9)
    assert [head.seconds for head in heads(policy)].count(1e-6) == 2
    page = (tmp_path / "plan" / "plan.md").read_text()
    assert "0.00208 ms on this machine, as measured now; 0.00208 ms are allowed" in page
    assert page.count("| 0.001 ms |") == 2


def test_times_are_those_of_calls(monkeypatch):
    """Layers of one shape are timed once; the time of all layers is the sum of theirs."""
    asked = []

    def in_turn(calls, **options):
        asked.append(list(calls))
        return {name: Timing(2e-6 * (i + 1), 1.0) for i, name in enumerate(calls)}

    monkeypatch.setattr(layer_times, "time_interleaved", in_turn)
    made = plan_model(LAYERS, **QUICK, max_seconds=1.0)
    assert asked == [["exact", "mean_value"], ["first", "second"]]
    assert made.seconds == pytest.approx(6e-6)
    # Half of a call, for each of two key heads.
    assert [head.seconds for head in heads(made.policy)] == [1e-6] * 4
    assert "0.006 ms on this machine" in plan_verdict(made)
