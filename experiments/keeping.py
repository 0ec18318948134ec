"""Settings for what a run keeps of its trainer: checkpoints during the run, and the trained weights at its end."""

import dataclasses

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, versioned
from simpo_pipeline.training.config import CheckpointConfig, TrainerConfig
from steps.export import WEIGHTS, ExportConfig, ExportWeights, export

# Values of `--export`, and the data types that weights are then stored in.
EXPORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Parts of its state that a run keeps, by default none. Field names are those of an experiment's flags."""

    export: str | None = None
    """Write the trained weights as a model folder that transformers loads: fp32 or bf16."""
    export_weights: ExportWeights = "params"
    """Weights to export: params, the current weights, or ema, their moving average."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When the trainer's state is written, so that a killed job can resume from it."""

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
        """Return the step `export`, which borrows the trainer of `trained`; an empty list if nothing is exported.

        Raises:
            ConfigError: The moving average is to be exported, but the run keeps none.
        """
        if self.export is None:
            return []
        if self.export_weights == "ema" and trainer.ema_decay is None:
            raise ConfigError("--export_weights is 'ema', but this run keeps no moving average: set trainer.ema_decay")
        config = ExportConfig(
            trainer=borrow(trained),
            model_path=output_path_of(model),
            weights=versioned(self.export_weights),
            dtype=versioned(EXPORT_DTYPES[self.export]),
        )
        return [ExecutorStep("export", export, config)]


KEEPS_NOTHING = Keeping()
