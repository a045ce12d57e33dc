"""Times of the layers of a model on this machine: of one method for all heads, and of a policy."""

import math
from collections.abc import Mapping
from typing import Any

from approx_attention.evaluation.arms import policy_arm
from approx_attention.evaluation.head_curves import HeadCurves
from approx_attention.evaluation.measurement import Measurement
from approx_attention.evaluation.timing import time_interleaved
from approx_attention.registry import HeadMethods


def nanoseconds(curves: Mapping[str, HeadCurves], measurement: Measurement) -> dict[str, dict[str, int]]:
    """The time of each configuration per key head, by layer: the time for all heads over their number.

    Layers of equal shapes share programs, and are timed once.

    Args:
        curves: curves by layer.
        measurement: the seed of random projections, and the number of timed calls of each configuration.
    """
    timed: dict[Any, dict[str, int]] = {}
    by_layer: dict[str, dict[str, int]] = {}
    for path, own in curves.items():
        tensors, is_causal, scale, kv_mask = own.problem
        form = (*(x.shape for x in tensors), is_causal, scale, None if kv_mask is None else kv_mask.tobytes())
        if form not in timed:
            calls = {
                label: own.bench.call(one.setting.arm, measurement.seed) for label, one in own.configurations.items()
            }
            # Twice the default patience, because there are many configurations.
            timings = time_interleaved(calls, rounds=measurement.rounds, patience=60)
            timed[form] = {
                label: max(1, math.ceil(1e9 * timing.least / own.num_heads)) for label, timing in timings.items()
            }
        by_layer[path] = timed[form]
    return by_layer


def call_nanoseconds(
    curves: Mapping[str, HeadCurves], methods: Mapping[str, HeadMethods], measurement: Measurement
) -> int:
    """The time of a call of all layers, each with a method for each key head.

    Args:
        curves: curves by layer.
        methods: methods by layer.
        measurement: the seed of random projections, and the number of timed calls of each layer.
    """
    calls = {
        path: own.bench.call(policy_arm(own.problem, methods[path]), measurement.seed) for path, own in curves.items()
    }
    return math.ceil(1e9 * sum(timing.least for timing in time_interleaved(calls, rounds=measurement.rounds).values()))
