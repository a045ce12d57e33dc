"""Checks of policies on other text: the error of each head, computed as in the model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from approx_attention.core import InputError
from approx_attention.evaluation.arms import MOST_SEEDS, check_range, exact_arms, policy_arm
from approx_attention.evaluation.bench import Bench
from approx_attention.evaluation.calibration import ROUNDING
from approx_attention.evaluation.error_laws import Split
from approx_attention.evaluation.files import Layer
from approx_attention.evaluation.policies import Policy
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.real_tokens import query_mask


@dataclasses.dataclass(frozen=True)
class PolicyCheck:
    """The errors of a policy on given layers, with those on the text for which it was made.

    Attributes:
        policy: the checked policy.
        errors: relative error of the outputs of each key head, ``[K]`` by layer; mean over seeds.
        promised: the same for the file from which the policy was made (`HeadChoice.relative_error`).
    """

    policy: Policy
    errors: Mapping[str, np.ndarray]
    promised: Mapping[str, np.ndarray]

    @property
    def failures(self) -> list[tuple[str, int]]:
        """Layer and index of each key head whose error exceeds the tolerance."""
        most = self.policy.tolerance * ROUNDING
        return [(layer, head) for layer, own in self.errors.items() for head in np.flatnonzero(~(own <= most)).tolist()]


def check_policy(
    policy: Policy,
    layers: Mapping[str, Layer],
    *,
    num_seeds: int = 3,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> PolicyCheck:
    """Measure the error of each head with a policy, for example on another text than the one it was made from.

    The policy of a layer runs in `attention`, as it does in a model.

    Args:
        policy: policy of these layers, or of some of them.
        layers: layers as from `load_layers`; causality and scale are those of the policy.
        num_seeds: number of seeds of random methods.
        seed: the first seed.
        on_progress: called with the name of the next step, the number of finished steps and their total.

    Returns:
        The `PolicyCheck`.

    Raises:
        InputError: a layer of the policy is missing or has another number of key heads, or a count is out of range.

    Example:
        >>> import jax
        >>> from approx_attention.evaluation import Layer, Tensors, check_policy, plan_model
        >>> def layer(seed):
        ...     q, k, v = (0.1 * jax.random.normal(jax.random.key(3 * seed + i), (1, 64, 2, 8)) for i in range(3))
        ...     return Layer(Tensors(q, k, v + 1), None)
        >>> policy = plan_model({"0": layer(0)}, tolerance=0.05, methods=["mean_value"]).policy
        >>> check_policy(policy, {"0": layer(1)}).failures
        []
    """
    check_range("num_seeds", num_seeds, 1, MOST_SEEDS)
    check_range("seed", seed, 0, 2**31 - 1)
    missing = [path for path in policy.layers if path not in layers]
    if missing:
        raise InputError(f"the policy is for {', '.join(missing)}, but the layers are {', '.join(layers)}")
    errors: dict[str, np.ndarray] = {}
    for done, (path, own) in enumerate(policy.layers.items()):
        on_progress(path, done, len(policy.layers))
        tensors, kv_mask = layers[path][:2]
        try:
            own.methods.require(tensors.key.shape[2])
        except ValueError as error:
            raise InputError(f"layer {path!r}: {error}") from None
        problem = Problem.of(tensors, is_causal=own.is_causal, scale=own.scale, mask=kv_mask)
        num_heads = len(own.heads)
        heads: Any = np.arange(num_heads)
        real_queries = query_mask(problem.kv_mask, tensors.query.shape[1])
        split = Split("heads", (1, num_heads, 1), heads, heads, heads, real_queries)
        bench = Bench(problem.tensors, exact_arms(problem)[0], split)
        found = bench.errors(policy_arm(problem, own.methods), range(seed, seed + num_seeds))
        errors[path] = np.array([found.relative(np.array([head])) for head in heads])
    on_progress("done", len(policy.layers), len(policy.layers))
    promised = {path: np.array([head.relative_error for head in own.heads]) for path, own in policy.layers.items()}
    return PolicyCheck(policy, errors, promised)
