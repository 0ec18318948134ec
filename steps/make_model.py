"""Step `make_model`: writes a model with random weights and a byte tokenizer, in Hugging Face layout.

Tests train such a model instead of a fetched one. Nothing is downloaded, and no device is touched.
"""

import dataclasses
import logging
from typing import TYPE_CHECKING

from simpo_pipeline.errors import ModelError
from simpo_pipeline.executor.step import THIS_OUTPUT_PATH
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.paths import join
from simpo_pipeline.storage.staging import staged_folder

if TYPE_CHECKING:
    from simpo_pipeline.model.transformer import Llama

logger = logging.getLogger(f"simpo_pipeline.{__name__}")


@dataclasses.dataclass(frozen=True)
class MakeModelConfig:
    """Shape of the model, with a `vocab_size` of at least the byte tokenizer's, and the seed of its weights."""

    model: LlamaConfig
    seed: int = 0
    output_path: str = THIS_OUTPUT_PATH


def make_model(config: MakeModelConfig) -> None:
    """Write config.json, fp32 safetensors, tokenizer files and `summary.json` to `output_path`.

    Raises:
        ModelError: The vocabulary is smaller than the byte tokenizer's.
    """
    # Imported here because planning must not import jax.
    from simpo_pipeline.data.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer
    from simpo_pipeline.model.hf_weights import save_weights

    if config.model.vocab_size < VOCAB_SIZE:
        raise ModelError(
            f"vocab_size must be at least {VOCAB_SIZE} for the byte tokenizer, got {config.model.vocab_size}"
        )
    with staged_folder(config.output_path) as folder:
        write_byte_tokenizer(str(folder))
        save_weights(str(folder), _random_weights(config.model, config.seed))
    num_parameters = config.model.num_parameters
    write_json(join(config.output_path, "summary.json"), {"num_parameters": num_parameters, "seed": config.seed})
    logger.info("random model with %d parameters", num_parameters)


def _random_weights(model: LlamaConfig, seed: int) -> "Llama":
    """Return weights on the host: normally distributed with standard deviation `initializer_range`; norms are one."""
    # Imported here because planning must not import jax.
    import jax
    import numpy as np

    from simpo_pipeline.model.transformer import abstract_llama

    rng = np.random.Generator(np.random.Philox(seed))

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if "norm" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0.0, model.initializer_range, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract_llama(model, np.float32))
