"""Step `prepare_pairs`: tokenizes preference records into pairs."""

import dataclasses

from simpo_pipeline.data.config import ChatConfig, PreferenceSource, TooLong, Unusable
from simpo_pipeline.data.source_files import source_files
from simpo_pipeline.errors import DataError
from simpo_pipeline.executor.step import ContentOf, imported_step, outside_path, unwrap_versioned_value, versioned
from simpo_pipeline.storage.content import is_identified_by_name
from steps.fetch_model import TOKENIZER_FILES


@dataclasses.dataclass(frozen=True)
class PreparePairsConfig:
    """Records to read, and how to tokenize them.

    Attributes:
        source: JSONL or Parquet files at any storage path, or a split of a hub dataset.
        model_path: Folder with the tokenizer and its chat template.
        max_length: Maximum number of tokens of a prompt with one of its answers.
        too_long: Treatment of longer pairs: `raise`, `truncate` (the ends of the answers) or `drop`.
        unusable: Treatment of pairs without a preference: `raise` or `drop`.
        validation_fraction: Approximate share of the prompts to hold out for evaluation.
        source_id: Identifies the data in the step's version. By default these are the checksums of the files, or the
            name and revision of a hub dataset.
        chat_config: How conversations become tokens: the date in the template, and the treatment of messages that the
            model would not read as they were written.
    """

    source: PreferenceSource
    model_path: str = dataclasses.field(metadata=outside_path(("config.json", *TOKENIZER_FILES)))
    max_length: int
    too_long: TooLong = "raise"
    unusable: Unusable = "raise"
    validation_fraction: float = 0.0
    source_id: str | None = None
    chat_config: ChatConfig = dataclasses.field(default_factory=ChatConfig)

    def __post_init__(self) -> None:
        if self.source_id is None:
            source = unwrap_versioned_value(self.source)
            by_name = source.split is not None or is_identified_by_name(source.path)
            found = versioned(str(source)) if by_name else ContentOf(str(source), lambda: _files_of(source))
            object.__setattr__(self, "source_id", found)


def _files_of(source: PreferenceSource) -> list[str]:
    try:
        return source_files(source)
    except DataError:
        return [source.path]  # the step itself raises the error


prepare_pairs = imported_step("steps.bodies.prepare_pairs.prepare_pairs", module=__name__, takes=("output",))
"""Write `pairs.parquet` and `summary.json` with the counts of kept, truncated and dropped pairs."""
