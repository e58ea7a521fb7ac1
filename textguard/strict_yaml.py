"""params.yaml as DVC reads it, or not at all.

DVC reads the file as YAML 1.2, PyYAML as 1.1, and a person as neither. What the readers take for different values is refused
here, and so is what DVC cannot address (keys that are no texts), what it refuses itself (a key twice, dates that no calendar
has), and what takes no end (aliases in aliases). Nothing in the file names a type: values are built from texts, numbers, true,
false, null, lists and mappings alone.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from textguard.errors import printable

DEEPEST, MOST_VALUES, LONGEST_NUMBER = 30, 100_000, 40  # params.yaml has 5 levels, some hundred values, and 20 digits in a seed
_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _TEXT = (_TAG + name for name in ("null", "bool", "int", "float", "str"))
_DATE, _MERGE, _VALUE = (_TAG + name for name in ("timestamp", "merge", "value"))

# What an unquoted text is: YAML 1.2 as ruamel.yaml has it, which DVC uses. The first that fits counts.
_RESOLVERS = {
    _BOOL: "true|True|TRUE|false|False|FALSE",
    _FLOAT: r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.[0-9_]+([eE][-+][0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    _INT: "[-+]?0b[0-1_]+|[-+]?0o?[0-7_]+|[-+]?[0-9_]+|[-+]?0x[0-9a-fA-F_]+",
    _NULL: "~|null|Null|NULL|",
    _MERGE: "<<",
    _VALUE: "=",
}
_DATE_PATTERN = r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?"


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with DVC's idea of numbers, up to nodes: what they stand for is this module's business."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (as PyYAML has it)
    depth = 0

    def compose_document(self) -> yaml.Node:
        """As PyYAML's, without directives, of which one would make DVC read the numbers otherwise."""
        start = self.peek_event()
        if getattr(start, "version", None) or getattr(start, "tags", None):
            raise yaml.composer.ComposerError(None, None, "directives (%YAML, %TAG) are not taken", start.start_mark)
        return super().compose_document()

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        """As PyYAML's, without tags, and of limited depth."""
        event = self.peek_event()
        problem = None
        if (tag := getattr(event, "tag", None)) is not None:
            problem = f"the tag {tag!r} is not taken: leave it out, and put texts in quotes"
        self.depth += 1
        if self.depth > DEEPEST:
            problem = f"values lie more than {DEEPEST} levels deep"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(_DATE, re.compile(rf"^({_DATE_PATTERN})$"), list("0123456789"))
for _tag, _pattern in _RESOLVERS.items():
    _starts = {_BOOL: "tTfF", _NULL: "~nN", _MERGE: "<", _VALUE: "="}.get(
        _tag, "-+.0123456789_" if _tag == _FLOAT else "-+0123456789"
    )
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), [*_starts, ""] if _tag == _NULL else list(_starts))


def parse(text: str) -> Any:
    """The values of one YAML document. Raises ValueError in one line: what, where, and what is allowed."""
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}" if mark else ""
        context = f"{error.context}: " if error.context else ""
        raise ValueError(f"{context}{error.problem}{place}") from error
    except yaml.YAMLError as error:
        raise ValueError(printable(str(error))) from error
    return _Values().build(node, ()) if node else None


class _Values:
    """Builds values from nodes, and counts them: an alias is a whole copy to everybody who reads the values."""

    def __init__(self) -> None:
        self._count = 0

    def build(self, node: yaml.Node, place: Sequence[str]) -> Any:
        self._count += 1
        if self._count > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, aliases (*name) counted as what they stand for")
        if len(place) > DEEPEST:
            raise ValueError(f"{_said(place)} lies more than {DEEPEST} levels deep; an alias (*name) may not hold itself")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*place, str(number))) for number, item in enumerate(node.value)]
        return _scalar(node, f"{_said(place)} in line {node.start_mark.line + 1}")

    def _mapping(self, node: yaml.MappingNode, place: Sequence[str]) -> dict[str, Any]:
        merged, own = {}, {}
        for key_node, value_node in node.value:
            where = f"line {key_node.start_mark.line + 1}"
            if key_node.tag == _MERGE:
                if merged:
                    raise ValueError(f"{where} merges (<<) a second time in {_said(place)}; give one list of aliases")
                merged = self._merged(value_node, place, where)
                continue
            if key_node.tag != _TEXT:
                said = printable(repr(key_node.value), 60) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise ValueError(
                    f"a name in {_said(place)} in {where} is {said}, no text; put it in quotes, or take another one"
                )
            key = _scalar(key_node, f"a name in {_said(place)} in {where}")
            if key in own:
                raise ValueError(f"{_said((*place, key))} is there twice, the second time in {where}; keep one")
            own[key] = self.build(value_node, (*place, key))
        return merged | own

    def _merged(self, node: yaml.Node, place: Sequence[str], where: str) -> dict[str, Any]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged = {}
        for part in reversed(parts):  # the first one counts
            if not isinstance(part, yaml.MappingNode):
                raise ValueError(f"{where} merges (<<) something else than a mapping, or a list of them, into {_said(place)}")
            merged |= self.build(part, (*place, "<<"))
        return merged


def _said(place: Sequence[str]) -> str:
    return printable(".".join(place), 100) or "the file"


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    text = node.value
    if node.tag == _TEXT:
        if bad := re.search(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text):
            raise ValueError(f"{where} holds the character U+{ord(bad[0]):04X}, which no text may; take it out")
        return text
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    shown = printable(text, LONGEST_NUMBER)
    if node.tag == _DATE:
        raise ValueError(f"{where} is {shown}, a date; put it in quotes where it is a text")
    if node.tag not in (_INT, _FLOAT):
        raise ValueError(f"{where} is {shown!r}, which has a meaning of its own; put it in quotes where it is a text")
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"{where} is {shown}, a number of {len(text)} digits; put it in quotes where it is a text")
    if node.tag == _FLOAT:
        plain = text.replace("_", "").lower()
        return float(plain.replace(".inf", "inf").replace(".nan", "nan"))
    # 010 is 8 to some readers, and 10 to others.
    if not re.fullmatch("[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", text):
        raise ValueError(f"{where} is {shown}; write the number without leading zeros, or put it in quotes where it is a text")
    return int(text.replace("_", ""), 0)
