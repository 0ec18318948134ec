"""Parsing of YAML text and command-line words to plain mappings; this module does not know the keys' meaning.

Scalars are those of YAML, with two corrections to PyYAML's YAML 1.1: `6e-7` and `1.5e7` are numbers, and a duplicate
key is an error.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import yaml

from simpo_pipeline.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"key {key.value!r} is given twice, the second time on line {line}; keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 requires a dot and a signed exponent, so PyYAML reads 6e-7 and 1.5e7 as text.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    [*"-+.0123456789"],
)


def load_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML document, made of mappings, lists and scalars; errors name it `source`.

    Raises:
        ConfigError: it is not YAML, or gives a key twice.
    """
    try:
        # The loader is a SafeLoader, which creates only plain values.
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}.") from error


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


def parse_flags(argv: Sequence[str], source: str) -> dict[str, Any]:
    """Return the nested mapping for flags such as `--trainer.num_train_steps 3`; a bare flag is true.

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
        _insert(settings, key, load_yaml(value, f"{source}: {key}") if separator else True, source)
    return settings


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
