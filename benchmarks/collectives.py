"""Bytes that devices send each other, counted in compiled programs; this needs no timing and no second machine."""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console

from approx_attention import METHODS, distributed
from approx_attention.evaluation import environment
from benchmarks.hlo import computations
from benchmarks.wire import SETTINGS, Sizes, sent_by

DEVICES, LENGTHS = (2, 4, 8), (4096, 32768)

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
WIDTHS |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}

_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\(.*?\)(.*)"
)
_CALLED = re.compile(r"\b(calls|to_apply|body|(?:branch|true|false)_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def sent_bytes(program: str) -> dict[str, float]:
    r"""Bytes that the busiest device sends in a compiled program, by the kind of collective.

    A ring algorithm is assumed if the collective does not state the pairs of devices: of g devices, each sends
    :math:`\tfrac{g-1}{g}` of the result of an all-gather or all-to-all, and :math:`2\tfrac{g-1}{g}` of an all-reduce.

    Args:
        program: the text of a compiled program, ``jax.jit(f).lower(...).compile().as_text()``.

    Returns:
        The bytes of each kind of collective in it; loops count as often as they run.

    Raises:
        ValueError: a collective within a branch, or within a loop of unknown length.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> program = jax.jit(lambda x: x + 1).lower(jnp.ones(4)).compile().as_text()
        >>> sent_bytes(program)
        {}
    """
    found = re.search(r"\bnum_partitions=(\d+)", program)
    devices = int(found[1]) if found else 1
    entry, bodies = computations(program)

    @functools.cache
    def of(computation: str) -> dict[tuple[str, int], float]:
        """Bytes by kind and device."""
        total: dict[tuple[str, int], float] = collections.defaultdict(float)
        for line in bodies[computation]:
            for how, names in _CALLED.findall(line):
                trips = _TRIPS.search(line) if how == "body" else None
                for name in re.findall(r"[\w.-]+", names):
                    inner = of(name)
                    if inner and not trips and how not in ("calls", "to_apply"):
                        raise ValueError(f"it is not known how often the collectives in {name} run")
                    for key, value in inner.items():
                        total[key] += value * (int(trips[1]) if trips else 1)
            if operation := _COLLECTIVE.search(line):
                shape, kind, start, attributes = operation.groups()
                for device, value in _sent(shape, kind, start, attributes, devices):
                    total[kind, device] += value
        return total

    by_device: dict[int, dict[str, float]] = collections.defaultdict(dict)
    for (kind, device), value in of(entry).items():
        by_device[device][kind] = value
    return max(by_device.values(), key=lambda kinds: sum(kinds.values()), default={})


def _sent(shape: str, kind: str, start: str | None, attributes: str, devices: int) -> Iterable[tuple[int, float]]:
    """Each device that sends, and its bytes."""
    arrays = [
        WIDTHS[dtype] * math.prod(map(int, filter(None, axes.split(","))))
        for dtype, axes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
        if not (start and dtype == "u32" and not axes)  # a handle
    ]
    if start and kind != "all-reduce":  # operands and results
        arrays = arrays[len(arrays) // 2 :]
    size = sum(arrays)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
        assert pairs is not None
        return [(int(source), size) for source, target in re.findall(r"(\d+),(\d+)", pairs[1]) if source != target]
    shares: dict[str, Callable[[int], float]] = {
        "all-gather": lambda g: (g - 1) / g,
        "all-to-all": lambda g: (g - 1) / g,
        "all-reduce": lambda g: 2 * (g - 1) / g,
        "reduce-scatter": lambda g: g - 1,
    }
    groups = _groups(attributes, devices)
    return [(device, shares[kind](len(group)) * size) for group in groups for device in group if len(group) > 1]


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices that take part together, from lists or from the rows of a transposed range."""
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, axes, order = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
        assert shape is not None
        assert axes is not None
        return jnp.arange(math.prod(axes)).reshape(axes).transpose(order).reshape(shape).tolist()
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    groups = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []
    return groups or [list(range(devices))]


def compiled_bytes(method: str, is_causal: bool, sizes: Sizes, **hyperparameters: Any) -> dict[str, float]:
    """Bytes that `distributed.attention` sends for one layer in the forward pass, by kind of collective."""
    mesh = jax.make_mesh((sizes.devices,), ("sequence",), axis_types=(AxisType.Auto,))
    layout = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    tensors = (
        jax.ShapeDtypeStruct((1, sizes.length, sizes.num_kv_heads, width), jnp.float32, sharding=layout)
        for width in (sizes.head_dim, sizes.head_dim, sizes.value_dim)
    )
    call = functools.partial(
        distributed.attention, mesh=mesh, axis="sequence", method=method, is_causal=is_causal, **hyperparameters
    )
    rng = jax.random.key(0) if METHODS[method].capabilities.needs_key else None
    program = jax.jit(functools.partial(call, rng=rng)).lower(*tensors).compile().as_text()
    assert program is not None
    return sent_bytes(program)


def measure() -> dict[str, Any]:
    """Every method and form at every number of devices and every length, with the prediction of the model."""
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    rows, console = [], Console()
    for method, is_causal in SETTINGS:
        for devices in DEVICES:
            for length in LENGTHS:
                sizes, settings = Sizes(length, devices), SETTINGS[method, is_causal]
                measured = compiled_bytes(method, is_causal, sizes, **settings)
                rows.append(
                    {
                        "method": method,
                        "is_causal": is_causal,
                        "devices": devices,
                        "length": length,
                        "bytes": measured,
                        "model_bytes": sent_by(method, is_causal, sizes, **settings),
                    }
                )
            console.print(f"{method} {'causal' if is_causal else 'full'} on {devices}: {sum(measured.values()):.0f} B")
    return {"sizes": {"num_kv_heads": Sizes.num_kv_heads, "head_dim": Sizes.head_dim, "value_dim": Sizes.value_dim},
            "environment": environment(), "rows": rows}  # fmt: skip
