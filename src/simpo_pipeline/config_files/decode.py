"""Decoding of a YAML document and the command line to a frozen dataclass, or an error that names key and source.

The keys are checked first, with one sentence for each that is wrong. The caller reads the files: this module knows
text, but not where it is stored.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union

from simpo_pipeline.config_files.check import find_missing, find_type_errors, fits
from simpo_pipeline.config_files.parse import merge, parse_flags, parse_yaml
from simpo_pipeline.errors import ConfigError, SimpoPipelineError

COMMAND_LINE = "command line"

T = TypeVar("T")


def decode_yaml(cls: type[T], text: str, *, source: str, flags: Sequence[str] = (), page: str | None = None) -> T:
    """Return the settings in `text`, overridden by those of the command line.

    Args:
        cls: A dataclass; its annotations define the values that each key accepts.
        text: A YAML document.
        source: The path of the document; each message about it begins with the path.
        flags: Command-line words such as `--trainer.num_train_steps 3`; keys are dotted.
        page: The page on the settings; messages about unknown keys refer to it.

    Raises:
        ConfigError: a key is unknown, retired, given twice, missing or of the wrong type, one sentence each; or
            a dataclass rejects the combination of values.
    """
    in_file = parse_yaml(text, source)
    return decode_mappings(cls, in_file, parse_flags(flags, COMMAND_LINE, cls), source=source, page=page)


def decode_mappings(
    cls: type[T], in_file: Mapping[str, Any], in_flags: Mapping[str, Any], *, source: str, page: str | None = None
) -> T:
    """Return the settings in `in_file`, overridden by those of `in_flags`; see `decode_yaml`."""
    misfits = find_type_errors(cls, in_file, source, page) + find_type_errors(cls, in_flags, COMMAND_LINE, page)
    if misfits:
        raise ConfigError("\n".join(misfits))
    merged = merge(in_file, in_flags)
    missing = find_missing(cls, merged, source)
    if missing:
        raise ConfigError("\n".join(missing))
    try:
        return _build(cls, merged)
    except (SimpoPipelineError, ArithmeticError, TypeError, ValueError) as error:  # of a dataclass
        if source == COMMAND_LINE:  # there is no file, and the message names the flag
            raise ConfigError(str(error)) from error
        origin = f"{source} with the {COMMAND_LINE}" if in_flags else source
        raise ConfigError(f"{origin}: {error}") from error


def _build(kind: Any, raw: Any) -> Any:
    """Return `raw`, which fits `kind`, with mappings as dataclasses, lists as tuples and integers as floats."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{name: _build(hints[name], inner) for name, inner in raw.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return None if raw is None else _build(_member(arguments, raw), raw)
    if origin is dict:
        return {name: _build(arguments[1], inner) for name, inner in raw.items()}
    if origin in (list, tuple):
        return origin(_build(arguments[0], inner) for inner in raw)
    return float(raw) if kind is float else raw


def _member(kinds: Sequence[Any], raw: Any) -> Any:
    """Return the member of a union that `raw` fits: a scalar type, or the member that contains other values."""
    scalar = next((kind for kind in kinds if fits(kind, raw)), None)
    return scalar or next(kind for kind in kinds if dataclasses.is_dataclass(kind) or typing.get_origin(kind))
