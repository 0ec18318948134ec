"""Step `prepare_pairs`: tokenizes preference records into pairs."""

import dataclasses
import logging
import time

from simpo_pipeline.data.config import PAIRS_FILE, VALIDATION_FILE, PreferenceSource, TooLong, Unusable
from simpo_pipeline.executor.step import THIS_OUTPUT_PATH
from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.paths import join

logger = logging.getLogger(f"simpo_pipeline.{__name__}")


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
    output_path: str = THIS_OUTPUT_PATH


def prepare_pairs(config: PreparePairsConfig) -> None:
    """Write `pairs.parquet` and `summary.json` with the counts of kept, truncated and dropped pairs.

    Held-out pairs are written to `validation.parquet` instead.

    Raises:
        DataError: A row is malformed, a pair is too long or unusable and its treatment is `raise`, or no pair is left.
    """
    # Imported here because planning must not pay for numpy, pyarrow and transformers.
    from simpo_pipeline.data.chat import load_tokenizer
    from simpo_pipeline.data.pairs import write_pairs
    from simpo_pipeline.data.records import read_records
    from simpo_pipeline.data.split import split_pairs
    from simpo_pipeline.data.tokenize import tokenize_pairs

    started = time.perf_counter()
    pairs, stats = tokenize_pairs(
        read_records(config.source),
        load_tokenizer(config.model_path),
        config.max_length,
        too_long=config.too_long,
        unusable=config.unusable,
    )
    training, held_out = split_pairs(pairs, config.validation_fraction)
    write_pairs(join(config.output_path, PAIRS_FILE), training)
    if held_out:
        write_pairs(join(config.output_path, VALIDATION_FILE), held_out)
    seconds = round(time.perf_counter() - started, 3)
    counts = {"num_training": len(training), "num_validation": len(held_out)}
    summary = {"source": config.source.path, **dataclasses.asdict(stats), **counts, "seconds": seconds}
    write_json(join(config.output_path, "summary.json"), summary)
    logger.info("pairs: %d kept, %d dropped, %d truncated", stats.num_pairs, stats.num_dropped, stats.num_truncated)
