"""Files that are whole or absent."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any


def write_atomically(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
    """Write a file next to its place and then move it there, so that it is never half written."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        # A temporary file can be read by its owner alone.
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        # An interrupt can come when it is moved already.
        pathlib.Path(draft).unlink(missing_ok=True)
        raise
