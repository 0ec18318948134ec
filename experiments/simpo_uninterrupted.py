"""The yardstick of M11: the same run of 7 updates without an interruption.

    python experiments/simpo_uninterrupted.py [--preset smollm2|tiny|llama3_8b_v5p_32] [--prefix PATH] [--dry_run]

Its `state_digest` must equal that of M11's train-5, bit for bit.
"""

from m11_interleave import NUM_TRAIN_STEPS, PRESETS, M11Args, Preset, model_and_pairs

from simpo_pipeline.executor.main import executor_main, parse_main_config
from simpo_pipeline.executor.step import ExecutorStep, output_path_of, versioned
from steps.joined_job import joined_job
from steps.session import tracker_for
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
    args = parse_main_config(M11Args)
    open_tracker = tracker_for(args.tracker, args, name=f"simpo-{args.preset}", project="simpo-pipeline")
    with joined_job(args) as job:
        executor_main(
            args,
            steps=uninterrupted(PRESETS[args.preset]),
            description="the run of M11 without its interruption",
            session=args.job_session(open_tracker, job.group),
            processes=job.processes,
        )
