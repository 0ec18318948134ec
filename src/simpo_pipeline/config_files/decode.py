"""Decoding of a YAML document and the command line to a frozen dataclass, or an error that names key and source.

This module checks the keys, with one sentence for each that is wrong; draccus then builds the dataclasses. The caller
reads the files: this module knows text, but not where it is stored.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import draccus
from draccus.utils import DraccusException

from simpo_pipeline.config_files.check import find_missing, find_type_errors
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
        return draccus.decode(cls, merged)
    except (DraccusException, SimpoPipelineError) as error:
        reason = _innermost_reason(error)
        if source == COMMAND_LINE:  # there is no file, and the reason names the flag
            raise ConfigError(reason) from error
        origin = f"{source} with the {COMMAND_LINE}" if in_flags else source
        raise ConfigError(f"{origin}: {reason}") from error


def _innermost_reason(error: BaseException) -> str:
    """Return the message of the dataclass itself, without the text that draccus wraps around it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SimpoPipelineError):
            return str(cause)
        cause = cause.__cause__
    return " ".join(str(error).split())
