"""Files of runs: JSON that may have been damaged, and locks that keep two processes out of one directory."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import pydantic

from approx_attention.evaluation import write_atomically
from experiments.config import ConfigError, adapter_of, first_fault


def read_json(path: pathlib.Path, kind: Any, remedy: str) -> Any:
    """A mapping from a JSON file.

    Args:
        path: the file.
        kind: the type that it must have the parts of, as pydantic reads it.
        remedy: what happens once the file is removed.

    Raises:
        ConfigError: the file cannot be read, is no JSON, or lacks a part.
    """
    try:
        content = json.loads(path.read_bytes())
        adapter_of(kind).validate_python(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; remove it, and {remedy}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path} is damaged; remove it, and {remedy} ({first_fault(error, 'its content')})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged; remove it, and {remedy} ({error})") from None
    return content


# Texts stand first, so that what looks like a number in one is left alone.
_NOT_IN_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')
_INSTEAD = {"NaN": "null", "Infinity": "1e999", "-Infinity": "-1e999"}


def as_line(facts: Any) -> str:
    """Facts as one line of JSON that any parser reads, which Python's own NaN and Infinity are not.

    NaN, which means that there is no such number, is null. An infinite number, which is one, is 1e999: greater than any
    float64, so it is read as infinity.
    """
    return _NOT_IN_JSON.sub(lambda found: _INSTEAD.get(found[0], found[0]), json.dumps(facts)) + "\n"


def write_json(path: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes facts as JSON, whole or not at all."""
    text = json.dumps(facts, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def locked(lock: pathlib.Path, what: pathlib.Path, *, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes out of what a file stands for; its folder is made.

    The system lets go of the lock when the process ends, however it ends, so the file may stay.

    Args:
        lock: the file that is locked.
        what: what it stands for, for messages.
        patience: seconds to wait for another process.

    Raises:
        ConfigError: another process is at work there, or the file cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+", encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:  # ValueError: NUL in a path
        raise ConfigError(
            f"{str(what)!r} cannot be made: {getattr(error, 'strerror', None) or error}; choose --out"
        ) from None
    with file:
        try:
            _lock(file, time.monotonic() + patience)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip()
            named = f" (process {holder})" if holder.isdigit() else ""
            raise ConfigError(
                f"{what} is in use by another run{named}; wait until that ends, or choose another --out"
            ) from None
        except OSError as error:
            raise ConfigError(f"{lock} cannot be locked: {error.strerror}; choose --out on another disk") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _lock(file: IO[str], until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)
