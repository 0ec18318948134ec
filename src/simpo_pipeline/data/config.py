"""Configuration of preference data: its source, and the treatment of rows that cannot be used as they are.

Plain values: this module does not look up or read anything.
"""

from dataclasses import dataclass
from typing import Literal

from simpo_pipeline.errors import ConfigError

PAIRS_FILE = "pairs.parquet"
"""File of tokenized pairs to train on, in the outputs of the step `prepare_pairs`."""
VALIDATION_FILE = "validation.parquet"
"""File of tokenized pairs that are held out for evaluation, in the same folder."""

TooLong = Literal["raise", "truncate", "drop"]
"""Treatment of a pair longer than the maximum: raise an error, truncate its answers, or drop the pair (counted)."""

Unusable = Literal["raise", "drop"]
"""Treatment of a pair without a preference (an empty answer or two equal ones): raise an error or drop it (counted)."""


@dataclass(frozen=True)
class PreferenceSource:
    """Preference data: files, or one split of a dataset on the Hugging Face hub.

    Without `split`, `path` is a `.jsonl` or `.parquet` file at any local path or fsspec URL; `*`, `?` and `[...]`
    match within one folder level, and all matching files are read in name order.
    With `split`, `path` is a dataset id (`HuggingFaceH4/ultrafeedback_binarized`). The Parquet files of that split are
    read at `revision` (a commit, tag or branch; None is the default branch).
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
