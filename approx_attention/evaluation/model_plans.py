"""A method and a size for each key head of each layer of a model, under one budget of bytes or of time."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from approx_attention.core import InputError, check_flag
from approx_attention.evaluation.arms import (
    EXACT,
    MOST_SEEDS,
    Options,
    check_confidence,
    check_method,
    check_options,
    check_positive,
    check_range,
    default_methods,
    policy_arm,
)
from approx_attention.evaluation.calibration import ROUNDING
from approx_attention.evaluation.files import Layer
from approx_attention.evaluation.head_curves import HeadCurves, head_curves, nanoseconds, settings_of
from approx_attention.evaluation.knapsack import choose
from approx_attention.evaluation.policies import HeadChoice, LayerPolicy, Policy, stack_of
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.programs import shared_programs
from approx_attention.evaluation.timing import time_interleaved


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """What `plan_model` has chosen, next to one method of one size for all heads.

    Attributes:
        policy: the choices, with their errors.
        split_by: what of each head was held out: ``sequences`` or ``runs of queries``.
        uniform: the one method and size that is best for all heads of all layers within the same budget; None where
            none fits.
        uniform_errors: its error on the queries that were held out, ``[K]`` by layer.
        is_met: whether every head is predicted to meet the tolerance.
        seconds: the least time of a call of all layers with the policy, where time was limited.
    """

    policy: Policy
    split_by: str
    uniform: str | None
    uniform_errors: Mapping[str, np.ndarray]
    is_met: bool
    seconds: float | None

    @property
    def errors(self) -> dict[str, np.ndarray]:
        """The error of the policy on the queries that were held out, ``[K]`` by layer."""
        return {
            layer: np.array([head.held_out_error for head in own.heads]) for layer, own in self.policy.layers.items()
        }


# A key head of a layer.
Head = tuple[str, int]


class _Option(NamedTuple):
    """A configuration that heads may have: its cost and loss for all of them, and whether it meets the tolerance."""

    cost: int
    loss: float
    label: str
    meets: bool


class _Item(NamedTuple):
    """Heads that share a configuration, and the options for it."""

    heads: list[Head]
    options: list[_Option]


def plan_model(
    layers: Mapping[str, Layer],
    *,
    tolerance: float,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    methods: Iterable[str] | None = None,
    options: Options | None = None,
    decode: bool = False,
    held_out: float = 0.5,
    confidence: float = 0.95,
    num_seeds: int = 3,
    seed: int = 0,
    rounds: int = 5,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> ModelPlan:
    r"""Choose a method and a size for each key head of each layer of a model, under one budget for all of them.

    .. math:: \min \sum_{l, h} e_{lh}^2 \quad\text{so that}\quad \sum_{l, h} c_{lh} \le C, \qquad
              e_{lh} = \|\hat O_{lh} - O_{lh}\|_F \,/\, \|O_{lh}\|_F

    where O are the outputs of all query heads that share key head h of layer l, and c its cost. Every method is
    measured at sizes in steps of two on part of each head's queries, and exact attention is one more choice. Errors
    that a choice rests on are of these queries alone; a larger size counts with the least error of the sizes up to it.
    If the budget allows every head to stay below the tolerance, by a bound of the error of other queries as in `plan`,
    only choices that do so are taken; else the sum is made least without regard to it. Without a budget each head takes
    the cheapest choice that stays below. The queries that were held out choose nothing, and say what to expect of
    others.

    Layers named ``"path[0]"``, ``"path[1]"`` and so on are a stack, which runs as one program: they get one policy.

    Args:
        layers: a layer by its path, as `load_layers` reads them and `nnx.capture_attention` writes them.
        tolerance: the relative error that is allowed for each head.
        max_bytes: bytes that all caches of a sequence may take together: every key head of every layer.
        max_seconds: seconds that a call of all layers may take together, in place of ``max_bytes``. The cost of a head
            is its share of a call in which all heads of its layer have the method.
        is_causal: whether query t sees keys j <= t only; as each layer says by default.
        scale: factor of the logits; as each layer says, else ``1/sqrt(D)``, by default.
        methods: names in `METHODS`; all that cost less than exact attention by default.
        options: hyper-parameters other than the size, by the name of the method.
        decode: leave out methods without a running summary, which caches cannot hold.
        held_out: the share of each head's queries that is held out: whole sequences if there are at least 8.
        confidence: of the bounds.
        num_seeds: random projections or samples of random methods, to choose and then to check; at least 2.
        seed: of the split, and of the first random projection of the check.
        rounds: how often each setting is timed, where time is limited.
        on_progress: called with what is done next, the number of steps done and their total.

    Returns:
        The `ModelPlan`.

    Raises:
        InputError: a tolerance, budget, share or count out of range, two budgets, a budget below the cheapest choices,
            a method that is unknown or has no causal form, options that it does not take, a head without output.

    Example:
        >>> import jax
        >>> from approx_attention.evaluation import Layer, Tensors, plan_model
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 64, 2, 8)) for i in range(3))
        >>> diffuse, sharp = Layer(Tensors(0.1 * q, k, v + 1), None), Layer(Tensors(9 * q, k, v), None)
        >>> made = plan_model({"0": diffuse, "1": sharp}, tolerance=0.1, methods=["mean_value"])
        >>> [[head.method for head in own.heads] for own in made.policy.layers.values()]
        [['mean_value', 'mean_value'], ['exact', 'exact']]
    """
    check_positive("tolerance", tolerance)
    check_positive("max_bytes", max_bytes)
    check_positive("max_seconds", max_seconds)
    max_bytes = None if max_bytes is None else math.floor(max_bytes)
    check_confidence(confidence)
    if max_bytes is not None and max_seconds is not None:
        raise InputError("a plan for a model has one budget: give max_bytes or max_seconds, got both")
    check_range("num_seeds", num_seeds, 2, MOST_SEEDS)
    check_range("rounds", rounds, 1, MOST_SEEDS)
    check_range("seed", seed, 0, 2**31 - 1)
    if not layers:
        raise InputError("a plan for a model needs at least one layer, got none")
    problems = {
        path: Problem.of(
            layer.tensors,
            is_causal=bool(layer.is_causal) if is_causal is None else is_causal,
            scale=layer.scale if scale is None else scale,
            mask=layer.kv_mask,
        )
        for path, layer in layers.items()
    }
    any_causal = any(problem.is_causal for problem in problems.values())
    taken = {name: check_method(name, any_causal) for name in methods or default_methods(any_causal) if name != EXACT}
    names = [name for name, method in taken.items() if method.running or not check_flag("decode", decode)]
    options = check_options(names, options)
    # What checks a choice must not be what made it.
    choosing, checking = range(seed + num_seeds, seed + 2 * num_seeds), range(seed, seed + num_seeds)
    settings = {path: settings_of(problem, names, options) for path, problem in problems.items()}
    least = sum(
        min(setting.cache_bytes for of in own.values() for setting in of) * problems[path].tensors.key.shape[2]
        for path, own in settings.items()
    )
    if max_bytes is not None and least > max_bytes:
        raise InputError(f"the smallest caches of all heads take {least} bytes together, and max_bytes is {max_bytes}")
    steps, asked = iter(range(len(names) * len(layers))), {"held_out": held_out, "confidence": confidence}
    curves: dict[str, HeadCurves] = {}
    programs: dict[bytes, Any] = {}
    for path, problem in problems.items():

        def progress(name: str, path: str = path) -> None:
            on_progress(f"{path}: {name}" if path else name, next(steps), len(names) * len(layers))

        # Functions that close over different masks must not share programs.
        with shared_programs(programs.setdefault(b"" if problem.kv_mask is None else problem.kv_mask.tobytes(), {})):
            try:
                curves[path] = head_curves(
                    problem, settings[path], **asked, seeds=choosing, seed=seed, on_progress=progress
                )
            except InputError as error:
                raise InputError(f"layer {path!r}: {error}" if path else str(error)) from None
    if max_seconds is None:
        costs = {
            path: {label: one.setting.cache_bytes for label, one in own.configurations.items()}
            for path, own in curves.items()
        }
    else:
        costs = nanoseconds(curves, seed, rounds)
    budget = max_bytes if max_seconds is None else math.floor(1e9 * max_seconds)

    stacks: dict[Head, list[Head]] = {}
    for path, own in curves.items():
        for head in range(own.num_heads):
            stacks.setdefault((stack_of(path), head), []).append((path, head))
    items = [_item(heads, curves, costs, tolerance) for heads in stacks.values()]
    picks, is_met = _pick(items, budget)
    if picks is None:
        fastest = sum(min(item.options).cost for item in items) / 1e9
        raise InputError(
            f"the fastest choices of all heads take {fastest:.3g} s together, and max_seconds is {max_seconds:.3g}"
        )
    labels = {head: label for item, label in zip(items, picks, strict=True) for head in item.heads}
    spent = sum(costs[path][label] for (path, _), label in labels.items())
    everyone = _item([head for heads in stacks.values() for head in heads], curves, costs, tolerance)
    uniform, _ = _pick([everyone], spent if budget is None else budget)

    policy = Policy(
        {
            path: _layer_policy(own, [labels[path, head] for head in range(own.num_heads)], checking)
            for path, own in curves.items()
        },
        tolerance,
        max_bytes,
        max_seconds,
    )
    made = ModelPlan(
        policy=policy,
        split_by=next(iter(curves.values())).bench.split.by,
        uniform=None if uniform is None else uniform[0],
        uniform_errors={}
        if uniform is None
        else {path: own.held_out(uniform[0], checking) for path, own in curves.items()},
        is_met=is_met,
        seconds=None if max_seconds is None else _seconds(curves, policy, seed, rounds),
    )
    on_progress("done", len(names) * len(layers), len(names) * len(layers))
    return made


def _item(
    heads: list[Head], curves: Mapping[str, HeadCurves], costs: Mapping[str, Mapping[str, int]], tolerance: float
) -> _Item:
    """Heads that are to share a configuration that their layers all have."""
    paths = dict.fromkeys(path for path, _ in heads)
    labels = [s for s in curves[heads[0][0]].configurations if all(s in curves[path].configurations for path in paths)]
    options = []
    for label in labels:
        own = [(curves[path].configurations[label], head) for path, head in heads]
        cost, loss = (
            sum(costs[path][label] for path, _ in heads),
            sum(float(one.errors[head]) ** 2 for one, head in own),
        )
        options.append(_Option(cost, loss, label, all(one.bounds[head] <= tolerance * ROUNDING for one, head in own)))
    return _Item(heads, options)


def _pick(items: Sequence[_Item], budget: int | None) -> tuple[list[str] | None, bool]:
    """The configuration of each item, None where nothing fits, and whether all are predicted to meet the tolerance."""
    # Exact attention meets it, so that every item has an option that does.
    meeting = [[option for option in item.options if option.meets] for item in items]
    if budget is None:
        return [min(options).label for options in meeting], True
    for options, is_met in ((meeting, True), ([item.options for item in items], False)):
        picks = choose([[o.cost for o in own] for own in options], [[o.loss for o in own] for own in options], budget)
        if picks is not None:
            return [own[pick].label for own, pick in zip(options, picks, strict=True)], is_met
    return None, False


def _layer_policy(own: HeadCurves, labels: Sequence[str], seeds: Sequence[int]) -> LayerPolicy:
    """The choices of a layer, with what they turned out to be by random projections that chose nothing."""
    checked = {label: (own.held_out(label, seeds), own.overall(label, seeds)) for label in dict.fromkeys(labels)}
    heads = []
    for head, label in enumerate(labels):
        one, (held_out, overall) = own.configurations[label], checked[label]
        heads.append(
            HeadChoice(
                method=one.setting.arm.method,
                hyperparameters=one.setting.hyperparameters,
                predicted_error=float(one.errors[head]),
                error_bound=float(one.bounds[head]),
                held_out_error=float(held_out[head]),
                relative_error=float(overall[head]),
                cache_bytes=one.setting.cache_bytes,
            )
        )
    return LayerPolicy(tuple(heads), own.problem.is_causal, own.problem.scale)


def _seconds(curves: Mapping[str, HeadCurves], policy: Policy, seed: int, rounds: int) -> float:
    """The time of all layers with the policy."""
    calls = {
        path: own.bench.call(policy_arm(own.problem, policy.layers[path].methods), seed) for path, own in curves.items()
    }
    return sum(timing.least for timing in time_interleaved(calls, rounds=rounds).values())
