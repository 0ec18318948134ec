"""Step `make_model`: a model of a given shape with random weights and a byte tokenizer, in Hugging Face layout.

What tests and dry runs of the pipeline train instead of a fetched model. Nothing is downloaded.
"""

import dataclasses
import logging

from simpo_pipeline.errors import ModelError
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.executor.step import THIS_OUTPUT_PATH
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.paths import join
from simpo_pipeline.storage.staging import staged_folder
from steps.session import session_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MakeModelConfig:
    """The model's shape (`vocab_size` at least the byte tokenizer's) and the seed of its weights."""

    model: LlamaConfig
    seed: int = 0
    output_path: str = THIS_OUTPUT_PATH


def make_model(config: MakeModelConfig, run: StepRun) -> None:
    """Fills `output_path` with config.json, model.safetensors (fp32), tokenizer files, and `summary.json`.

    Raises:
        ModelError: the vocabulary is smaller than the byte tokenizer's.
    """
    # Imported here because planning must not import jax.
    import jax
    import numpy as np

    from simpo_pipeline.data.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer
    from simpo_pipeline.model.hf_weights import save_weights
    from simpo_pipeline.model.transformer import init_llama

    if config.model.vocab_size < VOCAB_SIZE:
        raise ModelError(
            f"vocab_size must be at least {VOCAB_SIZE} for the byte tokenizer, got {config.model.vocab_size}"
        )
    init = session_of(run).programs.compile(
        "init_model",
        lambda seed: init_llama(config.model, jax.random.key(seed)),
        jax.ShapeDtypeStruct((), "uint32"),
    )
    with staged_folder(config.output_path) as folder:
        write_byte_tokenizer(folder)
        save_weights(str(folder), init(np.uint32(config.seed)))
    num_parameters = config.model.num_parameters
    write_json(join(config.output_path, "summary.json"), {"num_parameters": num_parameters, "seed": config.seed})
    logger.info("random model with %d parameters", num_parameters)
