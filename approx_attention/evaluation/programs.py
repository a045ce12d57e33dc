"""Compiled programs of configurations."""

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
from jax import Array

from approx_attention.core import InputError


def _as_it_is(rng: Array) -> Array:
    """The PRNG key itself: the program samples its random projections."""
    return rng


@dataclasses.dataclass(frozen=True)
class Arm:
    """One configuration of one method, for a comparison with exact attention.

    Attributes:
        method: name of the method.
        function: ``(query, key, value, rng) -> (out, lse)`` over ``[B, T, N, D]``, with ``lse [B, T, N]`` or ``None``.
            With ``draw`` its last argument is ``draw(rng)``.
        size: the size of its summary, if it has one.
        held_bytes: cache bytes per key head and sequence, if known.
        is_random: whether it depends on ``rng``.
        is_exact: whether it is a form of exact attention; the fastest one is the baseline of speed.
        draw: ``rng -> random``, random projections that calls can share, sampled outside of the program.
    """

    method: str
    function: Callable[..., tuple[Array, Array | None]]
    size: int | None = None
    held_bytes: int | None = None
    is_random: bool = False
    is_exact: bool = False
    draw: Callable[[Array], Any] = _as_it_is

    @property
    def label(self) -> str:
        """The method with its size."""
        return self.method if self.size is None else f"{self.method} {self.size}"


# A compiled function, and the time to trace and compile it in seconds.
Program = tuple[Callable[..., Any], float]
_Programs = dict[bytes, "Future[Program]"]
_shared_programs: contextvars.ContextVar[_Programs | None] = contextvars.ContextVar("shared_programs", default=None)
# Each program maps memory, and Linux limits the number of maps of a process.
_MOST_SHARED = 256


@contextlib.contextmanager
def shared_programs(programs: _Programs) -> Iterator[None]:
    """Context in which equal programs are compiled once, for example those of layers with equal shapes.

    Args:
        programs: the compiled programs so far. Functions that close over different arrays must not share them.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import Arm, compile_arm, shared_programs
        >>> x = jnp.ones((1, 4, 1, 2))
        >>> with shared_programs({}):
        ...     made = [compile_arm(Arm("mine", lambda q, k, v, rng: (v, None)), x, x, x)[0] for _ in range(2)]
        >>> made[0] is made[1]
        True
    """
    token = _shared_programs.set(programs)
    try:
        yield
    finally:
        _shared_programs.reset(token)


def compile_arm(arm: Arm, query: Array, key: Array, value: Array) -> Program:
    """Compile a configuration for given tensors.

    Args:
        arm: the configuration.
        query: ``[B, T, N, D]``.
        key: ``[B, S, K, D]``.
        value: ``[B, S, K, Dv]``.

    Returns:
        The program ``(query, key, value, arm.draw(rng)) -> (out, lse)``, and the seconds to trace and compile it.

    Raises:
        InputError: the method does not support the tensors.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return _started(arm, query, key, value, pool).result()


def compile_ahead(arms: Iterable[Arm], query: Array, key: Array, value: Array) -> Iterator[Program]:
    """Compile configurations in order; trace the next while one is compiled.

    Args:
        arms: the configurations.
        query: ``[B, T, N, D]``.
        key: ``[B, S, K, D]``.
        value: ``[B, S, K, Dv]``.

    Yields:
        What `compile_arm` returns for each configuration, in the same order.

    Raises:
        InputError: a method does not support the tensors; raised when its program is requested.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting: Future[Program] | None = None
        for arm in arms:
            current, waiting = waiting, _started(arm, query, key, value, pool)
            if current is not None:
                yield current.result()
        if waiting is not None:
            yield waiting.result()


def _started(arm: Arm, query: Array, key: Array, value: Array, pool: concurrent.futures.Executor) -> "Future[Program]":
    """Trace a configuration and compile it in the background; errors are raised when its program is requested."""
    start = time.perf_counter()
    shared = _shared_programs.get()

    def failed(error: Exception) -> "Future[Program]":
        future: Future[Program] = Future()
        future.set_exception(error)
        return future

    try:
        # Traced in the thread of the caller, whose JAX options apply to the program.
        lowered = jax.jit(arm.function).lower(query, key, value, jax.eval_shape(arm.draw, jax.random.key(0)))
    except (ValueError, NotImplementedError) as error:
        refusal = InputError(f"{arm.label} does not support these tensors: {error}")
        refusal.__cause__ = error
        return failed(refusal)
    except Exception as error:
        return failed(error)
    # Two functions are the same computation if the texts of their programs are equal.
    same = b"" if shared is None else hashlib.sha256(lowered.as_text().encode()).digest()
    if shared is not None and same in shared:
        return shared[same]
    traced = time.perf_counter() - start

    def compiled() -> Program:
        start = time.perf_counter()
        return lowered.compile(), traced + time.perf_counter() - start

    future = pool.submit(compiled)
    if shared is not None:
        if len(shared) == _MOST_SHARED:
            del shared[next(iter(shared))]
        shared[same] = future
    return future
