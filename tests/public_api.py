"""``python -m tests.public_api``: rewrites tests/public_api.txt, the public names and their signatures."""

import dataclasses
import inspect
import pathlib
from collections.abc import Iterable
from typing import Any

from approx_attention.evaluation import write_atomically
from docs import names

LISTING = pathlib.Path(__file__).parent / "public_api.txt"


def render() -> str:
    """A line per public name, and one per public method or property of a class."""
    return (
        "\n".join(line for name in sorted(names.places()) for line in describe(name, names.public_object(name))) + "\n"
    )


def describe(name: str, thing: Any) -> Iterable[str]:
    """The lines of a name."""
    if name in names.DATA:
        yield f"{name}: {', '.join(thing)}"
    elif inspect.isclass(thing):
        make = thing.__new__ if issubclass(thing, tuple) else thing.__init__
        yield f"{name}{signature(make, skip_first=True)}"
        if fields := field_names(thing):
            yield f"{name} fields: {', '.join(fields)}"
        for member, value in public_members(thing).items():
            if isinstance(value, property):
                yield f"{name}.{member}"
            else:
                unbound = not isinstance(value, classmethod | staticmethod)
                yield f"{name}.{member}{signature(getattr(thing, member), skip_first=unbound)}"
    else:
        yield f"{name}{signature(thing)}"


def public_members(thing: type) -> dict[str, Any]:
    """The public methods and properties that classes of this library give a class."""
    members: dict[str, Any] = {}
    for owner in reversed(thing.__mro__):
        if owner.__module__.startswith("approx_attention"):
            members |= vars(owner)
    return {
        name: value
        for name, value in members.items()
        if (not name.startswith("_") or name == "__call__")
        and name not in field_names(thing)
        and (isinstance(value, property) or callable(getattr(thing, name)))
    }


def field_names(thing: type) -> list[str]:
    """The fields of a dataclass or named tuple."""
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing)]
    return list(getattr(thing, "_fields", ()))


def signature(function: Any, skip_first: bool = False) -> str:
    """Names, kinds and defaults of the parameters; annotations are left to the type checker."""
    parameters = list(inspect.signature(function).parameters.values())[skip_first:]
    plain = [p.replace(annotation=p.empty, default=_Shown.of(p.default)) for p in parameters]
    return str(inspect.Signature(plain))


class _Shown:
    """A default shown by its name where it has one, because addresses differ from run to run."""

    def __init__(self, text: str):
        self.text = text

    @classmethod
    def of(cls, default: Any) -> Any:
        if default is inspect.Parameter.empty:
            return default
        if hasattr(default, "__name__"):
            return cls(default.__name__)
        return cls(type(default).__name__) if " at 0x" in repr(default) else default

    def __repr__(self) -> str:
        return self.text


if __name__ == "__main__":
    text = render()
    write_atomically(LISTING, lambda file: file.write(text.encode()))
