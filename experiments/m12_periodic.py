"""M12: 200 updates, with generation for 1,024 prompts after every 50, the last update included, in one job.

    python experiments/m12_periodic.py [--preset tiny|llama3_8b_v5p_32] [--prefix PATH] [--dry_run]
                                       [--export fp32|bf16] [--checkpoint.when every --checkpoint.every N]
                                       [--preflight v5p-32]

The steps of M11 with another schedule:
`train-50-to-50 -> infer-1024-to-50 -> train-50-to-100 -> ... -> infer-1024-to-200`.
"""

import dataclasses

from experiments.interleave import interleave_steps
from experiments.keeping import KEEPS_NOTHING, Keeping
from experiments.m11_interleave import PRESETS as M11_PRESETS
from experiments.m11_interleave import SHIPPED_PROMPTS, Preset, model_and_pairs, preflight_job
from experiments.preset_flags import InterleaveFlags
from experiments.schedule import expand_schedule
from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.executor.main import parse_main_config, usage_errors_reported
from simpo_pipeline.executor.step import ExecutorStep, output_path_of
from simpo_pipeline.inference.config import EngineConfig
from simpo_pipeline.job.main import TrackerChoice, main
from simpo_pipeline.job.preflight import preflight_main
from steps.infer import InferConfig


@dataclasses.dataclass(frozen=True)
class PeriodicPreset:
    """M11's model, data and engine with M12's schedule: generation after every `eval_every` updates."""

    base: Preset
    eval_every: int


# All 256 prompts of a host at once, with 17 pages each. Sharded over four chips, this uses a fifth of a chip's memory.
_ENGINE = EngineConfig(
    max_seqs=256,
    max_seq_len=4096,
    page_size=128,
    num_pages=4608,
    prefill_chunk_tokens=4096,
    decode_steps_per_call=64,
)


def _periodic(
    base: Preset, num_train_steps: int, eval_every: int, prompts: PromptsConfig, engine: EngineConfig
) -> PeriodicPreset:
    trainer = dataclasses.replace(base.trainer, num_train_steps=num_train_steps)
    return PeriodicPreset(dataclasses.replace(base, trainer=trainer, prompts=prompts, engine=engine), eval_every)


PRESETS = {
    # For tests: 4 periods in a minute.
    "tiny": _periodic(
        *(M11_PRESETS["tiny"], 20, 5, PromptsConfig(prompts=SHIPPED_PROMPTS[:16])), engine=M11_PRESETS["tiny"].engine
    ),
    "llama3_8b_v5p_32": _periodic(
        M11_PRESETS["llama3_8b_v5p_32"],
        200,
        50,
        PromptsConfig(
            synthetic_prompt_count=1024,
            synthetic_prompt_template="M12 prompt {index}: explain one practical ML idea in concise terms.",
        ),
        _ENGINE,
    ),
}


def periodic(preset: PeriodicPreset, keeping: Keeping = KEEPS_NOTHING) -> list[ExecutorStep]:
    """fetch_model -> prepare_pairs -> (train -> infer) for each period -> report."""
    base = preset.base
    model, pairs = model_and_pairs(base)
    return interleave_steps(
        model=model,
        pairs=[(pairs, 1.0)],
        trainer=base.trainer,
        phases=expand_schedule(base.trainer.num_train_steps, eval_every=preset.eval_every),
        generation=InferConfig(
            model_path=output_path_of(model),
            prompts=base.prompts,
            sampling=base.sampling,
            chat=base.chat,
            compute_dtype="bfloat16" if base.trainer.compute_dtype == "bfloat16" else "float32",
            engine=base.engine,
        ),
        title="M12: generate after every period of training",
        keeping=keeping,
    )


if __name__ == "__main__":
    flags = parse_main_config(InterleaveFlags)
    with usage_errors_reported():
        name, preset = flags.choose(PRESETS, default="tiny")
        steps = periodic(preset, flags)
    if flags.preflight is not None:
        preflight_main(preflight_job(preset.base), flags)
    main(
        flags,
        steps=steps,
        description="generate after every period of training, with one live trainer",
        tracker=TrackerChoice(name=f"m12-{name}"),
    )
