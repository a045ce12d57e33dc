"""The configurations to compare: exact attention, the baselines, and each method at each size."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention.api import attention
from approx_attention.core import InputError, check_flag
from approx_attention.evaluation.cache_bytes import bytes_of, token_bytes
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.programs import Arm
from approx_attention.registry import METHODS, HeadMethods, Method, bind, get_method

# Exact forms that store all T x S logits are left out of the baseline if the logits take more bytes than this.
LARGEST_LOGITS = 2**31
# The exact method, in each of its forms.
EXACT = next(name for name, method in METHODS.items() if method.is_exact)
# The trivial baseline, and the window beyond which keys count for the far error.
MEAN, WINDOW = "mean_value", "local"
# Always in the comparison: a useful method must beat these.
BASELINES = (MEAN, WINDOW, "uniform_sample")
# A larger budget is a mistake: its features would fill the memory.
LARGEST_BUDGET = 2**20
# The largest numbers of seeds and of rounds of timing.
MOST_SEEDS = 1000
# The budget at which every method has its usual size. It is the size of many methods; others count blocks or slots per
# block.
USUAL_BUDGET = 256
# Hyper-parameters by the name of the method.
Options = Mapping[str, Mapping[str, Any]]
# Arguments that all methods share, and how to set them on the command line and in Python.
COMMON = {
    **{name: "FILE, or tensors in Python" for name in ("query", "key", "value")},
    "mask": "--mask or --lengths, or mask in Python",
    "key_value_seq_lengths": "--lengths, or lengths in Python",
    "query_seq_lengths": "--lengths, or lengths in Python",
    "is_causal": "--causal, or is_causal in Python",
    "scale": "--scale, or scale in Python",
    "rng": "--seed, or seed in Python",
    "method": "--methods, or methods in Python",
    "return_residual": "nothing: it is always requested",
}


def default_methods(is_causal: bool) -> list[str]:
    """The methods to compare by default: all that cost less than exact attention and support the task.

    Args:
        is_causal: whether to leave out methods without a causal form.

    Returns:
        Names in `METHODS`.

    Example:
        >>> from approx_attention.evaluation import default_methods
        >>> [name in default_methods(True) for name in ("favor", "nystrom", "exact")]
        [True, False, False]
    """
    return [
        name
        for name, method in METHODS.items()
        if method.capabilities.subquadratic and (method.capabilities.causal or not is_causal)
    ]


def build_arms(
    problem: Problem, methods: Iterable[str], budgets: Sequence[int], options: Options | None = None
) -> list[Arm]:
    """Make the configurations to compare: every exact form, the baselines, and each method at each size.

    At a budget of 256 every method has its usual size; sizes scale in proportion to the budget. For methods that are
    exact at the number of keys, sizes are at most that.

    Args:
        problem: the attention to approximate.
        methods: names in `METHODS`; the baselines are added.
        budgets: sizes of summaries, for methods whose usual size is 256.
        options: hyper-parameters other than the size, by the name of the method.

    Returns:
        An `Arm` per configuration.

    Raises:
        InputError: a method is unknown or does not support the task, or an option, or a budget is out of range.
    """
    for budget in budgets:
        check_range("a budget", budget, 1, LARGEST_BUDGET)
    names = list(dict.fromkeys((*BASELINES, *methods)))
    options = check_options(names, options)
    arms = exact_arms(problem)
    num_keys = problem.tensors.key.shape[1]
    for name in names:
        method = check_method(name, problem.is_causal)
        if name == EXACT:
            continue
        # A method that is exact at the number of keys has no larger size.
        greatest = num_keys if method.capabilities.exact_limit else max(budgets)
        proposed = {max(1, round(budget * method.usual_size / USUAL_BUDGET)) for budget in budgets}
        sizes = sorted({min(size, greatest) for size in proposed}) if method.size else [None]
        arms += [method_arm(problem, name, size, options.get(name, {})) for size in sizes]
    return arms


def method_arm(problem: Problem, name: str, size: int | None, options: Mapping[str, Any] | None = None) -> Arm:
    """Make the configuration of one method at one size.

    Args:
        problem: the attention to approximate.
        name: a name in `METHODS`.
        size: the size of its summary; None for the default, or for a method without a size.
        options: further hyper-parameters of the method.

    Returns:
        The `Arm`, with its cache bytes.

    Raises:
        InputError: the method does not support an option.
    """
    # The closures below must not keep the tensors alive.
    tensors, is_causal, scale, _ = problem
    method, mask = get_method(name), problem.mask
    hyperparameters: dict[str, Any] = dict(options or {}) | (
        {} if method.size is None or size is None else {method.size: size}
    )
    num_kv_heads, head_dim = tensors.key.shape[2:]
    with_state, is_random = method.capabilities.normalizer, method.capabilities.needs_key
    given = ", ".join(f"{key}={value!r}" for key, value in (options or {}).items())
    try:
        bound = bind(name, hyperparameters)
    except (TypeError, NotImplementedError) as error:
        raise InputError(f"{name} does not support {given}: {error}") from error

    def draw(rng: Array) -> Any:
        projections = bound.draw(rng, num_kv_heads, head_dim) if is_random else {}
        return projections if projections.keys() - {"key"} else rng

    def function(query: Array, key: Array, value: Array, random: Any) -> tuple[Array, Array | None]:
        drawn = isinstance(random, dict)
        result = attention(
            query,
            key,
            value,
            mask=mask,
            method=bound,
            rng=random if is_random and not drawn else None,
            per_head=random if drawn else None,
            scale=scale,
            is_causal=is_causal,
            return_residual=with_state,
        )
        return result if with_state else (result, None)

    if options:
        try:
            jax.eval_shape(function, *tensors, jax.random.key(0))
        except (TypeError, ValueError, NotImplementedError, OverflowError) as error:
            raise InputError(f"{name} does not support {given}: {error}") from error
    return Arm(
        method=name,
        function=function,
        size=size,
        held_bytes=bytes_of(bound, tensors, is_causal=is_causal),
        is_random=is_random,
        draw=draw,
    )


def policy_arm(problem: Problem, methods: HeadMethods) -> Arm:
    """Make the configuration with one method per key head.

    Args:
        problem: the tensors and options of a layer.
        methods: the methods of its key heads.

    Returns:
        The configuration ``"policy"``, without log-normalisers.
    """
    (_, is_causal, scale, _), mask, is_random = problem, problem.mask, methods.is_random

    def function(query: Array, key: Array, value: Array, rng: Array) -> tuple[Array, None]:
        options: Any = {"mask": mask, "scale": scale, "is_causal": is_causal, "rng": rng if is_random else None}
        return attention(query, key, value, method=methods, **options), None

    return Arm(method="policy", function=function, is_random=is_random)


def exact_arms(problem: Problem) -> list[Arm]:
    """Make every form of exact attention for which this machine has memory, the library's default first."""
    (query, key, value), is_causal, scale, _ = problem
    mask, num_bytes = problem.mask, token_bytes(problem.tensors)
    logits = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1]

    def ours(implementation: str | None) -> Callable[..., tuple[Array, Array | None]]:
        return lambda query, key, value, rng: attention(
            query,
            key,
            value,
            mask=mask,
            method=EXACT,
            scale=scale,
            is_causal=is_causal,
            return_residual=True,
            implementation=implementation,
        )

    forms = {EXACT: ours(None)}
    if logits <= LARGEST_LOGITS:
        forms[f"{EXACT} dense"] = ours("dense")
        # The device of the tensors decides: in a machine with a GPU they may be on the CPU.
        if any(device.platform == "gpu" for device in jnp.asarray(query).devices()):
            head_dim = query.shape[-1]
            fused = mask is None and head_dim == value.shape[-1] and head_dim % 8 == 0 and head_dim <= 128
            forms[f"{EXACT} bfloat16"] = lambda query, key, value, rng: (
                attention(
                    *(x.astype(jnp.bfloat16) for x in (query, key, value)),
                    mask=mask,
                    method=EXACT,
                    scale=scale,
                    is_causal=is_causal,
                    implementation="cudnn" if fused else None,
                ),
                None,
            )
        if value.shape[-1] == key.shape[-1]:
            forms[f"{EXACT} jax.nn"] = lambda query, key, value, rng: (
                jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, is_causal=is_causal),
                None,
            )
    return [Arm(name, function, None, num_bytes, is_exact=True) for name, function in forms.items()]


def check_range(name: str, value: int, least: int, most: int) -> None:
    """Raise ``InputError`` unless the value is an integer in this range."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= most:
        limit = f"least {least}" if value < least else f"most {most}"
        raise InputError(f"{name} must be at {limit}, got {value}")


def check_positive(name: str, value: float | None) -> None:
    """Raise ``InputError`` unless the value is a positive number or None."""
    if value is not None and not (isinstance(value, int | float) and 0 < value < 1e30):
        raise InputError(f"{name} must be a positive number, got {value!r}")


def check_method(name: str, is_causal: bool) -> Method:
    """The method with this name.

    Raises:
        InputError: the method is unknown, or has no causal form although one is requested.
    """
    try:
        method = get_method(name)
    except ValueError as error:
        raise InputError(str(error)) from None
    if check_flag("is_causal", is_causal) and not method.capabilities.causal:
        raise InputError(f"method {name!r} has no causal form; leave out the method or --causal")
    return method


def check_options(names: Iterable[str], options: Options | None) -> Options:
    """Check options of methods.

    Args:
        names: the methods that are compared.
        options: hyper-parameters by the name of the method; None stands for no options.

    Returns:
        The options.

    Raises:
        InputError: options of a method that is not compared, or the size, or an argument that all methods share.
    """
    options, names = options or {}, [name for name in names if name != EXACT]
    for name, own in options.items():
        if name not in names:
            raise InputError(f"options must be for one of the methods {', '.join(names)}; got some for {name!r}")
        if get_method(name).size in own:
            raise InputError(f"{get_method(name).size} of {name} is its size, which cannot be an option: give a budget")
        for option in COMMON.keys() & own:
            raise InputError(f"{option} is common to all methods, not an option of {name}: give {COMMON[option]}")
    return options
