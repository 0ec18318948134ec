"""The code of step `export`."""

import fnmatch
import logging
import time
from typing import Any

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.job.session import session_of
from simpo_pipeline.model.hf_export import export_weights
from simpo_pipeline.model.hf_weights import CONFIG_FILE, load_config
from simpo_pipeline.model.transformer import Llama
from simpo_pipeline.storage.files import list_files, read_json
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join
from simpo_pipeline.training.trainer import Trainer
from steps.export import ExportConfig
from steps.fetch_model import TOKENIZER_FILES, copy_files

logger = logging.getLogger("simpo_pipeline.steps.export")
# The files of a model besides config.json and its weights.
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def export(config: ExportConfig, run: StepRun) -> None:
    """Write config.json, safetensors, tokenizer files and `summary.json`.

    The trainer is only read. Every process takes part in gathering the weights, and the leader writes the files.

    Raises:
        ConfigError: The moving average is requested but the run keeps none, or `model_path` contains a different model.
        StorageError: A file cannot be written.
    """
    started = time.perf_counter()
    trainer = config.trainer
    weights, is_leader = _weights(config, trainer), run.processes.is_leader
    model = _model_config(config, trainer)
    if is_leader:
        _remove_weights(run.output)
        copy_files(config.model_path, COPIED_FILES, run.output)
        run.output.write_json("config.json", model)
    files = export_weights(
        run.output,
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
        run.output.write_json("summary.json", summary)
        logger.info(
            "exported %s after update %d as %s: %.0f MB in %d files, %.1f s",
            *(config.weights, trainer.step, config.dtype, summary["num_bytes"] / 1e6, len(files), summary["seconds"]),
        )


def _weights(config: ExportConfig, trainer: Trainer) -> Llama:
    average = trainer.state.ema
    config.check_kept(has_average=average is not None)
    return trainer.params if config.weights == "params" or average is None else average


def _model_config(config: ExportConfig, trainer: Trainer) -> dict[str, Any]:
    """Return all keys of the config.json that the run started from, with the dtype of the export."""
    original, found = read_json(join(config.model_path, CONFIG_FILE)), load_config(config.model_path)
    if found != trainer.model_config:
        raise ConfigError(
            f"{config.model_path!r} contains a model whose shape differs from the trainer's, {trainer.model_config}; "
            "give the model_path that the run started from."
        )
    # transformers 5 calls it dtype and also reads torch_dtype; transformers 4 only reads torch_dtype.
    kept = {key: value for key, value in original.items() if key not in ("dtype", "torch_dtype")}
    if kept.get("tie_word_embeddings", False) != found.tie_word_embeddings:
        kept["tie_word_embeddings"] = found.tie_word_embeddings  # the weights have a head of their own
    return {**kept, "torch_dtype": config.dtype}


def _remove_weights(output: OutputFolder) -> None:
    """Remove weight files of an earlier attempt with other shard sizes, which readers would take for the model."""
    for entry in list_files(output.path):
        if any(fnmatch.fnmatch(entry.relative_path, pattern) for pattern in _WEIGHT_FILES):
            output.remove(entry.relative_path)
