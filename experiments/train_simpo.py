"""SimPO training from a settings file, with generation according to its schedule.

    python experiments/train_simpo.py --config_path experiments/configs/FILE.yaml [--prefix PATH] [--dry_run]
        [--tracker wandb|jsonl|none] [--export fp32|bf16 [--export_weights ema]]
        [--checkpoint.when every --checkpoint.every N] [--key.path value ...]

`eval_at_steps: [2]` with `num_train_steps: 7` becomes the DAG

    fetch_model -> prepare_pairs -> train-2 ==live==> infer-128 (borrows) ==> train-5 (takes) -> report

and other schedules become other DAGs. Settings on the command line override the file.
"""

import dataclasses

from experiments.interleave import interleave_steps
from experiments.keeping import KEEPS_NOTHING, Keeping
from experiments.settings.command_line import parse_command_line_or_exit
from experiments.settings.data import versioned_chat
from experiments.settings.fetch_checked_model import fetch_step
from experiments.settings.train_simpo import TrainSimpoConfig
from simpo_pipeline.executor.main import usage_errors_reported
from simpo_pipeline.executor.step import ExecutorStep, output_path_of, versioned
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.main import main
from steps.make_model import MakeModelConfig, make_model
from steps.prepare_pairs import PreparePairsConfig, prepare_pairs

TITLE = "train_simpo"


@dataclasses.dataclass(frozen=True)
class TrainFlags(JobFlags, Keeping):
    """Flags of this experiment, in addition to its settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Keeping.__post_init__(self)


def model_step(settings: TrainSimpoConfig) -> ExecutorStep:
    """Return the step of the initial model, which is fetched or made with random weights."""
    if settings.model_source is not None:
        return fetch_step(settings.model_source, settings.model, settings.data.tokenizer)
    shape, seed = settings.model.random_model(), settings.trainer.seed
    return ExecutorStep("make_model", make_model, MakeModelConfig(versioned(shape), versioned(seed)))


def pairs_step(settings: TrainSimpoConfig, name: str, model: ExecutorStep) -> ExecutorStep:
    """Return the step that tokenizes the pairs of one component."""
    component = settings.data.components[name]
    return ExecutorStep(
        "prepare_pairs" if len(settings.data.components) == 1 else f"prepare_pairs-{name}",
        prepare_pairs,
        PreparePairsConfig(
            source=component.source.preference_source(),
            model_path=output_path_of(model),
            max_length=versioned(settings.build_trainer().train_seq_len),
            too_long=versioned(component.too_long),
            unusable="drop",  # UltraFeedback has pairs with two equal answers; dropped pairs are counted
            validation_fraction=versioned(settings.validation_split_fraction or 0.0),
            chat_config=versioned_chat(settings.data.chat),
        ),
    )


def train_simpo_steps(settings: TrainSimpoConfig, keeping: Keeping = KEEPS_NOTHING) -> list[ExecutorStep]:
    """Return the DAG for a settings file."""
    model = model_step(settings)
    names = list(settings.data.components)
    return interleave_steps(
        model=model,
        pairs=[(pairs_step(settings, name, model), settings.data.weight(name)) for name in names],
        trainer=settings.build_trainer(),
        keeping=keeping,
        eval_every=settings.trainer.steps_per_eval,
        tensor_parallel=settings.trainer.tensor_parallel,
        phases=settings.phases(),
        generation=settings.build_generation(output_path_of(model)),
        title=settings.trainer.tracker.name or TITLE,
    )


if __name__ == "__main__":
    settings, flags = parse_command_line_or_exit(TrainSimpoConfig, TrainFlags)
    with usage_errors_reported():
        steps = train_simpo_steps(settings, flags)
    main(
        flags,
        steps=steps,
        description=f"SimPO: {settings.trainer.num_train_steps} updates in {len(settings.phases())} phases",
        tracker=settings.trainer.tracker.choice(TITLE),
    )
