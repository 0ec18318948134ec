"""Step `infer`: generation for a list of prompts, from a trainer borrowed live or from a model folder."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from simpo_pipeline.data.prompts import PromptsConfig, load_prompts, prompt_shard
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.executor.step import THIS_OUTPUT_PATH, unwrap_versioned_value
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.jsonl import JsonlWriter, read_jsonl
from simpo_pipeline.storage.paths import join
from steps.session import JobSession, session_of

if TYPE_CHECKING:
    from simpo_pipeline.handoff.handoff import InferenceWeights
    from simpo_pipeline.inference.engine import GenerationStats
    from simpo_pipeline.inference.sequence import Completion, Request
    from simpo_pipeline.model.config import LlamaConfig

logger = logging.getLogger(__name__)

InferenceMode = Literal["host_data_parallel", "global_mesh"]
MODES = ("host_data_parallel", "global_mesh")


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """What to generate, from what, and how.

    Attributes:
        prompts: The prompts of the whole job; each host serves its contiguous shard of them.
        sampling: How tokens are drawn and when a sequence ends. `stop_token_ids` empty: the tokenizer's EOS.
        engine: Sizes of the engine.
        model_path: Folder of the model: its tokenizer, and the weights when `trainer` is None.
        trainer: A live `Trainer` borrowed from a training step (`borrow(step)`), whose parameters are generated from.
        step: Finished updates of the parameters; enters the sampling keys and every row.
        chat: Whether each prompt is one user message under the tokenizer's chat template.
        mode: `host_data_parallel`: each host has an engine of its own and a shard of the prompts.
        compute_dtype: Dtype of the weights in the engine.
    """

    prompts: PromptsConfig
    sampling: SamplingParams
    engine: EngineConfig
    model_path: str
    trainer: Any = None
    step: int = 0
    chat: bool = True
    mode: InferenceMode = "host_data_parallel"
    compute_dtype: str = "float32"
    output_path: str = THIS_OUTPUT_PATH

    def __post_init__(self) -> None:
        mode = unwrap_versioned_value(self.mode)
        if mode not in MODES:
            raise ConfigError(f"Unknown inference_mode={mode!r}. Expected one of: {', '.join(MODES)}")


def infer(config: InferConfig, run: StepRun) -> None:
    """Writes one row per prompt to this host's file, the merged file of all hosts, and `summary.json`.

    Raises:
        CapacityError: a prompt does not fit the engine; said before any device work.
        DataError: the prompts cannot be read.
    """
    # Imported here because planning must not pay for transformers.
    from simpo_pipeline.data.chat import load_tokenizer

    session = session_of(run)
    prompts = load_prompts(config.prompts)
    process_index, process_count = run.processes.process_index, run.processes.process_count
    indices = prompt_shard(len(prompts), process_index, process_count)
    tokenizer = load_tokenizer(config.model_path)
    requests = _requests(config, tokenizer, prompts, indices)
    completions, stats, handoff = _generate(config, session, requests)
    own_file = join(config.output_path, f"host_{process_index:04d}_of_{process_count:04d}.jsonl")
    with JsonlWriter(own_file) as writer:
        for completion in completions:
            index = completion.request.global_prompt_index
            writer.write(
                {
                    "step": config.step,
                    "process_index": process_index,
                    "process_count": process_count,
                    "global_prompt_index": index,
                    "sample_index": completion.request.sample_index,
                    "prompt": prompts[index],
                    "prompt_token_count": len(completion.request.prompt_tokens),
                    "generated_text": _text(tokenizer, completion),
                    "generated_tokens": list(completion.tokens),
                    "generated_token_count": len(completion.tokens),
                    "finish_reason": completion.finish_reason,
                }
            )
    _merge_and_summarize(config, run, session, stats, handoff)
