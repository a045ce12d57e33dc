"""YAML as configurations need it: no key twice, keys of text, and numbers that look like numbers."""

import copy
import functools
import math
import re
from typing import Any, ClassVar

import yaml

# What a value can be; YAML has dates, sets and bytes too.
_KINDS = ("map", "seq", "str", "int", "float", "bool", "null")
_TAG = "tag:yaml.org,2002:"


def load_plain(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is no YAML, says a key twice, or holds a value of another kind or a number out of range.
    """
    try:
        return copy.deepcopy(_load(text))
    except RecursionError:  # PyYAML calls itself once a level
        raise yaml.YAMLError("it is nested too deep") from None
    except (ValueError, KeyError) as error:  # PyYAML lets through what Python says of !!int x or !!bool 3
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


def _plain_numbers(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """Which texts are numbers: not 1:30, which in YAML 1.1 is 90, and not 010, which is 8."""
    if not tag.endswith((":int", ":float")):
        return pattern
    return re.compile(rf"(?!.*:|[-+]?0[0-7_]+$)(?:{pattern.pattern})", pattern.flags)


class _PlainLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, _plain_numbers(tag, pattern)) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _KINDS
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                given = f", got {key.value!r}; put it in quotes" if isinstance(key, yaml.ScalarNode) else ""
                raise _fault(key, f"a key must be text{given}")
            # Of equal keys YAML keeps the last, so that what was written first is lost in silence.
            if key.value in lines:
                raise _fault(key, f"the key {key.value!r} is there already, in line {lines[key.value]}")
            lines[key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if isinstance(value, float) and not math.isfinite(value):
            raise _fault(node, f"a number must be finite, got {node.value}")
        if isinstance(value, int) and abs(value) >= 2**32:
            raise _fault(node, f"a whole number must be within 32 bits, got {node.value}")
        return value


# A report reads the configurations of all studies several times, and PyYAML is slow.
@functools.lru_cache(maxsize=256)
def _load(text: str) -> Any:
    return yaml.load(text, _PlainLoader)


def _fault(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def one_line(error: yaml.YAMLError) -> str:
    """What a YAML error says, as one line with the number of the line at fault."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    said = ", ".join(filter(None, (error.context, error.problem)))
    return f"line {error.problem_mark.line + 1}: {said}" if error.problem_mark else said
