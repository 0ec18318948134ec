"""Parser of command-line flags into a config dataclass, with bare `--dry_run` flags and lists without brackets.

--dry_run                    same as --dry_run true
--run_only train-.* report   same as --run_only '[train-.*, report]'
--prefix on                  the folder `on`: the value of a text flag is taken as it is

Flags that are not text are YAML. A word that starts with `--` is always a flag; `--prefix=--x` gives such a value.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from simpo_pipeline.errors import ConfigError, SimpoPipelineError
from simpo_pipeline.storage.files import read_text

ConfigT = TypeVar("ConfigT")
_CONFIG_FILE_FLAG = "config_path"
_HELP_FLAGS = ("-h", "--help")
_SOURCE = "command line"


def parse_arguments(config_class: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    """Return the config that the flags describe. `--help` prints the flags and exits.

    Flags override the values of the YAML file that `--config_path` names.

    Raises:
        ConfigError: a flag is unknown or a value is invalid. The message is one sentence.
    """
    # The import takes 0.1 s, and only command lines need it.
    from simpo_pipeline.config_files.decode import decode_mappings
    from simpo_pipeline.config_files.parse import parse_yaml

    if any(flag in arguments for flag in _HELP_FLAGS):
        import draccus

        draccus.parse(config_class, args=["--help"])
    values = flag_values(config_class, arguments)
    path = values.pop(_CONFIG_FILE_FLAG, None)
    try:
        in_file = {} if path is None else parse_yaml(read_text(path), path)
        return decode_mappings(config_class, in_file, values, source=_SOURCE if path is None else path)
    except SimpoPipelineError as error:
        raise ConfigError(" ".join(str(error).split("\n"))) from error


def flag_values(config_class: type, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of the given flags, nested like the config. If a flag is given twice, the last one counts.

    Raises:
        ConfigError: a flag is unknown, has no value or too many, or is not text and its value is not YAML.
    """
    kinds = {_CONFIG_FILE_FLAG: str, **dict(_flag_types(config_class, ""))}
    values: dict[str, Any] = {}
    for name, words in _flags(arguments):
        if name not in kinds:
            nearest = difflib.get_close_matches(name, kinds, n=1)
            advice = f"Did you mean --{nearest[0]}?" if nearest else "Run with --help to see all flags."
            raise ConfigError(f"Unknown flag --{name}. {advice}")
        _insert(values, name, _value(name, kinds[name], words))
    return values


def _flag_types(config_class: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = _without_none(hints[field.name])
        yield f"{prefix}{field.name}", kind
        if dataclasses.is_dataclass(kind):
            yield from _flag_types(kind, f"{prefix}{field.name}.")


def _without_none(hint: Any) -> Any:
    """Return `X` for `X | None`, and any other type unchanged."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if len(members) == 1:
            return members[0]
    return hint


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each flag and the words after it."""
    position = 0
    while position < len(arguments):
        flag, has_value, value = arguments[position].partition("=")
        if not flag.startswith("--"):
            raise ConfigError(
                f"{arguments[position]!r} does not belong to a flag. Write --flag value. "
                "Run with --help to see all flags."
            )
        position += 1
        words = [value] if has_value else []
        while position < len(arguments) and not arguments[position].startswith("--"):
            words.append(arguments[position])
            position += 1
        yield flag[2:], words


def _insert(values: dict[str, Any], name: str, value: Any) -> None:
    *folders, last = name.split(".")
    inner = values
    for folder in folders:
        below: object = inner.setdefault(folder, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--{name} is given twice, whole or in part. Keep one.")
        inner = typing.cast(dict[str, Any], below)
    if isinstance(inner.get(last), dict):
        raise ConfigError(f"--{name} is given twice, whole or in part. Keep one.")
    inner[last] = value


def _value(name: str, kind: Any, words: list[str]) -> Any:
    """Return the value of the flag, which may still be of the wrong type."""
    from simpo_pipeline.config_files.parse import typed_value  # the import takes time, and only command lines need it

    if not words:
        if kind is bool:
            return True
        raise ConfigError(f"--{name} has no value. Write --{name} VALUE.")
    if typing.get_origin(kind) is typing.Literal and words[0] not in (allowed := typing.get_args(kind)):
        raise ConfigError(f"--{name} is {words[0]!r}; expected one of {', '.join(map(str, allowed))}.")
    source = f"{_SOURCE}: {name}"
    if typing.get_origin(kind) in (list, tuple):
        if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
            return typed_value(kind, words[0], source)
        return [typed_value(typing.get_args(kind)[0], word, source) for word in words]
    if len(words) > 1:
        raise ConfigError(f"--{name} has {len(words)} values: {', '.join(words)}. Give one; quote it if it has blanks.")
    return typed_value(kind, words[0], source)
