"""Step `infer`: generates from a list of prompts with the weights of a borrowed live trainer or a model folder."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from simpo_pipeline.data.config import ChatConfig
from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import (
    LiveUse,
    imported_step,
    outside_path,
    require_live_use,
    unwrap_versioned_value,
)
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from steps.fetch_model import MODEL_FILES, TOKENIZER_FILES

if TYPE_CHECKING:
    from simpo_pipeline.training.trainer import Trainer

InferenceMode = Literal["host_data_parallel", "global_mesh"]
MODES = ("host_data_parallel", "global_mesh")


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """Prompts, weights and settings of a generation step.

    Attributes:
        prompts: The prompts of the whole job.
        sampling: Number of samples per prompt, how tokens are drawn, and when a sample finishes. Unless `ignore_eos` is
            set, the end-of-turn token and the tokenizer's EOS finish a sample, in addition to `stop_token_ids`.
        engine: Sizes of the engine. They never change a token. Sizes that are None are derived from the prompts and the
            available memory.
        model_path: Folder of the model: its tokenizer, and its weights if `trainer` is None.
        trainer: A live `Trainer` borrowed from a training step (`borrow(step)`), whose parameters are used.
        step: Number of updates that produced those parameters; part of the sampling keys and of every row. It must be
            the number of updates that `trainer` has finished.
        chat: Whether each prompt that is text becomes one user message in the tokenizer's chat template. A conversation
            is always rendered by the template, and token ids never are.
        mode: `host_data_parallel`: each host has its own engine and serves its contiguous shard of the prompts.
            `global_mesh`: one engine over all devices serves all prompts; every host runs the same rounds and writes
            the rows of its shard. In a job of one process, both modes are the same.
        compute_dtype: Data type of the weights in the engine.
        chat_config: How conversations become tokens; equal to that of the pairs which the model was trained on.
    """

    prompts: PromptsConfig
    sampling: SamplingParams
    engine: EngineConfig
    model_path: str = dataclasses.field(metadata=outside_path((*MODEL_FILES, *TOKENIZER_FILES)))
    trainer: "Trainer | None" = None
    step: int = 0
    chat: bool = True
    mode: InferenceMode = "host_data_parallel"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    chat_config: ChatConfig = dataclasses.field(default_factory=ChatConfig)

    def __post_init__(self) -> None:
        require_live_use("InferConfig.trainer", self.trainer, LiveUse.BORROW)
        mode = unwrap_versioned_value(self.mode)
        if mode not in MODES:
            raise ConfigError(f"Unknown inference_mode={mode!r}. Expected one of: {', '.join(MODES)}")
        if unwrap_versioned_value(self.sampling).seed is None:
            raise ConfigError("sampling.seed is None; set a seed, so that the step draws the same tokens each time")


infer = imported_step("steps.bodies.infer.infer", module=__name__, takes=("run",))
"""Write one row per sample to this host's file, the merged file of all hosts, and `summary.json`."""
