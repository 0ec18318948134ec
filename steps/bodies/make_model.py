"""The code of step `make_model`."""

import logging

import jax
import numpy as np

from simpo_pipeline.data.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer
from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import save_weights
from simpo_pipeline.model.transformer import Llama, abstract_llama
from simpo_pipeline.storage.output_folder import OutputFolder
from steps.make_model import MakeModelConfig

logger = logging.getLogger("simpo_pipeline.steps.make_model")


def make_model(config: MakeModelConfig, output: OutputFolder) -> None:
    """Write config.json, fp32 safetensors, tokenizer files and `summary.json`.

    Raises:
        ModelError: The vocabulary is smaller than the byte tokenizer's.
    """
    if config.model.vocab_size < VOCAB_SIZE:
        raise ModelError(
            f"vocab_size must be at least {VOCAB_SIZE} for the byte tokenizer, got {config.model.vocab_size}"
        )
    with output.staged() as folder:
        write_byte_tokenizer(str(folder))
        save_weights(str(folder), _random_weights(config.model, config.seed))
    num_parameters = config.model.num_parameters
    output.write_json("summary.json", {"num_parameters": num_parameters, "seed": config.seed})
    logger.info("random model with %d parameters", num_parameters)


def _random_weights(model: LlamaConfig, seed: int) -> Llama:
    """Return weights on the host: normally distributed with standard deviation `initializer_range`; norms are one."""
    rng = np.random.Generator(np.random.Philox(seed))

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if "norm" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0.0, model.initializer_range, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract_llama(model, np.float32))
