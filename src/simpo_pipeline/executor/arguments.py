"""Parser of command-line flags into a config dataclass: draccus with bare `--dry_run` flags and lists without brackets.

--dry_run                    same as --dry_run true
--run_only train-.* report   same as --run_only '["train-.*", "report"]'
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from simpo_pipeline.errors import ConfigError, SimpoPipelineError

ConfigT = TypeVar("ConfigT")
_CONFIG_FILE_FLAG = "config_path"
_HELP_FLAGS = ("-h", "--help")


def parse_arguments(config_class: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    """Return the config that the flags describe. `--help` prints the flags and exits.

    Raises:
        ConfigError: a flag is unknown or a value is invalid. The message is one sentence.
    """
    import draccus  # the import takes 0.1 s, and only command lines need it

    kinds = dict(_flag_types(config_class, ""))
    if not any(flag in arguments for flag in _HELP_FLAGS):
        _check_flags(arguments, [*kinds, _CONFIG_FILE_FLAG])
    try:
        return draccus.parse(config_class, args=_completed(arguments, kinds), exit_on_error=False)
    except SimpoPipelineError:
        raise
    except Exception as error:  # argparse, yaml and draccus each raise their own types; all mean a bad flag or file
        if isinstance(error.__cause__, SimpoPipelineError):
            raise ConfigError(str(error.__cause__)) from error
        raise ConfigError(f"Bad flags: {' '.join(str(error).split())}. Run with --help to see them all.") from error


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


def _check_flags(arguments: Sequence[str], known: list[str]) -> None:
    for argument in arguments:
        name = argument.removeprefix("--").split("=", 1)[0]
        if argument.startswith("--") and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            advice = f"Did you mean --{nearest[0]}?" if nearest else "Run with --help to see all flags."
            raise ConfigError(f"Unknown flag --{name}. {advice}")


def _completed(arguments: Sequence[str], kinds: dict[str, Any]) -> list[str]:
    """Return the arguments in the form that draccus expects: one value after each flag."""
    completed: list[str] = []
    position = 0
    while position < len(arguments):
        flag = arguments[position]
        position += 1
        flag, has_value, value = flag.partition("=") if flag.startswith("--") else (flag, "", "")
        completed.append(flag)
        kind = kinds.get(flag.removeprefix("--")) if flag.startswith("--") else None
        values = [value] if has_value else []
        while position < len(arguments) and not arguments[position].startswith("--"):
            values.append(arguments[position])
            position += 1
        completed.extend(_values_for(flag, kind, values))
    return completed


def _values_for(flag: str, kind: Any, values: list[str]) -> list[str]:
    if kind is bool and not values:
        return ["true"]
    if typing.get_origin(kind) is typing.Literal and values and values[0] not in (allowed := typing.get_args(kind)):
        raise ConfigError(f"{flag} is {values[0]!r}; expected one of {', '.join(map(str, allowed))}.")
    if typing.get_origin(kind) in (list, tuple) and values and not values[0].startswith("["):
        return [json.dumps(values)]
    return values
