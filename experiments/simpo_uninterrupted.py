"""Reference run for M11: the same 7 updates without interruption.

    python experiments/simpo_uninterrupted.py [--preset smollm2|tiny|llama3_8b_v5p_32] [--prefix PATH] [--dry_run]

Its `state_digest` must equal that of M11's train-5, bit for bit.
"""

from experiments.m11_interleave import NUM_TRAIN_STEPS, PRESETS, Preset, model_and_pairs
from experiments.preset_flags import PresetFlags
from simpo_pipeline.executor.main import parse_main_config, usage_errors_reported
from simpo_pipeline.executor.step import ExecutorStep, output_path_of, versioned
from simpo_pipeline.job.main import TrackerChoice, main
from steps.train import TrainConfig, train


def uninterrupted(preset: Preset) -> list[ExecutorStep]:
    """fetch_model -> prepare_pairs -> train-7."""
    model, pairs = model_and_pairs(preset)
    train_7 = ExecutorStep(
        f"train-{NUM_TRAIN_STEPS}",
        train,
        TrainConfig(
            trainer=versioned(preset.trainer),
            model_path=output_path_of(model),
            pairs_path=output_path_of(pairs),
            stop_step=versioned(NUM_TRAIN_STEPS),
        ),
    )
    return [model, pairs, train_7]


if __name__ == "__main__":
    flags = parse_main_config(PresetFlags)
    with usage_errors_reported():
        name, preset = flags.choose(PRESETS, default="smollm2")
    main(
        flags,
        steps=uninterrupted(preset),
        description="the run of M11 without interruption",
        tracker=TrackerChoice(name=f"simpo-{name}"),
    )
