"""What a test of all methods must know of one of them: each file of tests here says it in ``CASES``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tests.references import brute_force

NOTHING: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """How a method is made small, and where it differs from the others; by default it does not.

    Attributes:
        size: from the size that a test asks for to the value of the method's hyper-parameter.
        fast: one of each kind of summary. Tests of what all methods share run for the others only when slow.
        always_exact: equals exact attention at any size.
        target: ``(q, k, v) -> out``, what it approximates.
        values_only: neither queries nor keys matter.
        scale_cancels: why ``scale`` changes nothing, where it does not.
        unseen: the tensors among ``"kv"`` whose first tokens need not reach the last query.
        diagonal_size: a size at which each token sees itself in the causal form.
        diagonal_inputs: ``(q, k) -> (q, k)``, inputs for which it does.
        any_length: from a length to the hyper-parameters with which its prefixes are laid out as the whole is.
        changes: by argument another value, which must change the output. Sizes and blocks have one by default.
        contexts: by argument the further arguments that it needs to have an effect.
        without_effect: arguments that say only how the work is split.
        changes_are_causal: whether the changes are those of the causal form, where there is one.
        exact_causal: options without which the causal form has no exact limit.
        random: options without which two keys may choose the same.
        smooth: options without which derivatives leave something out.
        learned: an argument that can be learned, with its shape for 12 keys.
        devices: hyper-parameters for 61 tokens on up to eight devices, where it can be sharded: the output must be
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
    """A size that counts within each block of four, unless a test asks for all."""
    return size if size > 8 else 2
