"""Parsing of YAML text and command-line words to plain mappings.

The type of a setting decides how its word on the command line is read (`typed_value`), so that a path such as `on` or
`010` stays as it is. Apart from that, this module does not know the keys' meaning.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from simpo_pipeline.config_files.check import fits
from simpo_pipeline.config_files.yaml_core import load_yaml
from simpo_pipeline.errors import ConfigError

NONE_WORD = "null"
"""The word that sets a text setting to None on the command line, if the setting may be None."""


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Return the mapping in a YAML document; errors name it `source`.

    Raises:
        ConfigError: it is not YAML, gives a key twice, or is not a mapping.
    """
    value = load_yaml(text, source)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: the file contains {value!r}; expected a mapping of settings.")
    return value


def split_flags(argv: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of the flags called `names` or nested below one of them, with their values; and all other words.

    A flag is `--name value`, `--name=value` or a bare `--name`. Only `--` starts a flag, so `-1` is a value. `-h` is
    always among the first words.
    """
    chosen: list[str] = []
    others: list[str] = []
    target = others
    for word in argv:
        if word.startswith("--"):
            target = chosen if re.split("[.=]", word[2:], maxsplit=1)[0] in names else others
        elif word == "-h":
            target = chosen
        target.append(word)
    return chosen, others


def parse_flags(argv: Sequence[str], source: str, kind: Any = Any) -> dict[str, Any]:
    """Return the nested mapping for flags such as `--trainer.num_train_steps 3`; a bare flag is true.

    Args:
        argv: The words of the command line.
        source: What errors name as the origin.
        kind: The dataclass that the mapping is meant for. The types of its fields decide how values are read; the value
            of a key that it does not have is text. By default, all values are YAML.

    Raises:
        ConfigError: a word does not belong to a flag, a value is not YAML, or a key is set twice.
    """
    settings: dict[str, Any] = {}
    words = list(argv)
    while words:
        flag = words.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(
                f"{source}: {flag!r} does not belong to a flag; write --key value, or --key=value for text."
            )
        key, separator, value = flag[2:].partition("=")
        if not separator and words and not words[0].startswith("--"):
            separator, value = "=", words.pop(0)
        _insert(settings, key, _flag_value(kind, key, value, source) if separator else True, source)
    return settings


def _flag_value(kind: Any, key: str, word: str, source: str) -> Any:
    field_kind = kind_of_key(kind, key)
    members = _members(field_kind)
    if word == NONE_WORD and type(None) in members and any(map(_is_text, members)):
        return None
    return typed_value(field_kind, word, f"{source}: {key}")


def kind_of_key(kind: Any, key: str) -> Any:
    """Return the type of the field at a dotted key below the dataclass `kind`, or `str` if it has no such field."""
    for name in key.split("."):
        if kind is Any:
            return Any
        inner = [part for part in _members(kind) if dataclasses.is_dataclass(part) or typing.get_origin(part) is dict]
        if not inner:
            return str
        if dataclasses.is_dataclass(inner[0]):
            kind = typing.get_type_hints(inner[0]).get(name, str)
        else:
            kind = typing.get_args(inner[0])[1]
    return kind


def typed_value(kind: Any, word: str, source: str) -> Any:
    """Return the value of a command-line word for a field of type `kind`.

    Text is taken as it is. If a field may be text or something else, such as `bool | str`, a word that is not a value
    of the other types is text. All other fields are YAML. Whether the value fits is checked later.

    Raises:
        ConfigError: the field is not text, and the word is not YAML.
    """
    members = _members(kind)
    if not any(map(_is_text, members)):
        return load_yaml(word, source)
    others = [member for member in members if not _is_text(member) and member is not type(None)]
    if others:
        try:
            value = load_yaml(word, source)
        except ConfigError:
            return word
        if any(fits(member, value) for member in others):
            return value
    return word


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, and any other type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_text(kind: Any) -> bool:
    allowed = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return kind is str or (bool(allowed) and all(isinstance(each, str) for each in allowed))


def _insert(settings: dict[str, Any], key: str, value: Any, source: str) -> None:
    *folders, name = key.split(".")
    inner = settings
    for folder in folders:
        inner = inner.setdefault(folder, {})
        if not isinstance(inner, dict):
            break
    if not isinstance(inner, dict) or name in inner:
        raise ConfigError(f"{source}: {key} is given twice, whole or in part; keep one.")
    inner[name] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by the values of `over`; mappings are merged, lists are replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
