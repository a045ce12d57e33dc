"""Plans of whole models: a method and a size for each key head of each layer, within one budget of bytes or time."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from approx_attention.core import InputError, check_flag
from approx_attention.evaluation.arms import (
    EXACT,
    Options,
    check_method,
    check_options,
    check_positive,
    default_methods,
)
from approx_attention.evaluation.calibration import ROUNDING
from approx_attention.evaluation.files import Layer
from approx_attention.evaluation.head_choices import Choice, Head, Item, Option, best_choice, fast_choice
from approx_attention.evaluation.head_curves import HeadCurves, head_curves, settings_of
from approx_attention.evaluation.layer_times import call_nanoseconds, nanoseconds
from approx_attention.evaluation.measurement import STANDARD, Measurement
from approx_attention.evaluation.policies import HeadChoice, LayerPolicy, Policy, stack_of
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.programs import shared_programs
from approx_attention.registry import HeadMethods


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """The result of `plan_model`, with the best single method of one size for comparison.

    Attributes:
        policy: the choices, with their errors.
        split_by: the held-out units of each head: ``sequences`` or ``runs of queries``.
        uniform: the best single method and size for all heads of all layers within the same budget; None if none fits.
        uniform_errors: its errors on the held-out queries, ``[K]`` by layer.
        is_met: whether every head is predicted to meet the tolerance.
        seconds: the shortest time of a call of all layers with the policy, if time is limited, as measured on this
            machine while planning.
    """

    policy: Policy
    split_by: str
    uniform: str | None
    uniform_errors: Mapping[str, np.ndarray]
    is_met: bool
    seconds: float | None

    @property
    def errors(self) -> dict[str, np.ndarray]:
        """The errors of the policy on the held-out queries, ``[K]`` by layer."""
        return {
            layer: np.array([head.held_out_error for head in own.heads]) for layer, own in self.policy.layers.items()
        }


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
    measurement: Measurement = STANDARD,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> ModelPlan:
    r"""Choose a method and a size for each key head of each layer of a model, within one budget for all heads.

    .. math:: \min \sum_{l, h} e_{lh}^2 \quad\text{so that}\quad \sum_{l, h} c_{lh} \le C, \qquad
              e_{lh} = \|\hat O_{lh} - O_{lh}\|_F \,/\, \|O_{lh}\|_F

    where O are the outputs of all query heads that share key head h of layer l, and c is its cost. Every method is
    measured at sizes in factors of two on part of each head's queries; exact attention is one more option. Choices are
    based on the errors of these queries, made non-increasing in the size. If the budget allows every head to meet the
    tolerance, by a bound of the error of other queries as in `plan`, only such options are used; else the tolerance is
    ignored in the minimisation. Without a budget each head gets the cheapest option that meets the tolerance. The
    held-out queries do not influence choices, so their errors are those to expect of other queries.

    Layers named ``"path[0]"``, ``"path[1]"`` and so on are a stack, which runs as one program and gets one policy.

    Args:
        layers: layers by path, as from `load_layers`, with the names of `nnx.capture_attention`.
        tolerance: the largest relative error allowed for each head.
        max_bytes: bytes for all caches of a sequence, of every key head of every layer.
        max_seconds: seconds for a call of all layers on these tensors, instead of ``max_bytes``. Times are measured on
            this machine while planning: the cost of a head is its share of a call in which all heads of its layer
            have the method. Heads of several methods run as several programs, which can take longer; then the choice
            is repeated with a smaller budget, until a call of all layers takes at most ``max_seconds``.
        is_causal: whether query t sees keys j <= t only; by default as in each layer.
        scale: factor of the logits; by default as in each layer, else ``1/sqrt(D)``.
        methods: names in `METHODS`; all that cost less than exact attention by default.
        options: hyper-parameters other than the size, by the name of the method.
        decode: leave out methods without a running summary, which cannot decode.
        measurement: shares, seeds and rounds of the measurements. Held-out queries are whole sequences if there are
            at least 8.
        on_progress: called with the name of the next step, the number of finished steps and their total.

    Returns:
        The `ModelPlan`.

    Raises:
        InputError: a tolerance or budget is out of range, there are two budgets, the budget is below the cheapest
            choices, no choice was measured within the time, a method is unknown or has no causal form or such an
            option, or a head has zero outputs.

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
    if max_bytes is not None and max_seconds is not None:
        raise InputError("a plan for a model has one budget: give either max_bytes or max_seconds, got both")
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
    settings = {path: settings_of(problem, names, options) for path, problem in problems.items()}
    least = sum(
        min(setting.cache_bytes for of in own.values() for setting in of) * problems[path].tensors.key.shape[2]
        for path, own in settings.items()
    )
    if max_bytes is not None and least > max_bytes:
        raise _too_few(least, max_bytes)
    num_steps = len(names) * len(layers) + (max_seconds is not None)
    steps = iter(range(num_steps))
    curves: dict[str, HeadCurves] = {}
    programs: dict[bytes, Any] = {}
    for path, problem in problems.items():

        def progress(name: str, path: str = path) -> None:
            on_progress(f"{path}: {name}" if path else name, next(steps), num_steps)

        # Functions that close over different masks must not share programs.
        with shared_programs(programs.setdefault(b"" if problem.kv_mask is None else problem.kv_mask.tobytes(), {})):
            try:
                curves[path] = head_curves(problem, settings[path], measurement, on_progress=progress)
            except InputError as error:
                raise InputError(f"layer {path!r}: {error}" if path else str(error)) from None
    costs = {
        path: {label: one.setting.cache_bytes for label, one in own.configurations.items()}
        for path, own in curves.items()
    }
    if max_seconds is not None:
        on_progress("timing", next(steps), num_steps)
        costs = nanoseconds(curves, measurement)
    stacks: dict[Head, list[Head]] = {}
    for path, own in curves.items():
        for head in range(own.num_heads):
            stacks.setdefault((stack_of(path), head), []).append((path, head))
    items = [_item(heads, curves, costs, tolerance) for heads in stacks.values()]
    everyone = _item([head for heads in stacks.values() for head in heads], curves, costs, tolerance)

    time = None
    if max_seconds is not None:
        budget = math.floor(1e9 * max_seconds)

        def time_of(choice: Choice) -> int:
            return call_nanoseconds(curves, _methods(curves, choice), measurement)

        choice, time = fast_choice(items, everyone, budget, time_of)
    else:
        budget, choice = max_bytes, best_choice(items, max_bytes)
    if choice is None:
        # Layers of a stack have no smaller ones that they can share.
        raise _too_few(sum(min(item.options).cost for item in items), max_bytes)
    uniform = best_choice([everyone], choice.cost if budget is None else budget)
    label = None if uniform is None else next(iter(uniform.labels.values()))

    policy = Policy(
        {
            path: _layer_policy(own, _labels(choice, path), measurement.checking, None if time is None else costs[path])
            for path, own in curves.items()
        },
        tolerance,
        max_bytes,
        max_seconds,
    )
    made = ModelPlan(
        policy=policy,
        split_by=next(iter(curves.values())).bench.split.by,
        uniform=label,
        uniform_errors={}
        if label is None
        else {path: own.held_out(label, measurement.checking) for path, own in curves.items()},
        is_met=not choice.misses,
        seconds=None if time is None else time / 1e9,
    )
    on_progress("done", num_steps, num_steps)
    return made


def _item(
    heads: list[Head], curves: Mapping[str, HeadCurves], costs: Mapping[str, Mapping[str, int]], tolerance: float
) -> Item:
    """The item of heads that must have the same configuration, with the options of all of their layers."""
    paths = dict.fromkeys(path for path, _ in heads)
    labels = [s for s in curves[heads[0][0]].configurations if all(s in curves[path].configurations for path in paths)]
    options = []
    for label in labels:
        own = [(curves[path].configurations[label], head) for path, head in heads]
        cost, loss = (
            sum(costs[path][label] for path, _ in heads),
            sum(float(one.errors[head]) ** 2 for one, head in own),
        )
        options.append(Option(cost, loss, label, all(one.bounds[head] <= tolerance * ROUNDING for one, head in own)))
    return Item(heads, options)


def _too_few(least: int, max_bytes: int | None) -> InputError:
    return InputError(f"the smallest caches of all heads take {least} bytes in total, but max_bytes is {max_bytes}")


def _labels(choice: Choice, path: str) -> list[str]:
    """The configurations of a layer's heads, in order."""
    return [label for (layer, _), label in sorted(choice.labels.items()) if layer == path]


def _methods(curves: Mapping[str, HeadCurves], choice: Choice) -> dict[str, HeadMethods]:
    """The methods of the heads of each layer with a choice."""
    made = {}
    for path, own in curves.items():
        settings = [own.configurations[label].setting for label in _labels(choice, path)]
        made[path] = HeadMethods.of((one.arm.method, one.hyperparameters) for one in settings)
    return made


def _layer_policy(
    own: HeadCurves, labels: Sequence[str], seeds: Sequence[int], times: Mapping[str, int] | None
) -> LayerPolicy:
    """The choices of a layer, with their errors for the seeds of the check."""
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
                seconds=None if times is None else times[label] / 1e9,
            )
        )
    return LayerPolicy(tuple(heads), own.problem.is_causal, own.problem.scale)
