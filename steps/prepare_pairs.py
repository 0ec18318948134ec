"""Step `prepare_pairs`: tokenizes preference records into pairs."""

import dataclasses

from simpo_pipeline.data.config import PreferenceSource, TooLong, Unusable
from simpo_pipeline.executor.step import imported_step


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
        source_id: Identifies the data in the step's version, because a path alone does not identify the contents of a
            file.
    """

    source: PreferenceSource
    model_path: str
    max_length: int
    too_long: TooLong = "raise"
    unusable: Unusable = "raise"
    validation_fraction: float = 0.0
    source_id: str | None = None


prepare_pairs = imported_step("steps.bodies.prepare_pairs.prepare_pairs", module=__name__, takes=("output",))
"""Write `pairs.parquet` and `summary.json` with the counts of kept, truncated and dropped pairs."""
