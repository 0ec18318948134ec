"""What a run keeps of its trainer: checkpoints on the way, and the trained weights at its end."""

import dataclasses

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, versioned
from simpo_pipeline.training.config import CheckpointConfig, TrainerConfig
from steps.export import WEIGHTS, ExportConfig, ExportWeights, export

# What `--export` takes, and what weights are stored in then.
EXPORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Keeping:
    """By itself a run keeps nothing but its outputs; the names are those of an experiment's flags."""

    export: str | None = None
    """Write the trained weights as a model folder that transformers loads: fp32 or bf16."""
    export_weights: ExportWeights = "params"
    """Which weights: params, those in training, or ema, their moving average."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When the trainer's state is written, for a job that was killed to go on from."""

    def __post_init__(self) -> None:
        if self.export is not None and self.export not in EXPORT_DTYPES:
            raise ConfigError(f"--export {self.export!r} is unknown; choose one of {', '.join(EXPORT_DTYPES)}")
        if self.export_weights not in WEIGHTS:
            raise ConfigError(
                f"--export_weights {self.export_weights!r} is unknown; choose one of {', '.join(WEIGHTS)}"
            )
        if self.export is None and self.export_weights != "params":
            raise ConfigError(f"--export_weights is {self.export_weights!r}, but nothing is exported; add --export")

    def export_steps(self, model: ExecutorStep, trained: ExecutorStep, trainer: TrainerConfig) -> list[ExecutorStep]:
        """The step `export`, which borrows what `trained` made of `model`; none where nothing is exported.

        Raises:
            ConfigError: the average of a run that keeps none.
        """
        if self.export is None:
            return []
        if self.export_weights == "ema" and trainer.ema_decay is None:
            raise ConfigError("--export_weights is 'ema', and this run keeps no average: set trainer.ema_decay")
        config = ExportConfig(
            trainer=borrow(trained),
            model_path=output_path_of(model),
            weights=versioned(self.export_weights),
            dtype=versioned(EXPORT_DTYPES[self.export]),
        )
        return [ExecutorStep("export", export, config)]


KEEPS_NOTHING = Keeping()
