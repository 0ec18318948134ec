"""Step `fetch_model` for settings that restate the model's shape: fetch, then compare with its config.json.

The shape of a checkpoint is known only once it is here, so this is the first moment at which a contradiction can be
seen. It is before any device is touched: a fetch that fails blocks every step after it.
"""

import dataclasses
from typing import Any

from experiments.settings.model import ModelSettings, contradictions
from simpo_pipeline.errors import ModelError
from simpo_pipeline.executor.step import THIS_OUTPUT_PATH, ExecutorStep, versioned
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.storage.files import read_json
from simpo_pipeline.storage.paths import join
from steps.fetch_model import FetchModelConfig, fetch_model


@dataclasses.dataclass(frozen=True)
class FetchCheckedModelConfig:
    """A model's source as in `FetchModelConfig`, and what `ModelSettings.stated_shape` expects it to be."""

    source: str
    stated_shape: dict[str, Any]
    tokenizer_source: str | None = None
    output_path: str = THIS_OUTPUT_PATH


def fetch_checked_model(config: FetchCheckedModelConfig) -> None:
    """As `fetch_model`; a model of another shape than the settings say is an error.

    Raises:
        ModelError: the source cannot be had, is no supported model, or contradicts the settings.
    """
    fetch_model(
        FetchModelConfig(source=config.source, tokenizer_source=config.tokenizer_source, output_path=config.output_path)
    )
    model_config = LlamaConfig.from_hf(read_json(join(config.output_path, "config.json")))
    found = contradictions(config.stated_shape, model_config)
    if found:
        raise ModelError(f"{'; '.join(found)}; leave these settings out, or name the model they belong to")


def fetch_step(source: str, shape: ModelSettings, tokenizer: str | None) -> ExecutorStep:
    """The step `fetch_model`: checked when the settings say something of the shape, else the one that all share."""
    stated_shape = shape.stated_shape()
    # What is not given bears no identity, so that other experiments' plain fetches are the same step.
    origin = {"source": source, **({} if tokenizer is None else {"tokenizer_source": tokenizer})}
    marked = {name: versioned(value) for name, value in origin.items()}
    if not stated_shape:
        return ExecutorStep("fetch_model", fetch_model, FetchModelConfig(**marked))
    return ExecutorStep(
        "fetch_model", fetch_checked_model, FetchCheckedModelConfig(**marked, stated_shape=versioned(stated_shape))
    )
