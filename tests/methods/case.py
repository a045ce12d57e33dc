"""Facts about a method that shared tests need; each test file here gives them in ``CASES``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tests.references import brute_force

NOTHING: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Small settings of a method, and its differences from other methods; by default there are none.

    Attributes:
        size: maps the size that a test requests to the value of the method's hyper-parameter.
        fast: one method of each kind of summary has it. For the others, tests of shared code are slow tests.
        always_exact: equals exact attention at any size.
        target: ``(q, k, v) -> out``, the function that it approximates.
        values_only: the output depends on neither queries nor keys.
        scale_cancels: the reason why ``scale`` changes nothing, if it does not.
        unseen: the tensors among ``"kv"`` whose first tokens need not reach the last query.
        diagonal_size: a size at which each token sees itself in the causal form.
        diagonal_inputs: ``(q, k) -> (q, k)``, inputs for which it does.
        any_length: maps a length to hyper-parameters that lay out its prefixes like the whole sequence.
        changes: for each argument a value that must change the output. Sizes and blocks have one by default.
        contexts: for each argument the other arguments that it needs to have an effect.
        without_effect: arguments that only control how the work is split.
        changes_are_causal: whether the changes are tested in the causal form, if there is one.
        exact_causal: options without which the causal form has no exact limit.
        random: options without which two PRNG keys may give the same output.
        smooth: options without which the derivative omits a part of the function.
        learned: an argument that can be learned, with its shape for 12 keys.
        devices: hyper-parameters for 61 tokens on up to eight devices, if it can be sharded; the output must equal
            that of one device.
    """

    size: Callable[[int], int] = lambda size: size
    fast: bool = False
    always_exact: bool = False
    target: Callable[..., Any] = lambda q, k, v: brute_force(q, k, v)[0]
    values_only: bool = False
    scale_cancels: str = ""
    unseen: str = ""
    diagonal_size: int = 8
    diagonal_inputs: Callable[..., Any] = lambda q, k: (q, k)
    any_length: Callable[[int], Mapping[str, Any]] = lambda length: NOTHING
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    contexts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    without_effect: tuple[str, ...] = ()
    changes_are_causal: bool = True
    exact_causal: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    smooth: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learned: tuple[str, tuple[int, int]] | None = None
    devices: Mapping[str, Any] | None = None


def within_block(size: int) -> int:
    """A size within each block of four; larger sizes count for the whole sequence."""
    return size if size > 8 else 2
