"""Command line of experiments that are configured by a settings file.

    --config_path FILE.yaml [--prefix ...] [--dry_run] [--tracker ...] [--key.path value ...]

Arguments that are not flags of the executor are settings, and are checked like those in the file. The value of a text
setting is taken as it is: `--trainer.tracker.name 010` is the text 010. For text that may be missing, `null` means
none. All other values are YAML.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TypeVar

from simpo_pipeline.config_files.decode import COMMAND_LINE, decode_yaml
from simpo_pipeline.config_files.parse import parse_flags, split_flags
from simpo_pipeline.errors import ConfigError, StorageError
from simpo_pipeline.executor.arguments import parse_arguments
from simpo_pipeline.executor.main import usage_errors_reported
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.storage.files import read_text

# The page that lists settings of other projects, and what to do instead.
SETTINGS_PAGE = "docs/settings.md"

T = TypeVar("T")
FlagsT = TypeVar("FlagsT", bound=JobFlags)


@dataclasses.dataclass(frozen=True)
class _FileFlags:
    """The flag that names the settings file."""

    config_path: str


def read_settings(cls: type[T], path: str, flags: Sequence[str]) -> T:
    """Return the settings of a YAML file at any storage path. Settings on the command line override the file.

    Raises:
        ConfigError: The file cannot be read, or settings are wrong (one sentence each).
    """
    try:
        text = read_text(path)
    except StorageError as error:
        raise ConfigError(f"--config_path: {error}") from error
    return decode_yaml(cls, text, source=path, flags=flags, page=SETTINGS_PAGE)


def parse_command_line(cls: type[T], words: Sequence[str], flags_class: type[FlagsT]) -> tuple[T, FlagsT]:
    """Return the settings and the flags of a command line. `--help` prints the flags and exits.

    Raises:
        ConfigError: A flag, the file or a setting is wrong.
    """
    file_words, others = split_flags(words, ["config_path"])
    own_words, settings_words = split_flags(others, [*setting_names(flags_class), "help"])
    if "-h" in own_words or "--help" in own_words:
        print(f"Settings: --config_path FILE.yaml and --key.path value, below {', '.join(setting_names(cls))}.")
    flags = parse_arguments(flags_class, own_words)
    path = parse_flags(file_words, COMMAND_LINE, _FileFlags).get("config_path")
    if not isinstance(path, str):
        raise ConfigError("--config_path is missing; give a YAML file, such as one of experiments/configs/")
    return read_settings(cls, path, settings_words), flags


def setting_names(cls: type) -> list[str]:
    """Return the top-level names of a settings file or of flags."""
    return [field.name for field in dataclasses.fields(cls)]


def parse_command_line_or_exit(cls: type[T], flags_class: type[FlagsT]) -> tuple[T, FlagsT]:
    """Call `parse_command_line` with this script's arguments. On an error, print its message and exit with 2."""
    with usage_errors_reported():
        return parse_command_line(cls, sys.argv[1:], flags_class)
