"""Evaluation of a training step on the pairs that `prepare_pairs` held out."""

import dataclasses
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from simpo_pipeline.data.config import VALIDATION_FILE
from simpo_pipeline.data.pairs import TokenizedPair, read_pairs, tokens_digest
from simpo_pipeline.data.sweep import PairSweep
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.storage.files import exists
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join
from simpo_pipeline.tracking.tracker import Tracker
from simpo_pipeline.training.evaluation import EVALUATIONS_FILE, accuracy
from simpo_pipeline.training.trainer import Trainer

logger = logging.getLogger(__name__)


def read_held_out(pairs_paths: Sequence[str]) -> list[TokenizedPair]:
    """Return the held-out pairs of all datasets.

    Raises:
        ConfigError: No pairs were held out.
    """
    paths = [path for path in (join(folder, VALIDATION_FILE) for folder in pairs_paths) if exists(path)]
    if not paths:
        raise ConfigError(
            f"eval_every is set, but there is no {VALIDATION_FILE} in {', '.join(pairs_paths)}: set "
            "validation_fraction of prepare_pairs too"
        )
    return [pair for path in paths for pair in read_pairs(path)]


def open_sweep(pairs: Sequence[TokenizedPair], trainer: Trainer, pad_id: int) -> PairSweep:
    """Return the pairs in batches with the settings of the trainer."""
    return PairSweep(
        pairs=pairs,
        batch_size=trainer.config.train_batch_size,
        seq_len=trainer.config.train_seq_len,
        pad_id=pad_id,
        packing=trainer.config.packing,
        num_groups=trainer.num_groups,
    )


class Evaluator:
    """Evaluator of a trainer. Every process must call `evaluate`; only the leader writes a row each time."""

    def __init__(
        self, trainer: Trainer, sweep: PairSweep, tracker: Tracker, output: OutputFolder, *, is_leader: bool
    ) -> None:
        self._trainer = trainer
        self._sweep = trainer.in_run_shape(sweep)
        self._pairs_digest = tokens_digest(sweep.pairs)
        self._tracker = tracker
        self._file = output.open_rows(EVALUATIONS_FILE) if is_leader else None
        self.rows: list[dict[str, Any]] = []
        """The rows written so far."""

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, traceback)

    def write(self, row: dict[str, Any]) -> None:
        """Write a row to the step's outputs."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(row)

    def evaluate(self) -> None:
        """Evaluate the current weights on the held-out pairs, and record and log the result."""
        step, found = self._trainer.step, self._trainer.evaluate(self._sweep)
        estimate = accuracy(found.margins)
        row: dict[str, Any] = {
            "step": step,
            "pairs": len(found.margins),
            "pairs_digest": self._pairs_digest,
            **found.metrics,
            "accuracy": dataclasses.asdict(estimate),
            "margins": list(found.margins),
        }
        self.write(row)
        self._tracker.log({f"eval/{name}": value for name, value in found.metrics.items()}, step=step)
        logger.info(
            "after update %d: loss %.5f, accuracy %.3f (95%% %.3f to %.3f) on %d held-out pairs",
            *(step, found.metrics["loss"], estimate.value, estimate.low, estimate.high, len(found.margins)),
        )
