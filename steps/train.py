"""Step `train`: runs one phase of SimPO updates, with a new trainer or with one taken live from an earlier step."""

import dataclasses
import math
from typing import TYPE_CHECKING

from simpo_pipeline.data.config import PAIRS_FILE, VALIDATION_FILE
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import (
    LiveInput,
    LiveUse,
    imported_step,
    outside_path,
    require_live_use,
    unwrap_versioned_value,
)
from simpo_pipeline.training.config import CheckpointConfig, TrainerConfig
from steps.fetch_model import MODEL_FILES, TOKENIZER_FILES

if TYPE_CHECKING:
    from simpo_pipeline.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class WeightedPairs:
    """One of several datasets: an output of `prepare_pairs`, and its weight relative to the others."""

    path: str = dataclasses.field(metadata=outside_path((PAIRS_FILE, VALIDATION_FILE)))
    weight: float

    def __post_init__(self) -> None:
        weight = unwrap_versioned_value(self.weight)
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"the weight of {self.path} is {weight}: give a finite number above 0, or leave the dataset out"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training phase of a run.

    Attributes:
        trainer: Config of the whole run: its length, schedule, data order and loss. Equal in all phases of the run.
        model_path: Folder of the model: its tokenizer, and its weights to start from if `live` is None.
        pairs_path: Output of `prepare_pairs`, or several outputs with their weights. A phase with the same pairs as the
            phase before it continues where that phase stopped. Other pairs are read from their beginning.
        stop_step: The last update of this phase, counted over the whole run.
        eval_every: Number of updates between two evaluations of the pairs that `prepare_pairs` held out. They are also
            evaluated before the first and after the last update of the run. None disables evaluation.
        tensor_parallel: Number of neighboring devices over which each matrix is also sharded. Only the phase that
            starts the run uses it.
        live: A `Trainer` taken from an earlier step (`take(step)`). This step becomes its owner.
        checkpoint: When the state is written, so that a killed job can resume. It is not part of the step's identity,
            because no output depends on it.
    """

    trainer: TrainerConfig
    model_path: str = dataclasses.field(metadata=outside_path((*MODEL_FILES, *TOKENIZER_FILES)))
    pairs_path: str | tuple[WeightedPairs, ...] = dataclasses.field(
        metadata=outside_path((PAIRS_FILE, VALIDATION_FILE))
    )
    stop_step: int
    eval_every: int | None = None
    tensor_parallel: int = 1
    live: "Trainer | None" = None
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require_live_use("TrainConfig.live", self.live, LiveUse.TAKE)
        stop_step = unwrap_versioned_value(self.stop_step)
        num_train_steps = unwrap_versioned_value(self.trainer).num_train_steps
        if not 1 <= stop_step <= num_train_steps:
            raise ConfigError(f"stop_step is {stop_step}; expected 1 to {num_train_steps}, the updates of the run")
        eval_every = unwrap_versioned_value(self.eval_every)
        if eval_every is not None and eval_every < 1:
            raise ConfigError(f"eval_every is {eval_every}; expected None or a number of updates of at least 1")
        if self.pairs_path == ():
            raise ConfigError("pairs_path is empty; give one output of prepare_pairs, or several with their weights")
        if isinstance(self.live, LiveInput) and isinstance(self.live.step.config, TrainConfig):
            before = self.live.step.config
            self.check_continues(unwrap_versioned_value(before.trainer), unwrap_versioned_value(before.stop_step))

    def check_continues(self, trainer: TrainerConfig, step: int) -> None:
        """Check that this phase can follow `step` updates of a run with the config `trainer`.

        Raises:
            ConfigError: The run is another one, or has no update left for this phase.
        """
        own = unwrap_versioned_value(self.trainer)
        if trainer != own:
            raise ConfigError(
                f"the live trainer belongs to another run: its config is {trainer}, but this step's is {own}; all "
                "phases of a run must have the same trainer config"
            )
        stop_step = unwrap_versioned_value(self.stop_step)
        if stop_step <= step:
            raise ConfigError(
                f"stop_step is {stop_step}, but the live trainer has finished {step} updates; expected {step + 1} to "
                f"{own.num_train_steps}, so that this phase has at least one update"
            )

    @property
    def datasets(self) -> tuple[WeightedPairs, ...]:
        """The datasets to train on; a single dataset has weight 1."""
        return (WeightedPairs(self.pairs_path, 1.0),) if isinstance(self.pairs_path, str) else self.pairs_path

    def evaluates_after(self, step: int) -> bool:
        """Return whether the held-out pairs are evaluated after update `step`."""
        return self.eval_every is not None and (step % self.eval_every == 0 or step == self.trainer.num_train_steps)


train = imported_step("steps.bodies.train.train", module=__name__, takes=("run",))
"""Run the updates up to `stop_step`, write `metrics.jsonl` and `summary.json`, and return the live trainer."""
