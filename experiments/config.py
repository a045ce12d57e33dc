"""Typed configurations: frozen dataclasses read from YAML, with overrides; what is unknown or unfit is refused."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from approx_attention.checks import unknown

Config = TypeVar("Config")

# A count of at least one; a bool is none.
Count = Annotated[int, pydantic.Field(ge=1, strict=True)]
# Set as ``__pydantic_config__`` on every configuration dataclass.
STRICT = pydantic.ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that says where and why."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant in a sweep: a name, and the keys in which it departs from the file it stands in."""

    name: str
    overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A file under configs/: which experiment it configures, its settings, and the arms and seeds of its sweep."""

    path: pathlib.Path
    experiment: str
    settings: Mapping[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]


def read_config_file(path: pathlib.Path) -> ConfigFile:
    """Reads ``experiment``, optional ``arms`` and ``seeds``, and the settings from a YAML file.

    Raises:
        ConfigError: the file is not there, is no YAML mapping, or names no experiment.
    """
    settings = read_yaml(path)
    experiment, arms, seeds = settings.pop("experiment"), settings.pop("arms", {"run": {}}), settings.pop("seeds", [0])
    if (
        not isinstance(arms, dict)
        or not arms
        or not all(isinstance(overrides, dict | None) for overrides in arms.values())
    ):
        raise ConfigError(f"{path}: 'arms' must map names to mappings of overrides")
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ConfigError(f"{path}: 'seeds' must be a list of integers, got {seeds!r}")
    return ConfigFile(
        path, experiment, settings, tuple(Arm(name, overrides or {}) for name, overrides in arms.items()), tuple(seeds)
    )


def read_yaml(path: pathlib.Path) -> dict[str, Any]:
    """A YAML mapping that names its experiment.

    Raises:
        ConfigError: the file is not there, is no YAML mapping, or names no experiment.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("experiment"), str):
        raise ConfigError(f"{path} must be a mapping with the key 'experiment'")
    return dict(content)


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``["train.steps=100"]`` as ``{"train.steps": 100}``, the values read as YAML.

    Raises:
        ConfigError: an assignment has no ``=``.
    """
    overrides = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ConfigError(f"an override is KEY=VALUE, as in train.steps=100; got {assignment!r}")
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"the value of {name} is not YAML: {value!r}") from None
    return overrides


def resolve(kind: type[Config], settings: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Config:
    """Settings with overrides by dotted key, checked against a configuration class.

    Raises:
        ConfigError: a key is unknown (the message names the nearest), missing, or holds a value of the wrong type.
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
    try:
        return _adapter(kind).validate_python(merged)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {_first_fault(kind, error)}") from None


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as plain mappings and lists, ready for YAML or JSON."""
    return _adapter(type(config)).dump_python(config, mode="json")


@functools.cache
def _adapter(kind: type[Config]) -> pydantic.TypeAdapter[Config]:
    """To make one takes milliseconds, and a report asks thousands of times."""
    return pydantic.TypeAdapter(kind)


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
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


def _first_fault(kind: type, error: pydantic.ValidationError) -> str:
    fault = error.errors()[0]
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner: Any = kind
        for parent in fault["loc"][:-1]:
            fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
            owner = {field.name: field.type for field in fields}.get(str(parent))
        if not dataclasses.is_dataclass(owner):  # within a mapping or an optional part
            return f"unknown key {key!r}"
        known = [field.name for field in dataclasses.fields(owner)]
        return f"in {key!r}: {unknown('key', fault['loc'][-1], known)}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"the key {key!r} is missing"
    if fault["type"] == "value_error":  # a configuration's own check
        return f"{key!r}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{key!r} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
