"""Where preference data comes from and what happens to rows that cannot be used as they are.

Plain values: nothing is looked up or read here.
"""

from dataclasses import dataclass
from typing import Literal

from simpo_pipeline.errors import ConfigError

TooLong = Literal["raise", "truncate", "drop"]
"""What happens to a pair longer than the maximum: an error, its answers' tails cut, or the pair left out (counted)."""

Unusable = Literal["raise", "drop"]
"""What happens to a pair without a preference (an empty answer, or two equal ones): an error, or left out (counted)."""


@dataclass(frozen=True)
class PreferenceSource:
    """Preference data: files, or one split of a dataset on the Hugging Face hub.

    Without `split`, `path` is a `.jsonl` or `.parquet` file at any local path or fsspec URL; `*`, `?` and `[...]`
    match within one folder level, and all matching files are read in the order of their names.
    With `split`, `path` is a dataset id (`HuggingFaceH4/ultrafeedback_binarized`), whose Parquet files of that split
    are read at `revision` (a commit, tag or branch; None is the default branch).
    """

    path: str
    split: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and self.split is None:
            raise ConfigError(
                f"PreferenceSource: revision {self.revision!r} is given without split; a revision belongs to a hub "
                f"dataset, which also needs split (for files by URL write hf://datasets/<id>@<revision>/<file>)"
            )
