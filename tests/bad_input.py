"""``python -m tests.bad_input``: lists bad arguments that are accepted, and errors that do not name theirs.

It runs in a separate process without the signature checks that the tests install, because users do not have them.
"""

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from approx_attention import METHODS, SparsePattern, bounds
from approx_attention.core import shown
from approx_attention.decoding import pyramid_budgets, token_budget
from approx_attention.realization import failure_bound
from approx_attention.sparse import BlockMap
from approx_attention.tensor import exp_coefficients, total_degree
from tests import forms as platform_forms

# A count that fits a narrow integer type can overflow it in sums and products.
TOKENS, COUNT = 300, 100
OWN_COUNTS = {"degree": 2, "num_window_blocks": 101, "num_hashes": 12, "overlap": 16, "chunk_size": 25}
OTHER = {"chunk_size": {"window_size": 100}, "overlap": {"window_size": 64}}
NO_COUNTS: tuple[Any, ...] = (2.5, "x", [3], True, np.True_, jnp.int32(3), np.array(3))
NO_ARRAYS: tuple[Any, ...] = ([1.0], "x", object(), 1j, jnp.full((3, 5, 7), 1j))
NUMBERS = ("scale", "bandwidth", "query_radius", "ridge", "rcond", "correction", "bound", "rms")
ERRORS = (TypeError, ValueError, NotImplementedError)

tokens, key = jnp.ones((TOKENS, 4)), jax.random.key(0)


def main() -> None:
    warnings.simplefilter("error")
    platform_forms.install()
    with platform_forms.FORM("cpu"):
        for complaint in itertools.chain(counts_of_functions(), arrays(), flags(), counts_of_methods()):
            print(complaint, flush=True)


def forms(name: str) -> Iterator[dict[str, Any]]:
    """Yield the options of each form of a method."""
    yield {}
    if "is_causal" in inspect.signature(METHODS[name].function).parameters:
        yield {"is_causal": True}


def outcome(function: Callable[[], Any]) -> str:
    """The shapes of the outputs of a function, or its error."""
    try:
        return str(jax.tree.map(lambda x: getattr(x, "shape", x), function()))
    except ERRORS as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # no bad argument may cause another kind of error
        return f"{type(error).__name__} instead of an error that names the argument: {str(error)[:100]}"


def counts_of_methods() -> Iterator[str]:
    for name, method in METHODS.items():
        counts = {
            argument: OWN_COUNTS.get(argument, COUNT)
            for argument, parameter in inspect.signature(method.function).parameters.items()
            if str(parameter.annotation) in ("<class 'int'>", "int | None", "int | tuple[int, int]")
        }
        for form in forms(name):

            def traced(form: Any = form, method: Any = method, **given: Any) -> str:
                call = lambda: method.function(tokens, tokens, tokens, key, **form, **given)  # noqa: E731
                return outcome(lambda: jax.eval_shape(call))

            for together, others, expected in in_one_call(counts, traced):
                # Sums and products of these overflow.
                for kind in (np.uint8, np.int8):
                    narrow = {argument: kind(count) for argument, count in together.items()}
                    if (said := traced(**others, **narrow)) != expected:
                        yield f"{name}({together} as {kind.__name__}, {form | others}): {said}"
            for argument in counts:
                others = OTHER.get(argument, {})
                for value in (*NO_COUNTS, 10**20, 2**63, 2**31, 10**5000):
                    said = traced(**others, **{argument: value})
                    if argument not in said or "Error" not in said or "instead" in said or "\n" in said:
                        yield f"{name}({argument}={shown(value)}, {form | others}): {said}"
                    if isinstance(value, int) and value > 2**30 and "at most 2**31 - 1" not in said:
                        yield f"{name}({argument}=huge, {form | others}): {said}"


def in_one_call(
    counts: dict[str, int], traced: Callable[..., str]
) -> Iterator[tuple[dict[str, int], dict[str, Any], str]]:
    """Yield all counts together if one call accepts them, otherwise each; the others that it needs; and the outcome."""
    if len(counts) > 1 and "Error" not in (expected := traced(**counts)):
        yield counts, {}, expected
    else:
        for argument, count in counts.items():
            others = OTHER.get(argument, {})
            yield {argument: count}, others, traced(**others, **{argument: count})


def counts_of_functions() -> Iterator[str]:
    """Check the functions that take counts alone and return a number or an array."""
    visible: dict[str, Callable[[Any], Any]] = {
        "banded": lambda n: SparsePattern.banded(n(200), [0, 1]).indices,
        "block": lambda n: SparsePattern.block(n(200), n(100)).indices,
        "strided": lambda n: SparsePattern.strided(n(200), n(100)).indices,
        "random": lambda n: SparsePattern.random(key, n(200), n(100)).indices,
        "block_mask": lambda n: SparsePattern.banded(200, [0]).block_mask(n(100)),
        "from_pattern": lambda n: BlockMap.from_pattern(SparsePattern.banded(200, [0]), n(100)).kinds,
        "banded blocks": lambda n: (
            BlockMap.banded(n(1), n(1), block_size=n(100), num_queries=n(200), num_keys=n(250)).kinds
        ),
        "failure_bound": lambda n: failure_bound(n(200), n(2), n(100)),
        "johnson_lindenstrauss_size": lambda n: bounds.johnson_lindenstrauss_size(n(200), 0.5),
        "coreset_size_bound": lambda n: bounds.coreset_size_bound(0.1, radius=1.0, head_dim=n(200), num_keys=n(250)),
        "favor_mse": lambda n: bounds.favor_mse(tokens, tokens, n(200)),
        "sketch_mse": lambda n: bounds.sketch_mse(jnp.eye(250), jnp.ones((250, 1)), n(200), "hadamard"),
        "token_budget": lambda n: token_budget(2**20, n(200), n(200)),
        "pyramid_budgets": lambda n: pyramid_budgets(n(200), n(250)),
        "exp_coefficients": lambda n: exp_coefficients("taylor", n(20)),
        "total_degree": lambda n: total_degree(n(12), n(2)).exponents,
    }
    running = {
        "uniform_sample": {"sample_size": 200}, "mean_pool": {"num_landmarks": 200}, "eva": {"num_chunks": 200},
        "coreset": {"coreset_size": 200, "sinks": 100, "max_length": 250}, "exact": {"max_length": 200},
        "block_linformer": {"slots_per_block": 100, "block_size": 200, "max_length": 250},
        "priority": {"keys_per_query": 200, "max_length": 250},
        "favor": {"num_features": 200}, "rfa": {"num_features": 200},
    }  # fmt: skip
    for name, counts in running.items():

        def sizes(n: Any, name: str = name, counts: dict[str, int] = counts) -> Any:
            made: Any = METHODS[name].running
            summary = made(4, key, **{argument: n(count) for argument, count in counts.items()})
            return [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda: summary.init(4, jnp.float32)))]

        visible[f"running_{name}"] = sizes
    for name, function in visible.items():
        try:
            same = jax.tree.map(np.array_equal, function(np.uint8), function(int))
        except Exception as error:
            yield f"{name} of unsigned counts: {type(error).__name__}: {error}"
        else:
            if not all(jax.tree.leaves(same)):
                yield f"{name} of unsigned counts: another result"


def arrays() -> Iterator[str]:
    few = tokens[:6]
    for name, method in METHODS.items():
        for argument, parameter in inspect.signature(method.function).parameters.items():
            if argument in ("q", "k", "v", "key") or not ("Array" in str(parameter.annotation) or argument in NUMBERS):
                continue
            if argument in ("algorithm", "features"):
                continue
            for form in forms(name):
                for value in (*NO_ARRAYS, *([] if argument in NUMBERS else [3])):
                    if argument == "coefficients" and isinstance(value, list):
                        continue
                    own = {"is_causal": True} if argument == "gate_logits" else form
                    said = outcome(
                        lambda own=own, value=value, argument=argument, method=method: method.function(
                            few, few, few, key, **own, **{argument: value}
                        )
                    )
                    if argument not in said or "Error" not in said or "instead" in said or "\n" in said:
                        yield f"{name}({argument}={shown(value)}, {own}): {said}"


def flags() -> Iterator[str]:
    few = tokens[:6]
    for name, method in METHODS.items():
        for own in list(forms(name))[1:]:
            for value in ("x", 1, None, jnp.array(True), np.array(True)):
                said = outcome(lambda value=value, method=method: method.function(few, few, few, key, is_causal=value))
                if "TypeError: is_causal must be True or False" not in said:
                    yield f"{name}(is_causal={value!r}): {said}"
            said = outcome(
                lambda method=method: jax.eval_shape(
                    lambda causal: method.function(few, few, few, key, is_causal=causal), jnp.array(True)
                )
            )
            if "known when tracing" not in said:
                yield f"{name}(is_causal=traced, {own}): {said}"


if __name__ == "__main__":
    main()
