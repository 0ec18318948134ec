"""The code of step `prepare_pairs`."""

import dataclasses
import logging
import time

from simpo_pipeline.data.chat import load_tokenizer
from simpo_pipeline.data.config import PAIRS_FILE, VALIDATION_FILE
from simpo_pipeline.data.pairs import write_pairs
from simpo_pipeline.data.records import read_records
from simpo_pipeline.data.split import split_pairs
from simpo_pipeline.data.tokenize import tokenize_pairs
from simpo_pipeline.storage.output_folder import OutputFolder
from steps.prepare_pairs import PreparePairsConfig

logger = logging.getLogger("simpo_pipeline.steps.prepare_pairs")


def prepare_pairs(config: PreparePairsConfig, output: OutputFolder) -> None:
    """Write `pairs.parquet` and `summary.json` with the counts of kept, truncated and dropped pairs.

    Held-out pairs are written to `validation.parquet` instead.

    Raises:
        DataError: A row is malformed, a pair is too long or unusable and its treatment is `raise`, or no pair is left.
    """
    started = time.perf_counter()
    pairs, stats = tokenize_pairs(
        read_records(config.source),
        load_tokenizer(config.model_path),
        config.max_length,
        too_long=config.too_long,
        unusable=config.unusable,
        chat_config=config.chat_config,
    )
    training, held_out = split_pairs(pairs, config.validation_fraction)
    with output.open_write(PAIRS_FILE) as file:
        write_pairs(file, training)
    if held_out:
        with output.open_write(VALIDATION_FILE) as file:
            write_pairs(file, held_out)
    seconds = round(time.perf_counter() - started, 3)
    counts = {"num_training": len(training), "num_validation": len(held_out)}
    chat = {"chat_config": dataclasses.asdict(config.chat_config)}
    summary = {"source": config.source.path, **dataclasses.asdict(stats), **counts, **chat, "seconds": seconds}
    output.write_json("summary.json", summary)
    logger.info("pairs: %d kept, %d dropped, %d truncated", stats.num_pairs, stats.num_dropped, stats.num_truncated)
