"""Atomic writes of files."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any


def write_atomically(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
    """Write a temporary file and move it into place, so that the file is never half written.

    Args:
        path: the file to write or to replace; its directory must exist.
        write: writes the contents to an open binary file.

    Raises:
        OSError: the directory cannot be written. The temporary file is removed, also after an error of ``write``.
    """
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        # A temporary file is readable by its owner only.
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        # An interrupt can come after the move.
        pathlib.Path(draft).unlink(missing_ok=True)
        raise
