"""Output of the command line, which may fail without losing results, progress, and interrupts."""

import contextlib
import errno
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, as KeyboardInterrupt is on SIGINT."""


class Output:
    """Standard output or error. Text that cannot be written is dropped, and the reason is stored in ``error``."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: str | None = None
        self._is_lost = stream is None

    def write(self, text: str) -> int:
        """Write text, with question marks in place of characters that the stream cannot encode."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try(lambda: self.stream.write(text.encode(encoding, "replace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try(lambda: self.stream.flush())

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        # Binary writers would bypass this.
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self.stream, name)

    def _try(self, action: Callable[[], Any]) -> None:
        if self._is_lost:
            return
        try:
            action()
        except (OSError, ValueError) as error:
            self._is_lost = True
            # A closed pipe is not an error.
            if getattr(error, "errno", None) != errno.EPIPE:
                self.error = getattr(error, "strerror", None) or str(error)
            # The rest of the buffers would fail again when Python exits.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def outputs() -> Iterator[Output]:
    """Context in which standard output and error are `Output` objects; yields standard output."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(out), Output(err)
    try:
        yield sys.stdout
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = out, err


# The exceptions of terminating signals, and Python's default handlers.
_ENDS: dict[int, tuple[type[KeyboardInterrupt], Any]] = {
    signal.SIGINT: (KeyboardInterrupt, signal.default_int_handler),
    signal.SIGTERM: (Terminated, signal.SIG_DFL),
}
# Signals received within `terminable`. Python drops an exception that is raised during garbage collection.
_heard: list[type[KeyboardInterrupt]] = []


@contextlib.contextmanager
def terminable() -> Iterator[Callable[[], None]]:
    """Context in which SIGINT and SIGTERM raise, unless something else handles them.

    They are ignored while an earlier one is handled, so that results are written. In other threads than the main one
    the context does nothing.

    Yields:
        A function after which they are ignored.

    Raises:
        KeyboardInterrupt: SIGINT.
        Terminated: SIGTERM, also a ``KeyboardInterrupt``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    is_over = False

    def end(number: int, frame: Any) -> None:
        if is_over or _is_ending(sys.exc_info()[1]):
            return
        _heard.append(_ENDS[number][0])
        raise _heard[-1]

    def ignore() -> None:
        nonlocal is_over
        is_over = True

    def tell(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            tell_before(dropped)

    own = [number for number, (_, usual) in _ENDS.items() if signal.getsignal(number) == usual]
    tell_before, sys.unraisablehook = sys.unraisablehook, tell
    for number in own:
        signal.signal(number, end)
    try:
        yield ignore
    finally:
        for number in own:
            signal.signal(number, _ENDS[number][1])
        sys.unraisablehook = tell_before
        _heard.clear()


def _is_ending(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, KeyboardInterrupt) or _is_ending(error.__context__))


def end_if_asked() -> None:
    """Raise the exception of a signal that Python has dropped."""
    if _heard:
        raise _heard[-1]


def say(*things: Any) -> None:
    """Print texts and tables without parsing markup in names."""
    console = Console(width=None if sys.stdout.isatty() else 150, markup=False, emoji=False, highlight=False)
    for thing in things:
        console.print(thing)


@contextlib.contextmanager
def progress(prefix: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on standard error: a bar on a terminal, elsewhere one line per step."""
    if not sys.stderr.isatty():
        begun = time.monotonic()

        def line(label: str, done: int, total: int) -> None:
            end_if_asked()
            if done < total:
                sys.stderr.write(f"{done + 1}/{total} {prefix}{label} ({time.monotonic() - begun:.0f} s)\n")
                sys.stderr.flush()

        yield line
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(f"{prefix}starting", total=None)

        def move(label: str, done: int, total: int) -> None:
            end_if_asked()
            bars.update(task, description=prefix + label, completed=done, total=total)

        yield move


@contextlib.contextmanager
def only_holder(directory: pathlib.Path) -> Iterator[bool]:
    """Lock a directory in this context; yields False if another process holds the lock."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield True
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_held = True
    except BlockingIOError:
        is_held = False
    except OSError:  # a file system without locks
        is_held = True
    try:
        yield is_held
    finally:
        os.close(handle)
