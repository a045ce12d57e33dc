"""Prose that every machine has: the docstrings of the standard library."""

import ast
import importlib.util
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from experiments.real_models.wordpiece import WordPiece


def excerpts(modules: Sequence[str], length: int, tokenizer: WordPiece, of_each: int | None = None) -> Array:
    """Consecutive excerpts of each module, ``[M, length]``: the first ``of_each``, or all whole ones.

    Raises:
        ValueError: a module with too little text.
    """
    found, inner = [], length - 2  # without the marks
    for module in modules:
        pieces = tokenizer.pieces(documentation(module))
        count = len(pieces) // inner
        if count < (of_each or 1):
            raise ValueError(
                f"{of_each or 1} excerpts of {length} tokens need {(of_each or 1) * inner}, and the docstrings of "
                f"{module} have {len(pieces)}"
            )
        found += [tokenizer.marked(pieces[i * inner :], length) for i in range(of_each or count)]
    return jnp.asarray(found, jnp.int32)


def documentation(module: str) -> str:
    """The docstrings of a module of the standard library, its own first.

    Raises:
        ValueError: it has no source on this machine.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"the standard library here has no source of {module}")
    found = [
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return "\n\n".join(text for text in found if text)
