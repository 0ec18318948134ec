"""Settings under `inference_eval`: when training pauses for generation, the prompts, and the engine."""

import dataclasses
from typing import cast

from experiments.settings.generation import build_engine, build_prompts, build_sampling, require_mode
from simpo_pipeline.data.prompts import DEFAULT_TEMPLATE, PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from steps.infer import InferenceMode


@dataclasses.dataclass(frozen=True)
class InferenceEvalConfig:
    """Generation inside a training run.

    Attributes:
        enabled: Whether the run generates at all.
        eval_every: Number of updates between two generations; ignored if `eval_at_steps` is given.
        eval_at_steps: Generate after exactly these updates. The last update is included only if it is listed.
        inference_mode: `host_data_parallel`: one engine per host, each serving its shard of the prompts. `global_mesh`:
            one engine over all devices. With one process, both are the same.
        prompts, prompts_path, synthetic_prompt_count: The prompts, in exactly one of these three ways.
        chat: Whether a prompt is a user message in the chat template; otherwise it is plain text to continue.
        max_seq_len: Maximum number of tokens of prompt and answer together. None: `model.max_seq_len`, or what the
            prompts need.
        page_size, max_pages, max_seqs, max_prefill_size, max_rounds: See `build_engine`.
        seed: The key of each drawn token is derived from it, the update, the prompt and the position.
    """

    enabled: bool = False
    eval_every: int = 10
    eval_at_steps: tuple[int, ...] | None = None
    inference_mode: str = "global_mesh"
    prompts: tuple[str, ...] | None = None
    prompts_path: str | None = None
    synthetic_prompt_count: int | None = None
    synthetic_prompt_template: str = DEFAULT_TEMPLATE
    chat: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 1.0
    max_seq_len: int | None = 512
    page_size: int | None = 128
    max_pages: int | None = None
    max_seqs: int | None = None
    max_prefill_size: int | None = None
    max_rounds: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_mode("inference_eval.inference_mode", self.inference_mode)
        if self.enabled:
            self.build_prompts()
            self.build_sampling()
            self.build_engine(None)

    @property
    def mode(self) -> InferenceMode:
        """The inference mode, as a checked type."""
        return cast(InferenceMode, self.inference_mode)

    def build_prompts(self) -> PromptsConfig:
        """Return the prompts of each generation."""
        return build_prompts(
            "inference_eval.",
            prompts=self.prompts,
            prompts_path=self.prompts_path,
            synthetic_prompt_count=self.synthetic_prompt_count,
            synthetic_prompt_template=self.synthetic_prompt_template,
        )

    def build_sampling(self) -> SamplingParams:
        """Return the sampling parameters."""
        return build_sampling(
            "inference_eval.",
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )

    def build_engine(self, model_max_seq_len: int | None) -> EngineConfig:
        """Return the engine's sizes. `model_max_seq_len` is the model's limit, or None if it is unknown.

        Raises:
            ConfigError: A size is invalid, or `max_seq_len` exceeds the model's limit.
        """
        max_seq_len = model_max_seq_len if self.max_seq_len is None else self.max_seq_len
        if max_seq_len is not None and model_max_seq_len is not None and max_seq_len > model_max_seq_len:
            raise ConfigError(
                "inference_eval.max_seq_len cannot exceed model max sequence length: "
                f"{max_seq_len} > {model_max_seq_len}"
            )
        return build_engine(
            "inference_eval.",
            max_new_tokens=self.max_new_tokens,
            max_seq_len=max_seq_len,
            max_seqs=self.max_seqs,
            page_size=self.page_size,
            max_pages=self.max_pages,
            max_prefill_size=self.max_prefill_size,
            max_rounds=self.max_rounds,
        )
