"""YAML 1.2 text to plain values, with the scalars of the core schema.

PyYAML reads YAML 1.1, in which `010` is 8, `1:30` is 90 and `on` is true. The loader here resolves plain scalars by the
tables of section 10.3.2 of the YAML 1.2.2 specification instead. It also refuses what could be read in two ways: a key
that is given twice, a tag, a number too large for a float, and a line break of YAML 1.1 that YAML 1.2 does not have.
The merge key `<<` is read, although only YAML 1.1 defines it, because no setting can have that name.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from simpo_pipeline.errors import ConfigError

# Aliases may repeat parts of a document. These are the values that they may add to it.
MAX_REPEATED_VALUES = 100_000

_INTEGER = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN"
_TAG = "tag:yaml.org,2002:"
# In this order: the first that matches is the type of a plain scalar. All others are text.
_RESOLVERS = (
    (f"{_TAG}null", r"null|Null|NULL|~|"),
    (f"{_TAG}bool", r"true|True|TRUE|false|False|FALSE"),
    (f"{_TAG}int", _INTEGER),
    (f"{_TAG}float", _FLOAT),
    (f"{_TAG}merge", r"<<"),
)
_OLD_LINE_BREAK = re.compile("[\x85\u2028\u2029]")
_ESCAPES = {"\x85": r"\N", "\u2028": r"\L", "\u2029": r"\P"}


def load_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML document, made of mappings, lists and scalars; errors name it `source`.

    Raises:
        ConfigError: It is not YAML 1.2, gives a key twice, uses a tag, or grows beyond measure through its aliases.
    """
    found = _OLD_LINE_BREAK.search(text)
    if found is not None:
        raise ConfigError(
            f"{source}: line {text.count(chr(10), 0, found.start()) + 1} contains the character "
            f"U+{ord(found[0]):04X}, which ends a line in YAML 1.1 and not in YAML 1.2; write it as "
            f"{_ESCAPES[found[0]]} in double quotes, or remove it."
        )
    try:
        # The loader is a SafeLoader, which creates only plain values.
        return yaml.load(text, _CoreLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}.") from error
    except RecursionError:
        raise ConfigError(f"{source}: lists or mappings are nested too deeply; use fewer levels.") from None
    except (ValueError, OverflowError) as error:  # of a character code or a number that Python does not have
        raise ConfigError(f"{source}: a value is out of range ({error}); write it in another way.") from error


class _CoreLoader(yaml.SafeLoader):
    """A SafeLoader of YAML 1.2."""

    def compose_document(self) -> Any:
        version = getattr(self.peek_event(), "version", None)
        if version not in (None, (1, 2)):
            raise yaml.YAMLError(f"the document declares YAML {'.'.join(map(str, version))}; only YAML 1.2 is read")
        document = super().compose_document()
        _check_repetition(document)
        return document

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _refusal(f"the tag {tag!r} is not read; write the value without it, and text in quotes", event)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key_node in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            is_merge = key_node.tag == f"{_TAG}merge"
            key: Any = key_node.value if is_merge else self.construct_object(key_node)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key_node.value!r} is given twice, the second time on line {line}; keep one")
            seen.add(key)
        return node

    def construct_core_int(self, node: Any) -> int:
        text: str = node.value
        prefix, base = (text[:2], {"0o": 8, "0x": 16}.get(text[:2], 10))
        try:
            return int(text[2:] if base != 10 else text, base)
        except ValueError as error:  # more digits than Python converts
            raise _refusal(f"{prefix}... has {len(text)} digits; give a smaller number", node) from error

    def construct_core_float(self, node: Any) -> float:
        text: str = node.value.lower()
        value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
        if math.isinf(value) and "inf" not in text:
            raise _refusal(f"{node.value} is too large for a number; write .inf for infinity", node)
        return value

    def construct_core_str(self, node: Any) -> str:
        text: str = node.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _refusal(
                "the text contains half of a surrogate pair; write the character itself, or \\U and its 8 digits", node
            )
        return text


_CoreLoader.yaml_implicit_resolvers = {}  # those of YAML 1.1 would be inherited
for _tag, _pattern in _RESOLVERS:
    _CoreLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
_CoreLoader.add_constructor(f"{_TAG}int", _CoreLoader.construct_core_int)
_CoreLoader.add_constructor(f"{_TAG}float", _CoreLoader.construct_core_float)
_CoreLoader.add_constructor(f"{_TAG}str", _CoreLoader.construct_core_str)


def _refusal(problem: str, at: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _check_repetition(document: Any) -> None:
    """Check that the document's aliases neither contain themselves nor multiply its values without bound."""
    sizes: dict[int, int | None] = {}

    def size_of(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = None  # until all below it are counted
            sizes[id(node)] = 1 + sum(size_of(child) for child in _children(node))
        size = sizes[id(node)]
        if size is None:
            raise _refusal("an anchor contains an alias of itself; write the value out", node)
        return size

    if size_of(document) - len(sizes) > MAX_REPEATED_VALUES:
        raise yaml.YAMLError(
            f"its aliases repeat more than {MAX_REPEATED_VALUES} values; write them out, or repeat fewer"
        )


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
