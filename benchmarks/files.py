"""The files of measurements and reports, written atomically."""

import json
import pathlib
from typing import Any

from approx_attention.evaluation import write_atomically

HERE = pathlib.Path(__file__).parent
RESULTS, REPORT = HERE / "results", HERE / "RESULTS.md"


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_document(path: pathlib.Path, document: dict[str, Any]) -> None:
    """Write a document as JSON, and make its directory if needed."""
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")
