"""Step `export`: writes the weights of a borrowed live trainer as a model folder in Hugging Face layout."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import (
    LiveInput,
    LiveUse,
    imported_step,
    outside_path,
    require_live_use,
    unwrap_versioned_value,
)
from steps.fetch_model import MODEL_FILES, TOKENIZER_FILES
from steps.train import TrainConfig

if TYPE_CHECKING:
    from simpo_pipeline.training.trainer import Trainer

ExportDtype = Literal["float32", "bfloat16"]
ExportWeights = Literal["params", "ema"]
DTYPES, WEIGHTS = ("float32", "bfloat16"), ("params", "ema")
# The default shard size of Hugging Face.
MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Weights to write, and their format.

    Attributes:
        trainer: A live `Trainer` borrowed from a training step (`borrow(step)`).
        model_path: Folder of the model that the run started from. Its tokenizer and the keys of its config.json are
            copied.
        weights: `params`: the current weights. `ema`: their moving average, if the run keeps one.
        dtype: Data type of the stored weights. Conversion to bfloat16 rounds to nearest.
        max_shard_bytes: Weights with more bytes than this are split into several files with an index.
    """

    trainer: "Trainer"
    model_path: str = dataclasses.field(metadata=outside_path((*MODEL_FILES, *TOKENIZER_FILES)))
    weights: ExportWeights = "params"
    dtype: ExportDtype = "float32"
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        require_live_use("ExportConfig.trainer", self.trainer, LiveUse.BORROW)
        for name, allowed in (("weights", WEIGHTS), ("dtype", DTYPES)):
            value = unwrap_versioned_value(getattr(self, name))
            if value not in allowed:
                raise ConfigError(f"export {name} is {value!r}; expected one of {', '.join(allowed)}.")
        max_shard_bytes = unwrap_versioned_value(self.max_shard_bytes)
        if max_shard_bytes < 1:
            raise ConfigError(f"export max_shard_bytes is {max_shard_bytes}; expected at least 1.")
        if isinstance(self.trainer, LiveInput) and isinstance(self.trainer.step.config, TrainConfig):
            run = unwrap_versioned_value(self.trainer.step.config.trainer)
            self.check_kept(has_average=run.ema_decay is not None)

    def check_kept(self, *, has_average: bool) -> None:
        """Check that the run keeps the requested weights.

        Raises:
            ConfigError: The moving average is requested, but the run keeps none.
        """
        if unwrap_versioned_value(self.weights) == "ema" and not has_average:
            raise ConfigError(
                "export weights is 'ema', but this run keeps no moving average: set trainer.ema_decay, or export "
                "'params'."
            )


export = imported_step("steps.bodies.export.export", module=__name__, takes=("run",))
"""Write config.json, safetensors, tokenizer files and `summary.json`."""
