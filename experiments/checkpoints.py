"""Checkpoints of a training: saved with checksums, and gone on from where they are whole and of the same training."""

import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
import signal
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from experiments.config import ConfigError, Count, NonNegative, as_plain, checked, departures
from experiments.run_files import read_json, write_json


@dataclasses.dataclass(frozen=True)
class Saved:
    """The facts next to the files of a checkpoint: of which training and step they are, and their checksums."""

    settings: dict[str, Any]
    step: Count
    sha256: dict[str, str]


_SAVED = "saved.json"


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SAVED)


def _sum(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_files(folder: pathlib.Path, config: Any) -> None:
    """Raises ``ValueError`` unless a checkpoint is whole, and one of this training."""
    if not _files(folder):
        raise ValueError("it is empty")
    if not (folder / _SAVED).exists():  # of an older version, or killed in the moment before
        return
    saved = read_json(folder / _SAVED, Saved, "the checkpoint is used as it is")
    if found := departures(config, saved["settings"], "its settings"):
        raise ValueError(f"it is of other settings: {'; '.join(found)}")
    if folder.name != str(saved["step"]):
        raise ValueError(f"it is of step {saved['step']}")
    for name, expected in saved["sha256"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if _sum(folder / name) != expected:
            raise ValueError(f"the checksum of {name} is wrong")


def _put_damaged_aside(directory: pathlib.Path, faults: Mapping[int, str], rest: Iterable[int]) -> None:
    """Moves checkpoints that cannot be used out of the way, where there is another to go on from.

    Raises:
        ConfigError: there is none.
    """
    before = max(rest, default=None)
    if faults and before is None:
        said = "; ".join(f"checkpoint {step}: {said}" for step, said in faults.items())
        raise ConfigError(f"{directory} is damaged; remove it, and training begins anew ({said})")
    for step, said in faults.items():
        aside = tempfile.mkdtemp(prefix=f"damaged-{step}-", dir=directory.parent)
        (directory / str(step)).replace(aside)
        warnings.warn(
            f"{directory}: checkpoint {step} cannot be read and is put aside in {pathlib.Path(aside).name}, training "
            f"goes on from checkpoint {before} ({said})",
            stacklevel=2,
        )


def open_checkpoints(directory: pathlib.Path, config: Any) -> ocp.CheckpointManager:
    """The checkpoints of a training, without those that are damaged.

    Raises:
        ConfigError: there are checkpoints, and none can be used.
    """
    # Before orbax sees them: it notices some damage only, and prints tracebacks of its threads over it.
    steps = [path for path in directory.glob("*") if path.name.isdigit() and path.is_dir()]
    faults: dict[int, str] = {}
    for folder in steps:
        try:
            _check_files(folder, config)
        except (OSError, ValueError) as error:
            faults[int(folder.name)] = brief(error)
    _put_damaged_aside(directory, faults, {int(folder.name) for folder in steps} - faults.keys())
    for broken_off in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(broken_off, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(directory.resolve(), options=options)
    except OSError as error:
        raise ConfigError(f"{directory} is damaged; remove it, and training begins anew ({brief(error)})") from error


def save(
    manager: ocp.CheckpointManager,
    step: int,
    config: Any,
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    seconds: float,
) -> None:
    """Saves a model and its optimizer after a step, with the settings of their training."""
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(_state(model, optimizer)), clock=ocp.args.JsonSave({"seconds": seconds})
    )
    with _interrupts_after():
        manager.save(step, args=items)
        manager.wait_until_finished()
        folder = pathlib.Path(manager.directory) / str(step)
        sums = {file.relative_to(folder).as_posix(): _sum(file) for file in _files(folder)}
        write_json(folder / _SAVED, {"settings": as_plain(config), "step": step, "sha256": sums})


@contextlib.contextmanager
def _interrupts_after() -> Iterator[None]:
    """Lets an interrupt wait: threads of orbax that are broken off print their tracebacks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)


def restore(manager: ocp.CheckpointManager, model: nnx.Module, optimizer: nnx.Optimizer) -> tuple[int, float]:
    """Loads the last checkpoint that can be read, if there is one; returns its step and the seconds spent up to it.

    Raises:
        ConfigError: there are checkpoints, and none can be read.
    """
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _state(model, optimizer))
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(template), clock=ocp.args.JsonRestore())
    faults: dict[int, str] = {}
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            with _interrupts_after():
                items: Any = manager.restore(step, args=wanted)
            seconds = checked(NonNegative, items.clock["seconds"], "'seconds'")
        except Exception as error:  # orbax lets through the errors of many parts
            faults[step] = brief(error)
            continue
        break
    _put_damaged_aside(pathlib.Path(manager.directory), faults, set(steps) - faults.keys())
    if not steps:
        return 0, 0.0
    if faults:
        manager.reload()
    for part, name in ((model, "model"), (optimizer, "optimizer")):
        state = nnx.state(part)
        nnx.replace_by_pure_dict(state, items.state[name])
        nnx.update(part, state)
    return step, seconds


def _state(model: nnx.Module, optimizer: nnx.Optimizer) -> dict[str, Any]:
    return {"model": nnx.to_pure_dict(nnx.state(model)), "optimizer": nnx.to_pure_dict(nnx.state(optimizer))}


def brief(error: Exception) -> str:
    """What an error says, on one line of some length."""
    return textwrap.shorten(str(error) or type(error).__name__, 200)
