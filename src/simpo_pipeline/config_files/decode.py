"""Settings from a YAML document and the command line into a frozen dataclass, or an error that names key and place.

The keys are checked here, one sentence for each that is wrong; draccus then builds the dataclasses. Files are read by
the caller: this module knows text, and not where it was stored.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import draccus
from draccus.utils import DraccusException

from simpo_pipeline.config_files.check import find_misfits, find_missing
from simpo_pipeline.config_files.parse import merge, parse_flags, parse_yaml
from simpo_pipeline.errors import ConfigError, SimpoPipelineError

COMMAND_LINE = "command line"

T = TypeVar("T")


def decode_yaml(
    cls: type[T], text: str, *, source: str, flags: Sequence[str] = (), retired: Mapping[str, str] | None = None
) -> T:
    """The settings in `text`, with those of the command line in place of its own.

    Args:
        cls: A dataclass; its annotations say what each key may hold.
        text: A YAML document.
        source: The path of the document, which begins each complaint about it.
        flags: Command-line words such as `--trainer.num_train_steps 3`; keys are dotted.
        retired: Dotted key (`*` for names in a dict) to what to do instead: "set x instead", "leave it out".

    Raises:
        ConfigError: a key is unknown, retired, given twice, missing or of the wrong type, one sentence each;
            or the values do not go together, as the dataclasses say.
    """
    in_file = parse_yaml(text, source)
    in_flags = parse_flags(flags, COMMAND_LINE)
    misfits = find_misfits(cls, in_file, source, retired or {}) + find_misfits(
        cls, in_flags, COMMAND_LINE, retired or {}
    )
    if misfits:
        raise ConfigError("\n".join(misfits))
    merged = merge(in_file, in_flags)
    missing = find_missing(cls, merged, source)
    if missing:
        raise ConfigError("\n".join(missing))
    try:
        return draccus.decode(cls, merged)
    except (DraccusException, SimpoPipelineError) as error:
        place = f"{source} with the {COMMAND_LINE}" if in_flags else source
        raise ConfigError(f"{place}: {_innermost_reason(error)}") from error


def _innermost_reason(error: BaseException) -> str:
    """What the dataclass itself said; draccus wraps it in its own words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SimpoPipelineError):
            return str(cause)
        cause = cause.__cause__
    return " ".join(str(error).split())
