"""Step `export`: the weights of a trainer, borrowed live, as a model folder in Hugging Face layout."""

import dataclasses
import fnmatch
import logging
import time
from typing import TYPE_CHECKING, Any, Literal

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.executor.step import THIS_OUTPUT_PATH, unwrap_versioned_value
from simpo_pipeline.job.session import session_of
from simpo_pipeline.storage.files import list_files, read_json, remove_tree, write_json
from simpo_pipeline.storage.paths import join
from steps.fetch_model import TOKENIZER_FILES, copy_files

if TYPE_CHECKING:
    from simpo_pipeline.model.transformer import Llama
    from simpo_pipeline.training.trainer import Trainer

logger = logging.getLogger(f"simpo_pipeline.{__name__}")

ExportDtype = Literal["float32", "bfloat16"]
ExportWeights = Literal["params", "ema"]
DTYPES, WEIGHTS = ("float32", "bfloat16"), ("params", "ema")
# Where Hugging Face itself cuts.
MAX_SHARD_BYTES = 5_000_000_000
# What belongs to a model besides its shape and weights.
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Which weights to write, and how.

    Attributes:
        trainer: A live `Trainer` borrowed from a training step (`borrow(step)`).
        model_path: Folder of the model that the run started from: its tokenizer, and the keys of its config.json.
        weights: `params`: the weights in training. `ema`: their moving average, where the run keeps one.
        dtype: What the weights are stored in; bfloat16 is rounded to nearest.
        max_shard_bytes: More than this is split into files with an index.
    """

    trainer: Any
    model_path: str
    weights: ExportWeights = "params"
    dtype: ExportDtype = "float32"
    max_shard_bytes: int = MAX_SHARD_BYTES
    output_path: str = THIS_OUTPUT_PATH

    def __post_init__(self) -> None:
        for name, allowed in (("weights", WEIGHTS), ("dtype", DTYPES)):
            value = unwrap_versioned_value(getattr(self, name))
            if value not in allowed:
                raise ConfigError(f"{name} of the export is {value!r}: give one of {', '.join(allowed)}.")
        max_shard_bytes = unwrap_versioned_value(self.max_shard_bytes)
        if max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes of the export is {max_shard_bytes}: give a number of bytes above 0.")


def export(config: ExportConfig, run: StepRun) -> None:
    """Fills `output_path` with config.json, safetensors, tokenizer files and `summary.json`; reads the trainer only.

    Every process takes part in gathering the weights; the leader writes.

    Raises:
        ConfigError: the average is asked for and the run keeps none, or `model_path` holds another model.
        StorageError: a file cannot be written.
    """
    # Imported here because planning must not import jax.
    from simpo_pipeline.model.hf_export import export_weights

    started = time.perf_counter()
    trainer: Trainer = config.trainer
    weights, is_leader = _weights(config, trainer), run.processes.is_leader
    model = _model_config(config, trainer)
    if is_leader:
        _remove_weights(config.output_path)
        copy_files(config.model_path, COPIED_FILES, config.output_path)
        write_json(join(config.output_path, "config.json"), model)
    files = export_weights(
        config.output_path,
        weights,
        trainer.abstract_params,
        trainer.mesh,
        programs=session_of(run).programs,
        dtype=config.dtype,
        max_shard_bytes=config.max_shard_bytes,
        writes=is_leader,
    )
    if is_leader:
        itemsize = 2 if config.dtype == "bfloat16" else 4
        summary = {
            "step": trainer.step,
            "weights": config.weights,
            "dtype": config.dtype,
            "num_files": len(files),
            "num_bytes": trainer.model_config.num_parameters * itemsize,
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_json(join(config.output_path, "summary.json"), summary)
        logger.info(
            "exported %s after update %d as %s: %.0f MB in %d files, %.1f s",
            *(config.weights, trainer.step, config.dtype, summary["num_bytes"] / 1e6, len(files), summary["seconds"]),
        )


def _weights(config: ExportConfig, trainer: "Trainer") -> "Llama":
    if config.weights == "params":
        return trainer.params
    if trainer.state.ema is None:
        raise ConfigError(
            "the export asks for the weights' moving average, and this run keeps none: set trainer.ema_decay, or "
            "export 'params'."
        )
    return trainer.state.ema


def _model_config(config: ExportConfig, trainer: "Trainer") -> dict[str, Any]:
    """The config.json that the run started from, tokens and all, with the dtype of what is exported."""
    # Imported here because planning must not import jax.
    from simpo_pipeline.model.config import LlamaConfig
    from simpo_pipeline.model.hf_weights import CONFIG_FILE

    original = read_json(join(config.model_path, CONFIG_FILE))
    if LlamaConfig.from_hf(original) != trainer.model_config:
        raise ConfigError(
            f"{config.model_path!r} holds a model of another shape than the trainer's, {trainer.model_config}; give "
            "the model_path that the run started from."
        )
    # transformers 5 calls it dtype and reads torch_dtype too; 4 knows the latter alone.
    kept = {key: value for key, value in original.items() if key not in ("dtype", "torch_dtype")}
    return {**kept, "torch_dtype": config.dtype}


def _remove_weights(output_path: str) -> None:
    """Removes what an attempt with other sizes left; a reader would take one file for the whole model."""
    for entry in list_files(output_path):
        if any(fnmatch.fnmatch(entry.relative_path, pattern) for pattern in _WEIGHT_FILES):
            remove_tree(join(output_path, entry.relative_path))
