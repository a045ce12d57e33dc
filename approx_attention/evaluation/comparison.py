"""Comparison of methods with exact attention on given tensors: errors, times and cache bytes."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from approx_attention.core import in_float32
from approx_attention.evaluation.arms import MEAN, MOST_SEEDS, WINDOW, Options, build_arms, check_range, method_arm
from approx_attention.evaluation.errors import output_error
from approx_attention.evaluation.problem import Problem
from approx_attention.evaluation.programs import Arm, compile_ahead, compile_arm
from approx_attention.evaluation.real_tokens import key_mask, query_mask
from approx_attention.evaluation.timing import Timing, time_interleaved


@dataclasses.dataclass(frozen=True)
class Comparison:
    r"""Costs and errors of a configuration. Errors are means over seeds, with standard deviations.

    Attributes:
        method: name of the method.
        size: the size of its summary, if it has one.
        held_bytes: cache bytes per key head and sequence, if known.
        compression: bytes of the keys and values over ``held_bytes``.
        compile_seconds: compile time.
        seconds: shortest time of a call, without random projections that calls can share.
        median_seconds: median time of a call.
        speedup: time of the fastest exact configuration over ``seconds``.
        relative_error: `OutputError.relative`.
        relative_error_std: its standard deviation over seeds.
        worst_row_error: `OutputError.worst_row`.
        normalizer_error: root mean square error of the log-normaliser in nats, if there is one.
        far_error: relative error of the part of the sums beyond a local window, for methods with a normaliser. With
            numerators N relative to the exact normaliser, it is the norm of the error of
            :math:`N - N_\mathrm{window}` over the norm of its exact value: 1 for the window alone, 0 for exact
            attention; ``None`` if no key is beyond the window.
        far_error_std: its standard deviation over seeds.
        num_seeds: the number of seeds, 1 for a deterministic method.
        is_exact: whether this is a form of exact attention.
    """

    method: str
    size: int | None
    held_bytes: int | None
    compression: float | None
    compile_seconds: float
    seconds: float
    median_seconds: float
    speedup: float
    relative_error: float
    relative_error_std: float
    worst_row_error: float
    normalizer_error: float | None
    far_error: float | None
    far_error_std: float | None
    num_seeds: int
    is_exact: bool


def compare(
    arms: Iterable[Arm],
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K Dv"],
    *,
    exact: Arm,
    window: Arm,
    num_seeds: int = 3,
    seed: int = 0,
    rounds: int = 5,
    lengths: Any = None,
    mask: Any = None,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_row: Callable[[Comparison], None] = lambda row: None,
) -> list[Comparison]:
    """Measure errors, times and cache bytes of configurations on the given tensors.

    Exact outputs are computed in full float32. Configurations use the matrix-product precision that is set. The default
    on accelerators rounds products, and this rounding is part of all errors, also of exact configurations.

    Args:
        arms: the configurations. The fastest exact one is the baseline of speed, so include every exact form.
        query: ``[B, T, N, D]``.
        key: ``[B, S, K, D]``.
        value: ``[B, S, K, Dv]``.
        exact: the configuration of the exact outputs and log-normalisers.
        window: the configuration of the local window for ``far_error``.
        num_seeds: number of seeds over which the errors of random methods are averaged.
        seed: the first seed.
        rounds: number of timed calls of each configuration, interleaved with the others.
        lengths: real tokens of each sequence, integers ``[B]``. Errors are those of real queries; if T differs from S,
            all queries are real. The functions must hide padded keys themselves.
        mask: true where a key is real, ``[B, S]``, in place of ``lengths`` or with them.
        on_progress: called with the name of the next step, the number of finished steps and their total.
        on_row: called with each `Comparison` when its errors are known, for runs that may be interrupted. Its times
            are then those of the calls that measured the errors, while the next configuration was compiled.

    Returns:
        A `Comparison` per configuration, in order.

    Raises:
        ValueError: no configuration is exact.
        InputError: a method does not support these tensors, or lengths or mask do not match them.

    Example:
        >>> import functools, jax
        >>> from approx_attention import attention
        >>> from approx_attention.evaluation import Arm, compare
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 64, 2, 8)) for i in range(3))
        >>> def arm(method, **kwargs):
        ...     call = lambda q, k, v, rng: attention(q, k, v, method=method, return_residual=True, **kwargs)
        ...     return Arm(method, call, is_exact=method == "exact")
        >>> exact, window, pool = arm("exact"), arm("local", window_size=8), arm("mean_pool", num_landmarks=64)
        >>> rows = compare([exact, window, pool], q, k, v, exact=exact, window=window)
        >>> [row.method for row in rows], rows[1].far_error, rows[2].relative_error < 1e-5
        (['exact', 'local', 'mean_pool'], 1.0, True)
    """
    arms = list(arms)
    if not any(arm.is_exact for arm in arms):
        raise ValueError("compare needs an exact configuration, the baseline of speed")
    keys_rngs = [jax.random.key(seed + i) for i in range(num_seeds)]
    real = query_mask(key_mask(key.shape, lengths=lengths, mask=mask), query.shape[1])

    def real_rows(result: tuple[Array, Array | None]) -> Any:
        return result if real is None else tuple(None if x is None else x[real] for x in result)

    steps = len(arms) + 2
    on_progress("exact output", 0, steps)
    # Exact outputs are in full precision. Configurations use the precision that the user has set: their errors and
    # times come from the same program.
    with in_float32():
        exact_program, window_program = (compile_arm(arm, query, key, value)[0] for arm in (exact, window))
    exact_out, exact_lse = real_rows(exact_program(query, key, value, exact.draw(keys_rngs[0])))
    if exact_lse is None:
        raise ValueError("the exact configuration must also return log-normalisers")
    window_out, window_lse = real_rows(window_program(query, key, value, window.draw(keys_rngs[0])))
    far_norm, exact_norm = _far_norms(exact_out, exact_lse, window_out, window_lse)
    # Anything smaller is rounding error, relative to which an error is meaningless.
    far_norm = far_norm if far_norm > 1e-5 * exact_norm else None

    kv_bytes = key.shape[1] * (key.shape[-1] * key.dtype.itemsize + value.shape[-1] * value.dtype.itemsize)
    errors: list[list[tuple[float | None, ...]]] = []
    first_timings: list[Timing] = []
    compiled: list[tuple[Callable[..., Any], float]] = []

    def comparison(i: int, timings: list[Timing]) -> Comparison:
        arm, timing = arms[i], timings[i]
        relative, worst_row, normalizer, far = zip(*errors[i], strict=True)
        baseline = min((t.least for arm, t in zip(arms, timings, strict=False) if arm.is_exact), default=math.nan)
        return Comparison(
            method=arm.method,
            size=arm.size,
            held_bytes=arm.held_bytes,
            compression=kv_bytes / arm.held_bytes if arm.held_bytes else None,
            compile_seconds=compiled[i][1],
            seconds=timing.least,
            median_seconds=timing.median,
            speedup=baseline / timing.least,
            relative_error=statistics.fmean(relative),
            relative_error_std=float(np.std(relative)),
            worst_row_error=statistics.fmean(worst_row),
            normalizer_error=None if normalizer[0] is None else statistics.fmean(normalizer),
            far_error=None if far[0] is None else statistics.fmean(far),
            far_error_std=None if far[0] is None else float(np.std(far)),
            num_seeds=len(errors[i]),
            is_exact=arm.is_exact,
        )

    programs = compile_ahead(arms, query, key, value)
    for i, arm in enumerate(arms):
        on_progress(arm.label, i + 1, steps)
        compiled.append(next(programs))
        function, seconds = compiled[i][0], []
        errors.append([])
        for rng in keys_rngs if arm.is_random else keys_rngs[:1]:
            random = jax.block_until_ready(arm.draw(rng))
            start = time.perf_counter()
            result = jax.block_until_ready(function(query, key, value, random))
            seconds.append(time.perf_counter() - start)
            measured = _errors(*real_rows(result), exact_out, exact_lse, far_norm)
            errors[-1].append(tuple(None if x is None else float(x) for x in measured))
        first_timings.append(Timing(min(seconds), statistics.median(seconds)))
        on_row(comparison(i, first_timings))

    on_progress("timing", steps - 1, steps)
    calls = {
        str(i): functools.partial(compiled[i][0], query, key, value, arm.draw(keys_rngs[0]))
        for i, arm in enumerate(arms)
    }
    timings = list(time_interleaved(calls, rounds=rounds).values())
    on_progress("done", steps, steps)
    return [comparison(i, timings) for i in range(len(arms))]


# Compiled, because each operation on outputs of another shape would be a program.
@jax.jit
def _errors(
    out: Array, lse: Array | None, exact_out: Array, exact_lse: Array, far_norm: Array | None
) -> tuple[Array | None, ...]:
    """The relative, worst-row, normaliser and far errors of a `Comparison`."""
    relative, worst_row = output_error(out, exact_out)
    if lse is None:
        return relative, worst_row, None, None
    normalizer = jnp.sqrt(jnp.mean((lse - exact_lse) ** 2))
    if far_norm is None:
        return relative, worst_row, normalizer, None
    far = jnp.linalg.norm(_flat(out, lse - exact_lse) - _flat(exact_out)) / far_norm
    return relative, worst_row, normalizer, far


@jax.jit
def _far_norms(exact_out: Array, exact_lse: Array, window_out: Array, window_lse: Array) -> tuple[Array, Array]:
    """The norms of the sums over keys beyond the window, relative to the exact normaliser, and of the exact outputs."""
    exact = _flat(exact_out)
    # The exact output minus the window's share.
    return jnp.linalg.norm(exact - _flat(window_out, window_lse - exact_lse)), jnp.linalg.norm(exact)


def _flat(out: Array, log_weight: Array | None = None) -> Array:
    """Flatten outputs, each times the exponential of its log-weight; with log-normalisers these are numerators."""
    out = out.astype(jnp.float32)
    return (out if log_weight is None else out * jnp.exp(log_weight)[..., None]).ravel()


def run_comparison(
    problem: Problem,
    methods: Iterable[str],
    budgets: Sequence[int],
    *,
    options: Options | None = None,
    window_size: int = 128,
    num_seeds: int = 3,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_row: Callable[[Comparison], None] = lambda row: None,
) -> list[Comparison]:
    """Compare methods at several sizes with exact attention and the baselines, by `compare`.

    Methods do not see the padding of a `Problem`, and errors are those of real queries.

    Args:
        problem: the attention to approximate.
        methods: names in `METHODS`; the baselines are added.
        budgets: sizes of summaries for methods whose usual size is 256; other sizes scale in proportion.
        options: hyper-parameters other than the size, by the name of the method.
        window_size: the window of the far error.
        num_seeds: the number of PRNG keys of random methods.
        seed: the seed of these keys.
        on_progress: as in `compare`.
        on_row: as in `compare`.

    Returns:
        A `Comparison` for each configuration, the exact forms first.

    Raises:
        InputError: a method is unknown or does not support the task or an option, or a number is out of range.
    """
    check_range("num_seeds", num_seeds, 1, MOST_SEEDS)
    arms = build_arms(problem, methods, budgets, options)
    return compare(
        arms,
        *problem.tensors,
        exact=arms[0],
        window=method_arm(problem, WINDOW, min(window_size, problem.tensors.key.shape[1])),
        num_seeds=num_seeds,
        seed=seed,
        mask=problem.kv_mask,
        on_progress=on_progress,
        on_row=on_row,
    )


def best_rows(rows: Sequence[Any]) -> set[int]:
    """Indices of the approximations on the frontier: no other is both faster and closer to exact attention."""
    approximations = [i for i, row in enumerate(rows) if not row.is_exact and math.isfinite(row.relative_error)]

    def beaten(i: int) -> bool:
        return any(
            rows[j].seconds <= rows[i].seconds
            and rows[j].relative_error <= rows[i].relative_error
            and (rows[j].seconds, rows[j].relative_error) != (rows[i].seconds, rows[i].relative_error)
            for j in approximations
        )

    return {i for i in approximations if not beaten(i)}


def no_better_than_mean(rows: Sequence[Any]) -> set[int]:
    """Indices of the approximations whose relative error is not below that of the trivial baseline ``mean_value``."""
    least = min((row.relative_error for row in rows if row.method == MEAN), default=math.inf)
    return {
        i
        for i, row in enumerate(rows)
        if not (row.is_exact or row.method == MEAN or row.relative_error < least or math.isnan(least))
    }
