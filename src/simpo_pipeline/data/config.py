"""Configuration of preference data: its source, the treatment of rows that cannot be used as they are, and of chats.

Plain values: this module does not look up or read anything.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from simpo_pipeline.errors import ConfigError

PAIRS_FILE = "pairs.parquet"
"""File of tokenized pairs to train on, in the outputs of the step `prepare_pairs`."""
VALIDATION_FILE = "validation.parquet"
"""File of tokenized pairs that are held out for evaluation, in the same folder."""

TooLong = Literal["raise", "truncate", "drop"]
"""Treatment of a pair longer than the maximum: raise an error, truncate its answers, or drop the pair (counted)."""

Unusable = Literal["raise", "drop"]
"""Treatment of a pair without a preference (an empty answer or two equal ones): raise an error or drop it (counted)."""

SpecialText = Literal["raise", "parse", "plain"]
"""Treatment of the text of a special token inside a message, such as `<|im_end|>` in a user's sentence: raise an error,
parse it as that token (counted), or encode it as ordinary text (counted)."""

Inexact = Literal["raise", "count"]
"""Treatment of a conversation whose tokens are not exactly those of its text: raise an error, or accept and count."""


@dataclass(frozen=True)
class ChatConfig:
    """How conversations become tokens. All fields change tokens: a step whose config differs marks it with `versioned`.

    Attributes:
        date: The date for templates that print today's date, as ISO text (`2024-07-26`, or with a time). None: such a
            template is refused, because its tokens would change from day to day.
        special_text: Treatment of the text of special tokens inside a message.
        omitted_text: Treatment of a message that the template does not print whole (a template that removes the
            reasoning of earlier turns, for example). White space around a message may be trimmed in any case, and is
            counted.
        unencodable_text: Treatment of characters that the tokenizer cannot represent.
        merged_border: Treatment of an answer whose beginning would share a token with the end of the prompt, such as a
            line break after a line break. With `count`, the prompt has the tokens that generation starts from, and the
            answer is tokenized separately.
    """

    date: str | None = None
    special_text: SpecialText = "raise"
    omitted_text: Inexact = "raise"
    unencodable_text: Inexact = "raise"
    merged_border: Inexact = "raise"

    def __post_init__(self) -> None:
        for name in ("special_text", "omitted_text", "unencodable_text", "merged_border"):
            value, allowed = getattr(self, name), SpecialText if name == "special_text" else Inexact
            if value not in get_args(allowed):
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(get_args(allowed))}")
        if self.date is not None:
            try:
                datetime.fromisoformat(self.date)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"date is {self.date!r}; expected an ISO date such as 2024-07-26") from error


DEFAULT_CHAT = ChatConfig()
"""Everything that the model would not read as it was written is refused."""


@dataclass(frozen=True)
class PreferenceSource:
    """Preference data: files, or one split of a dataset on the Hugging Face hub.

    Without `split`, `path` is a JSONL, JSON or Parquet file (`data/source_files.py`) at any local path or fsspec URL.
    If nothing of that name exists, it is a pattern: `*`, `?` and `[...]` match within one folder level, and all
    matching files are read in name order.
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
