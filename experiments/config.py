"""Typed configurations: frozen dataclasses read from YAML, with overrides; what is unknown or unfit is one error."""

import collections
import dataclasses
import functools
import pathlib
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from approx_attention.core import unknown
from experiments.plain_yaml import load_plain, one_line

Config = TypeVar("Config")


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value}")
    return value


# Numbers as configurations hold them: a bool is none, and NaN and infinity are none either. JAX counts in int32.
Whole = Annotated[int, pydantic.Field(ge=0, lt=2**31, strict=True)]
Count = Annotated[int, pydantic.Field(ge=1, lt=2**31, strict=True)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32, strict=True)]
Number = Annotated[float, pydantic.Field(allow_inf_nan=False), pydantic.BeforeValidator(_no_bool)]
NonNegative = Annotated[Number, pydantic.Field(ge=0)]
Positive = Annotated[Number, pydantic.Field(gt=0)]
Share = Annotated[Number, pydantic.Field(ge=0, le=1)]


def check_names(names: Iterable[Any]) -> None:
    """Raises ``ValueError`` unless each name can be that of a file, on every file system another one."""
    given = list(names)
    for name in given:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,99}", name):
            raise ValueError(
                f"{reprlib.repr(name)} cannot name files: a name has 1 to 100 of A-Z, a-z, 0-9, '_', '.', '=', '+' and "
                "'-', and begins with a letter, a digit or '_'"
            )
    for folded, times in collections.Counter(map(str.casefold, given)).items():
        if times > 1:
            same = " and ".join(repr(name) for name in given if name.casefold() == folded)
            raise ValueError(f"{same} name the same file where file names ignore case")


def _named(parts: dict[str, Any]) -> dict[str, Any]:
    check_names(parts)
    return parts


Part = TypeVar("Part")
# A list or a mapping with at least one part, and parts whose names become those of files.
Several = Annotated[list[Part], pydantic.Field(min_length=1)]
SeveralBy = Annotated[dict[str, Part], pydantic.Field(min_length=1)]
Named = Annotated[SeveralBy[Part], pydantic.AfterValidator(_named)]
# Set as ``__pydantic_config__`` on every configuration dataclass.
STRICT = pydantic.ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded:
    """Base class of the settings of a study."""

    seed: Seed = 0

    __pydantic_config__ = STRICT


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that says where and why."""


def load_yaml(path: pathlib.Path) -> Any:
    """What a YAML file says.

    Raises:
        ConfigError: it cannot be read, or is no YAML that `load_plain` takes.
    """
    try:
        return load_plain(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except ValueError as error:  # a path with NUL in it
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML that can be used: {one_line(error)}") from None


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``["train.steps=100"]`` as ``{"train.steps": 100}``, the values read as YAML.

    Raises:
        ConfigError: an assignment has no ``=``, a value is no YAML, or a key is given twice.
    """
    overrides = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ConfigError(f"an override is KEY=VALUE, as in train.steps=100; got {assignment!r}")
        if name in overrides:
            raise ConfigError(f"--set gives {name!r} twice")
        try:
            overrides[name] = load_plain(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"the value of {name} is not YAML that can be used: {reprlib.repr(value)}: {one_line(error)}"
            ) from None
    return overrides


def overridden(settings: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings with overrides: a key replaces, and a dotted one reaches inside.

    Raises:
        ConfigError: a key reaches into what is no mapping.
    """
    merged = _copied(settings)
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        node = merged
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: {dotted!r} goes through {parent!r}, which is not a mapping")
        node[last] = value
    return merged


def resolve(
    kind: type[Config],
    settings: Mapping[str, Any],
    overrides: Mapping[str, Any],
    where: str,
    other_keys: Iterable[str] = (),
) -> Config:
    """Settings with overrides by dotted key, checked against a configuration class.

    Args:
        kind: the class.
        settings: by key.
        overrides: by dotted key.
        where: what messages begin with.
        other_keys: keys of a file that are no settings, for messages on unknown ones.

    Raises:
        ConfigError: a key is unknown (the message names the nearest), missing, or holds a value of the wrong type.
    """
    merged = overridden(settings, overrides, where)
    try:
        return adapter_of(kind).validate_python(merged)
    except pydantic.ValidationError as error:
        raise ConfigError(first_fault(error, where, kind, other_keys)) from None
    except (TypeError, ArithmeticError) as error:  # of a method, to which settings are no arguments
        raise ConfigError(f"{where}: {error}") from None


def checked(kind: Any, value: Any, where: str) -> Any:
    """A value as a type takes it.

    Raises:
        ConfigError: it does not fit.
    """
    try:
        return adapter_of(kind).validate_python(value)
    except pydantic.ValidationError as error:
        raise ConfigError(first_fault(error, where)) from None


def first_fault(error: pydantic.ValidationError, where: str, kind: Any = None, other_keys: Iterable[str] = ()) -> str:
    """The first fault as one line: the key, what was given, and what is allowed.

    Args:
        error: of a value of a type.
        where: what the line begins with.
        kind: the type, if it is a configuration class.
        other_keys: see `resolve`.
    """
    fault = error.errors()[0]
    key, said = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
    place = f"{where}: {key!r}" if key else where
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        *parents, last = fault["loc"]
        for parent in parents:
            kind = _within(kind, parent)
        if not dataclasses.is_dataclass(kind):
            return f"{where}: unknown key {key!r}"
        known = [field.name for field in dataclasses.fields(kind)] + ([] if parents else list(other_keys))
        return f"{where}: in {key!r}: {unknown('key', str(last), known)}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where}: the key {key!r} is missing"
    if fault["type"] == "dict_type":
        return f"{place} must be a mapping, got {reprlib.repr(fault['input'])}"
    if fault["type"] == "value_error":  # a configuration's own check
        return f"{place}: {said}"
    return f"{place} is {reprlib.repr(fault['input'])}: {said[0].lower()}{said[1:]}"


def departures(config: Any, held: Mapping[str, Any], where: str) -> list[str]:
    """In which settings held ones differ from a configuration; those that have come since stand at their default."""
    try:
        return differences(as_plain(resolve(type(config), held, {}, where)), as_plain(config))
    except ConfigError as error:
        return [str(error)]


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as plain mappings and lists, ready for YAML or JSON."""
    return adapter_of(type(config)).dump_python(config, mode="json")


@functools.cache
def adapter_of(kind: type[Config]) -> pydantic.TypeAdapter[Config]:
    """To make one takes milliseconds, and a report asks thousands of times."""
    return pydantic.TypeAdapter(kind)


def departing(config: Any) -> dict[str, Any]:
    """The settings that differ from their defaults, as plain mappings and lists: one that comes later changes none."""
    return adapter_of(type(config)).dump_python(config, mode="json", exclude_defaults=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys in which two plain configurations differ, with both values."""
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before!r} there, {after!r} now")
    return found


def _copied(settings: Mapping[str, Any]) -> dict[str, Any]:
    # Not deepcopy, which keeps an aliased mapping one object: an override of one place would change the others.
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


def _within(kind: Any, part: Any) -> Any:
    """The part at a key of a configuration class, or in a mapping or list of them."""
    if dataclasses.is_dataclass(kind):
        return _bare({field.name: field.type for field in dataclasses.fields(kind)}.get(str(part)))
    return _bare(typing.get_args(kind)[-1]) if typing.get_origin(kind) in (dict, list) else None


def _bare(kind: Any) -> Any:
    """A type without its annotations, and without None."""
    if typing.get_origin(kind) is Annotated:
        return _bare(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return _bare(next(one for one in typing.get_args(kind) if one is not types.NoneType))
    return kind
