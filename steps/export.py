"""Step `export`: writes the weights of a borrowed live trainer as a model folder in Hugging Face layout."""

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
# The default shard size of Hugging Face.
MAX_SHARD_BYTES = 5_000_000_000
# The files of a model besides config.json and its weights.
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


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
                raise ConfigError(f"export {name} is {value!r}; expected one of {', '.join(allowed)}.")
        max_shard_bytes = unwrap_versioned_value(self.max_shard_bytes)
        if max_shard_bytes < 1:
            raise ConfigError(f"export max_shard_bytes is {max_shard_bytes}; expected at least 1.")


def export(config: ExportConfig, run: StepRun) -> None:
    """Write config.json, safetensors, tokenizer files and `summary.json` to `output_path`.

    The trainer is only read. Every process takes part in gathering the weights, and the leader writes the files.

    Raises:
        ConfigError: The moving average is requested but the run keeps none, or `model_path` contains a different model.
        StorageError: A file cannot be written.
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
            "export weights is 'ema', but this run keeps no moving average: set trainer.ema_decay, or export 'params'."
        )
    return trainer.state.ema


def _model_config(config: ExportConfig, trainer: "Trainer") -> dict[str, Any]:
    """Return all keys of the config.json that the run started from, with the dtype of the export."""
    # Imported here because planning must not import jax.
    from simpo_pipeline.model.config import LlamaConfig
    from simpo_pipeline.model.hf_weights import CONFIG_FILE

    original = read_json(join(config.model_path, CONFIG_FILE))
    if LlamaConfig.from_hf(original) != trainer.model_config:
        raise ConfigError(
            f"{config.model_path!r} contains a model whose shape differs from the trainer's, {trainer.model_config}; "
            "give the model_path that the run started from."
        )
    # transformers 5 calls it dtype and also reads torch_dtype; transformers 4 only reads torch_dtype.
    kept = {key: value for key, value in original.items() if key not in ("dtype", "torch_dtype")}
    return {**kept, "torch_dtype": config.dtype}


def _remove_weights(output_path: str) -> None:
    """Remove weight files of an earlier attempt with other shard sizes, which readers would take for the model."""
    for entry in list_files(output_path):
        if any(fnmatch.fnmatch(entry.relative_path, pattern) for pattern in _WEIGHT_FILES):
            remove_tree(join(output_path, entry.relative_path))
