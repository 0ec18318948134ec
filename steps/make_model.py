"""Step `make_model`: writes a model with random weights and a byte tokenizer, in Hugging Face layout.

Tests train such a model instead of a fetched one. Nothing is downloaded, and no device is touched.
"""

import dataclasses

from simpo_pipeline.executor.step import imported_step
from simpo_pipeline.model.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class MakeModelConfig:
    """Shape of the model, with a `vocab_size` of at least the byte tokenizer's, and the seed of its weights."""

    model: LlamaConfig
    seed: int = 0


make_model = imported_step("steps.bodies.make_model.make_model", module=__name__, takes=("output",))
"""Write config.json, fp32 safetensors, tokenizer files and `summary.json`."""
