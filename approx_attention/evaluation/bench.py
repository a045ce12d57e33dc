"""Compiled configurations on given tensors, and their errors by unit."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from approx_attention.core import in_float32
from approx_attention.evaluation.error_laws import Split, UnitErrors
from approx_attention.evaluation.files import Tensors
from approx_attention.evaluation.programs import Arm, compile_arm


class Bench:
    """Compiled configurations on given tensors, and their errors against exact attention by unit.

    Exact attention is computed in full precision, the configurations in the precision that the user has set.

    Args:
        tensors: query, key and value ``[B, T, N, D]``, ``[B, S, K, D]`` and ``[B, S, K, Dv]``.
        exact: a form of exact attention.
        split: the units, and which of them are held out.
    """

    def __init__(self, tensors: Tensors, exact: Arm, split: Split):
        self.tensors, self.split = tensors, split
        self.programs: dict[Arm, tuple[Callable[..., Any], float]] = {}
        # Exact outputs are in full precision. Configurations use the precision that the user has set: their errors and
        # times come from the same program.
        with in_float32():
            program, _ = compile_arm(exact, *tensors)
        self.exact_out = program(*tensors, exact.draw(jax.random.key(0)))[0]
        self.exact = self._by_unit(self.exact_out)

    def _program(self, arm: Arm) -> tuple[Callable[..., Any], float]:
        if arm not in self.programs:
            self.programs[arm] = compile_arm(arm, *self.tensors)
        return self.programs[arm]

    def call(self, arm: Arm, seed: int) -> Callable[[], Any]:
        """Prepare a call of a configuration, which is compiled if it is new.

        Args:
            arm: the configuration.
            seed: seed of its random projections.

        Returns:
            A function without arguments that returns outputs and log-normalisers.
        """
        return functools.partial(self._program(arm)[0], *self.tensors, arm.draw(jax.random.key(seed)))

    def compile_seconds(self, arm: Arm) -> float:
        """The compile time in seconds."""
        return self._program(arm)[1]

    def errors(self, arm: Arm, seeds: Sequence[int]) -> UnitErrors:
        """The errors of a configuration by unit.

        Args:
            arm: the configuration.
            seeds: seeds of its random projections; only the first is used if it is not random.

        Returns:
            Squared norms of the error ``[seeds, U]`` and of the exact output ``[U]``.
        """
        outs = [self.call(arm, seed)()[0] for seed in (seeds if arm.is_random else seeds[:1])]
        return UnitErrors(np.stack([self._by_unit(out - self.exact_out) for out in outs]), self.exact)

    def _by_unit(self, x: jax.Array) -> np.ndarray:
        """Sums of squares ``[U]`` of ``[B, T, N, Dv]`` by unit."""
        return self.split.sums(np.asarray(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1), np.float64))
