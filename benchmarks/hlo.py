"""The text of a compiled program (an optimised HLO module): its computations, loops and sequential operations."""

import collections
import dataclasses
import functools
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
# The shape in front of an operation's name may be a tuple with layouts and comments.
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:body|to_apply|(?:branch|true|false)_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')

# Operations that start no kernel.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"while", "conditional", "call"}


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a program.

    Attributes:
        depth: the number of loops around it.
        trips: its iterations each time it is reached, or None if the program does not state them.
        operations: the sequential operations of one iteration.
    """

    depth: int
    trips: int | None
    operations: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """The counts of a program.

    Attributes:
        operations: the sequential operations if every loop runs all its iterations; about the number of kernel launches
            on a GPU. A loop of unknown length counts once, and then this is a lower bound.
        loops: all loops, outer ones first.
        custom_calls: the number of occurrences of each target in the text.
    """

    operations: int
    loops: tuple[Loop, ...]
    custom_calls: dict[str, int]


def computations(program: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry, and the lines of each computation.

    Raises:
        ValueError: the text is not that of a compiled program.
    """
    bodies: dict[str, list[str]] = {}
    entry = body = None
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            body = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif body is not None:
            body.append(line)
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return entry, bodies


def counted(program: str) -> Counts:
    """Count sequential operations, loops and custom calls; a condition counts as its longest branch.

    Args:
        program: the text of a compiled program, ``jax.jit(f).lower(...).compile().as_text()``.

    Raises:
        ValueError: the text is not that of a compiled program.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> program = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: jnp.sin(x), x)).lower(1.0).compile()
        >>> [(loop.depth, loop.trips) for loop in counted(program.as_text()).loops]
        [(0, 9)]
    """
    entry, bodies = computations(program)

    @functools.cache
    def of(computation: str) -> tuple[int, tuple[Loop, ...]]:
        operations, loops = 0, []
        for line in bodies.get(computation, []):
            found = _OPERATION.match(line)
            if found is None:
                continue
            kind = found[1]
            operations += kind not in _FREE
            if kind not in ("while", "conditional", "call"):
                continue
            called = [name for names in _CALLED.findall(line) for name in re.findall(r"[\w.-]+", names)]
            inside = [of(name) for name in called]
            if kind == "while":
                (once, deeper), trips = inside[0], _TRIPS.search(line)
                times = int(trips[1]) if trips else None
                loops.append(Loop(0, times, once))
                loops += [dataclasses.replace(loop, depth=loop.depth + 1) for loop in deeper]
                operations += once * (1 if times is None else times)
            else:
                operations += max((longest for longest, _ in inside), default=0)
                loops += [loop for _, within in inside for loop in within]
        return operations, tuple(loops)

    operations, loops = of(entry)
    return Counts(operations, loops, dict(collections.Counter(_TARGET.findall(program))))
