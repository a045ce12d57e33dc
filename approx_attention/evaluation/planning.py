"""Plans: the cheapest method and size for a tolerance and a budget, chosen on some heads and checked on others."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from approx_attention.core import InputError
from approx_attention.evaluation.arms import (
    BASELINES,
    EXACT,
    Options,
    check_method,
    check_options,
    check_positive,
    default_methods,
    exact_arms,
    method_arm,
)
from approx_attention.evaluation.bench import Bench
from approx_attention.evaluation.cache_bytes import token_bytes
from approx_attention.evaluation.calibration import ROUNDING, calibrate, chosen_settings, first_sizes
from approx_attention.evaluation.error_laws import UnitErrors, split_units
from approx_attention.evaluation.files import Tensors
from approx_attention.evaluation.measurement import STANDARD, Measurement
from approx_attention.evaluation.plans import Candidate, Curve, Plan, cost, verdict
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.programs import Arm
from approx_attention.evaluation.real_tokens import query_mask
from approx_attention.evaluation.timing import time_interleaved
from approx_attention.registry import get_method


def plan(
    tensors: Tensors,
    *,
    tolerance: float,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    methods: Iterable[str] | None = None,
    options: Options | None = None,
    measurement: Measurement = STANDARD,
    lengths: Any = None,
    mask: Any = None,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_part: Callable[[Plan], None] = lambda made: None,
) -> Plan:
    """Find the cheapest setting of any method whose error on unseen heads stays below a tolerance.

    1. Every method is measured at a few sizes on part of the key heads, with their queries (the calibration heads).
    2. A bound of the error of other heads, from the spread over heads and seeds, is fitted against size. The smallest
       size predicted to meet the tolerance is measured too, and the fit is repeated.
    3. The chosen setting of each method is measured on the held-out heads with new seeds, and timed together with every
       exact form.
    4. The cheapest is recommended: the fastest, or if only bytes are limited, the one with the fewest cache bytes.

    Exact attention and the trivial baselines are always included. The held-out heads do not influence choices, so their
    errors are those to expect of similar heads. With fewer than eight key heads, the units of the split are heads of
    sequences; with fewer than eight of these, runs of queries (`Plan.split`).

    Args:
        tensors: query ``[B, T, N, D]``, key ``[B, S, K, D]`` and value ``[B, S, K, Dv]`` in float32.
        tolerance: the largest relative error of the outputs (Frobenius norm over all heads).
        max_bytes: the largest number of cache bytes per key head and sequence.
        max_seconds: the longest time of a call on these tensors in seconds.
        is_causal: whether query t sees keys j <= t only.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        methods: names in `METHODS`; all that cost less than exact attention by default.
        options: hyper-parameters other than the size, by the name of the method.
        measurement: shares, seeds and rounds of the measurements.
        lengths: real tokens of each sequence, integers ``[B]``. Methods do not see padding, and errors are those of
            real queries; if T differs from S, all queries are real.
        mask: true where a key is real, ``[B, S]``, in place of ``lengths`` or with them.
        on_progress: called with the name of the next step, the number of finished steps and their total.
        on_part: called after each method with the plan so far, which contains bounds, but no checks or times; for runs
            that may be interrupted.

    Returns:
        The `Plan`.

    Raises:
        InputError: a tolerance or budget is out of range, a method is unknown or has no causal form or such an option,
            or lengths or mask do not match the tensors.

    Example:
        >>> import jax
        >>> from approx_attention.evaluation import Tensors, plan
        >>> q, k, v = (0.1 * jax.random.normal(jax.random.key(i), (1, 64, 8, 8)) for i in range(3))
        >>> made = plan(Tensors(q, k, v + 1), tolerance=0.05, max_bytes=1000, methods=["mean_pool"])
        >>> made.pick.label, made.pick.meets
        ('mean_value', True)
    """
    check_positive("tolerance", tolerance)
    check_positive("max_bytes", max_bytes)
    check_positive("max_seconds", max_seconds)
    names = list(dict.fromkeys((*BASELINES, *(default_methods(is_causal) if methods is None else methods))))
    problem = Problem.of(tensors, is_causal=is_causal, scale=scale, lengths=lengths, mask=mask)
    tensors = problem.tensors
    taken = {name: check_method(name, is_causal) for name in names if name != EXACT}
    names = list(taken)
    options = check_options(names, options)
    real_queries = query_mask(problem.kv_mask, tensors.query.shape[1])
    split = split_units(tensors.query.shape, tensors.key.shape[2], measurement.held_out, measurement.seed, real_queries)
    rank_by = "held_bytes" if max_bytes is not None and max_seconds is None else "seconds"
    # The cache bytes of exact attention, and of every method that keeps all tokens.
    all_bytes = token_bytes(tensors)
    # Each configuration is made once, and so compiled once.
    arm_of = functools.cache(lambda name, size: method_arm(problem, name, size, options.get(name)))
    # Invalid options raise before anything is measured.
    num_keys = tensors.key.shape[1]
    for name in options:
        arm_of(name, None if get_method(name).size is None else next(iter(first_sizes(name, num_keys)), 1))
    exact_forms = exact_arms(problem)
    bench = Bench(tensors, exact_forms[0], split)
    if not 0 < bench.exact.sum() < math.inf:
        raise InputError("the outputs of exact attention are all zero or not finite: relative errors are undefined")

    curves: dict[str, Curve] = {}
    proposals: list[tuple[Arm, float, float]] = [(arm, 0.0, 0.0) for arm in exact_forms]

    def candidate(
        proposal: tuple[Arm, float, float],
        errors: UnitErrors | None = None,
        least: float = math.nan,
        fastest_exact: float = math.nan,
    ) -> Candidate:
        arm, predicted, bound = proposal
        held_bytes = arm.held_bytes or all_bytes
        error = math.nan if errors is None else errors.relative(split.held_out)
        return Candidate(
            method=arm.method,
            size=arm.size,
            predicted_error=predicted,
            error_bound=bound,
            held_out_error=error,
            worst_held_out_error=math.nan if errors is None else errors.worst(split.held_out),
            relative_error=math.nan if errors is None else errors.relative(np.arange(len(split.groups))),
            held_bytes=held_bytes,
            compile_seconds=bench.compile_seconds(arm),
            seconds=least,
            speedup=fastest_exact / least,
            is_exact=arm.is_exact,
            # A form of exact attention with quantised tokens has an error too.
            is_predicted=bool((error if arm.is_exact and errors else bound) <= tolerance * ROUNDING),
            in_budget=(max_bytes is None or held_bytes <= max_bytes) and (max_seconds is None or least <= max_seconds),
            meets=bool(error <= tolerance),
        )

    def so_far() -> Plan:
        told = "Interrupted: these are bounds; nothing was checked or timed."
        bounded = [candidate(proposal) for proposal in proposals]
        return Plan(
            tolerance, max_bytes, max_seconds, "held_bytes", measurement.confidence, split, bounded, curves, None, told
        )

    for done, name in enumerate(names):
        if done:
            on_part(so_far())
        on_progress(name, done, len(names) + 1)

        def measure(size: int | None, name: str = name) -> tuple[float, float]:
            errors = bench.errors(arm_of(name, size), measurement.choosing)
            return errors.relative(split.calibration), errors.bound(split, measurement.confidence)

        if get_method(name).size is None:
            proposals.append((arm_of(name, None), *measure(None)))
            continue

        def held(size: int, name: str = name) -> int:
            return arm_of(name, size).held_bytes or all_bytes

        curve = calibrate(name, num_keys, tolerance, max_bytes, measure, held)
        if curve is None:
            continue
        curves[name] = curve
        sizes: Iterable[int] = curve.measured
        if max_seconds is None:  # else times decide between all measured settings
            sizes = chosen_settings(
                sizes,
                meets=lambda size, curve=curve: curve.bound.error(size) <= tolerance * ROUNDING,
                fits=lambda size, held=held: max_bytes is None or held(size) <= max_bytes,
            )
        proposals += [(arm_of(name, size), curve.error.error(size), curve.bound.error(size)) for size in sizes]

    on_part(so_far())
    on_progress("timing", len(names), len(names) + 1)
    checked = [bench.errors(arm, measurement.checking) for arm, *_ in proposals]
    # Twice the default patience, because there are many candidates.
    timings = time_interleaved(
        {str(i): bench.call(arm, measurement.seed) for i, (arm, *_) in enumerate(proposals)},
        rounds=measurement.rounds,
        patience=60,
    )
    seconds = [timing.least for timing in timings.values()]
    fastest_exact = min(time for time, (arm, *_) in zip(seconds, proposals, strict=True) if arm.is_exact)
    candidates = [
        candidate(proposal, errors, least, fastest_exact)
        for proposal, errors, least in zip(proposals, checked, seconds, strict=True)
    ]
    candidates = [
        chosen
        for method in dict.fromkeys(c.method for c in candidates)
        for chosen in chosen_settings(
            [c for c in candidates if c.method == method], meets=lambda c: c.is_predicted, fits=lambda c: c.in_budget
        )
    ]
    candidates.sort(key=lambda c: (not (c.is_predicted and c.in_budget), cost(c, rank_by)))
    pick = candidates[0] if candidates[0].is_predicted and candidates[0].in_budget else None
    on_progress("done", len(names) + 1, len(names) + 1)
    made = Plan(tolerance, max_bytes, max_seconds, rank_by, measurement.confidence, split, candidates, curves, pick, "")
    return dataclasses.replace(made, verdict=verdict(made))
