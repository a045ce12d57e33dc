"""YAML as configurations need it: no key twice, and numbers that look like numbers."""

import re
from typing import Any, ClassVar

import yaml

# Levels of nesting, and values with every alias written out; the configurations here need 6 and some hundreds.
DEEPEST = 32
MOST_VALUES = 100_000


def load_plain(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is no YAML, is nested too deep, says a key twice, or grows too large through its aliases.
    """
    try:
        loaded = yaml.load(text, _PlainLoader)
        _check_extent(loaded, [MOST_VALUES])
        return loaded
    except RecursionError:  # PyYAML calls itself once a level
        raise yaml.YAMLError(_TOO_DEEP) from None
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        # PyYAML lets through what Python says of a date with month 13, or of !!bool 3.
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


_TOO_DEEP = f"nested deeper than {DEEPEST} levels"


def _check_extent(value: Any, room: list[int], depth: int = 0) -> None:
    """Raises unless a value is within bounds; an alias is a part that stands in several places, or in itself."""
    room[0] -= 1
    if room[0] < 0:
        raise yaml.YAMLError(f"with its aliases written out it has more than {MOST_VALUES} values")
    if depth > DEEPEST:
        raise yaml.YAMLError(_TOO_DEEP)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_extent(part, room, depth + 1)


def _plain_numbers(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """Which texts are numbers: not 1:30, which in YAML 1.1 is 90, and not 010, which is 8."""
    if not tag.endswith((":int", ":float")):
        return pattern
    return re.compile(rf"(?!.*:|[-+]?0[0-7_]+$)(?:{pattern.pattern})", pattern.flags)


class _PlainLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, _plain_numbers(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Of equal keys YAML keeps the last, so that what was written first is lost in silence.
        node, lines = super().compose_mapping_node(anchor), {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                problem = f"the key {key.value!r} is there already, in line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node


def one_line(error: yaml.YAMLError) -> str:
    """What a YAML error says, as one line with the number of the line at fault."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    said = ", ".join(filter(None, (error.context, error.problem)))
    return f"line {error.problem_mark.line + 1}: {said}" if error.problem_mark else said
