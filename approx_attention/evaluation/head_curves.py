"""Errors, bounds and cache bytes of every method at every size, by key head of a layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from approx_attention.core import InputError
from approx_attention.evaluation.arms import EXACT, Options, exact_arms, method_arm
from approx_attention.evaluation.bench import Bench
from approx_attention.evaluation.cache_bytes import token_bytes
from approx_attention.evaluation.calibration import all_sizes
from approx_attention.evaluation.error_laws import ErrorLaw, split_within_heads
from approx_attention.evaluation.measurement import Measurement
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.programs import Arm
from approx_attention.evaluation.real_tokens import query_mask
from approx_attention.registry import get_method


class Setting(NamedTuple):
    """A method at one size on a layer.

    Attributes:
        arm: the configuration.
        hyperparameters: the arguments of the method.
        cache_bytes: cache bytes per key head and sequence.
    """

    arm: Arm
    hyperparameters: dict[str, Any]
    cache_bytes: int


class Configuration(NamedTuple):
    """A setting with its errors on the calibration queries of each key head.

    Attributes:
        setting: the method and its size.
        errors: relative errors ``[K]``.
        bounds: predicted upper bounds of the errors of other queries, ``[K]``.
    """

    setting: Setting
    errors: np.ndarray
    bounds: np.ndarray


class HeadCurves(NamedTuple):
    """A layer, and all configurations by label.

    Attributes:
        problem: the layer.
        bench: the compiled configurations on its tensors.
        configurations: the configurations by label; ``"exact"`` is the first.
    """

    problem: Problem
    bench: Bench
    configurations: dict[str, Configuration]

    @property
    def num_heads(self) -> int:
        """The number of key heads."""
        return self.problem.tensors.key.shape[2]

    def held_out(self, label: str, seeds: Sequence[int]) -> np.ndarray:
        """The errors of a configuration on the held-out queries of each head, ``[K]``."""
        errors, split = self.bench.errors(self.configurations[label].setting.arm, seeds), self.bench.split
        return np.array([errors.relative(split.of_group(head).held_out) for head in range(self.num_heads)])

    def overall(self, label: str, seeds: Sequence[int]) -> np.ndarray:
        """The errors of a configuration on all queries of each head, ``[K]``."""
        errors, groups = self.bench.errors(self.configurations[label].setting.arm, seeds), self.bench.split.groups
        return np.array([errors.relative(np.flatnonzero(groups == head)) for head in range(self.num_heads)])


def settings_of(problem: Problem, names: Sequence[str], options: Options) -> dict[str, list[Setting]]:
    """Make the settings to measure: exact attention, and each method at `all_sizes`. Nothing runs yet.

    Args:
        problem: the layer.
        names: names of the methods.
        options: hyper-parameters other than the size, by the name of the method.

    Raises:
        InputError: a method does not support an option.
    """
    all_bytes = token_bytes(problem.tensors)
    made = {EXACT: [Setting(exact_arms(problem)[0], {}, all_bytes)]}
    for name in names:
        argument, given = get_method(name).size, dict(options.get(name, {}))
        sizes: list[int | None] = [None] if argument is None else [*all_sizes(name, problem.tensors.key.shape[1])]
        made[name] = []
        for size in sizes:
            arm = method_arm(problem, name, size, given)
            own = given if argument is None else {**given, argument: size}
            made[name].append(Setting(arm, own, arm.held_bytes or all_bytes))
    return made


def head_curves(
    problem: Problem,
    settings: Mapping[str, Sequence[Setting]],
    measurement: Measurement,
    *,
    on_progress: Callable[[str], None],
) -> HeadCurves:
    """Measure settings on the calibration queries of each key head.

    Args:
        problem: the layer.
        settings: settings by method, from `settings_of`.
        measurement: its ``choosing`` seeds are the seeds of random methods.
        on_progress: called with each method.

    Raises:
        InputError: the outputs of a head are all zero or not finite.
    """
    tensors = problem.tensors
    num_heads = tensors.key.shape[2]
    real_queries = query_mask(problem.kv_mask, tensors.query.shape[1])
    split = split_within_heads(tensors.query.shape, num_heads, measurement.held_out, measurement.seed, real_queries)
    (exact,), zeros = settings[EXACT], np.zeros(num_heads)
    bench, parts = Bench(tensors, exact.arm, split), [split.of_group(head) for head in range(num_heads)]
    for head, part in enumerate(parts):
        if not all(0 < bench.exact[units].sum() < math.inf for units in (part.calibration, part.held_out)):
            raise InputError(f"outputs of key head {head} are all zero or not finite: relative errors are undefined")
    found = {EXACT: Configuration(exact, zeros, zeros)}
    for name in [name for name in settings if name != EXACT]:
        on_progress(name)
        sizes = [setting.arm.size for setting in settings[name]]
        measured = [bench.errors(setting.arm, measurement.choosing) for setting in settings[name]]
        errors = _never_increasing(sizes, [[own.relative(part.calibration) for part in parts] for own in measured])
        bounds = [[own.bound(part, measurement.confidence) for part in parts] for own in measured]
        # A bound of the error at a size also holds for larger sizes.
        bounds = np.minimum.accumulate(np.array(bounds))
        for setting, error, bound in zip(settings[name], errors, bounds, strict=True):
            found[setting.arm.label] = Configuration(setting, error, bound)
    return HeadCurves(problem, bench, found)


def _never_increasing(sizes: Sequence[int | None], errors: Sequence[Sequence[float]]) -> np.ndarray:
    """Errors ``[sizes, K]`` of each head after isotonic regression."""
    if len(sizes) < 2:
        return np.array(errors)
    by_head = ({size: own for size, own in zip(sizes, head, strict=True) if size} for head in zip(*errors, strict=True))
    return np.array([ErrorLaw.fit(own).errors for own in by_head]).T
