"""YAML as configurations need it: plain values, no key twice, and aliases and nesting within bounds."""

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
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        # PyYAML lets through what Python says of a date with month 13, or of !!bool 3.
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None
    finally:
        loader.dispose()


def _plain_numbers(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """Which texts are numbers: not 1:30, which in YAML 1.1 is 90, and not 010, which is 8."""
    if not tag.endswith((":int", ":float")):
        return pattern
    return re.compile(rf"(?!.*:|[-+]?0[0-7_]+$)(?:{pattern.pattern})", pattern.flags)


class _PlainLoader(yaml.SafeLoader):
    """The safe loader, within bounds that are checked before anything is built."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, _plain_numbers(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        # How many values and levels each node makes with its aliases written out.
        self.extent: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        # Checked before the node is composed, for which PyYAML calls itself once a level.
        if self.depth >= DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {DEEPEST} levels", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None or (alias and node in self.extent):
            return node
        if alias:
            raise yaml.MarkedYAMLError(problem="an alias stands inside of what it names", problem_mark=mark)
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        values = 1 + sum(self.extent[part][0] for part in parts)
        levels = 1 + max((self.extent[part][1] for part in parts), default=0)
        if values > MOST_VALUES or levels > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"with its aliases written out it has more than {MOST_VALUES} values or {DEEPEST} levels",
                problem_mark=mark,
            )
        self.extent[node] = values, levels
        return node


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        # Of equal keys YAML keeps the last, so that what was written first is lost in silence.
        if isinstance(key, yaml.ScalarNode):
            if key.value in lines:
                problem = f"the key {key.value!r} is there already, in line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1


def one_line(error: yaml.YAMLError) -> str:
    """What a YAML error says, as one line with the number of the line at fault."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    said = ", ".join(filter(None, (error.context, error.problem)))
    return f"line {error.problem_mark.line + 1}: {said}" if error.problem_mark else said
