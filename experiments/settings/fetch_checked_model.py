"""Step `fetch_model` for settings that restate the model's shape: fetches it, then compares its config.json.

The shape of a checkpoint is unknown until it is fetched, so a contradiction cannot be detected earlier. It is still
detected before any device is touched, because a failed fetch blocks all later steps.
"""

import dataclasses
from typing import Any

from experiments.settings.model import ModelSettings, contradictions
from simpo_pipeline.errors import ModelError
from simpo_pipeline.executor.step import ExecutorStep, outside_path, versioned
from simpo_pipeline.storage.output_folder import OutputFolder
from steps.fetch_model import MODEL_FILES, TOKENIZER_FILES, FetchModelConfig, checked_config, fetch_model


@dataclasses.dataclass(frozen=True)
class FetchCheckedModelConfig:
    """Source of a model as in `FetchModelConfig`, and its expected shape from `ModelSettings.stated_shape`."""

    source: str = dataclasses.field(metadata=outside_path((*MODEL_FILES, *TOKENIZER_FILES)))
    stated_shape: dict[str, Any]
    tokenizer_source: str | None = dataclasses.field(default=None, metadata=outside_path(TOKENIZER_FILES))


def fetch_checked_model(config: FetchCheckedModelConfig, output: OutputFolder) -> None:
    """Fetch a model as `fetch_model` does, and check that its shape is the one in the settings.

    Raises:
        ModelError: The source cannot be fetched, is not a supported model, or contradicts the settings.
    """
    fetch_model(FetchModelConfig(source=config.source, tokenizer_source=config.tokenizer_source), output)
    found = contradictions(config.stated_shape, checked_config(output.path))
    if found:
        raise ModelError(f"{'; '.join(found)}; leave these settings out, or name the model they belong to")


def fetch_step(source: str, shape: ModelSettings, tokenizer: str | None) -> ExecutorStep:
    """Return the step `fetch_model`. It checks the model if the settings state anything about its shape."""
    stated_shape = shape.stated_shape()
    # Settings that are not given are not part of the identity, so plain fetches of other experiments are the same step.
    origin = {"source": source, **({} if tokenizer is None else {"tokenizer_source": tokenizer})}
    marked = {name: versioned(value) for name, value in origin.items()}
    if not stated_shape:
        return ExecutorStep("fetch_model", fetch_model, FetchModelConfig(**marked))
    return ExecutorStep(
        "fetch_model", fetch_checked_model, FetchCheckedModelConfig(**marked, stated_shape=versioned(stated_shape))
    )
