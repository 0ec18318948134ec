"""The DAG of a schedule: training phases that pass on one live trainer, with generation between them.

`experiments/m11_interleave.py` builds the same DAG by hand. This module builds it for schedules of any length.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.keeping import Keeping
from experiments.schedule import TrainingPhase
from experiments.settings.data import versioned_chat
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, take, versioned
from simpo_pipeline.training.config import TrainerConfig
from steps.infer import InferConfig, infer
from steps.report import ReportConfig, report
from steps.train import TrainConfig, WeightedPairs, train


def interleave_steps(
    *,
    model: ExecutorStep,
    pairs: Sequence[tuple[ExecutorStep, float]],
    trainer: TrainerConfig,
    phases: Sequence[TrainingPhase],
    generation: InferConfig | None,
    title: str,
    keeping: Keeping,
    eval_every: int | None = None,
    tensor_parallel: int = 1,
) -> list[ExecutorStep]:
    """Return the steps of a run, from `model` and `pairs` to the report.

    Args:
        model: Step whose output is a model folder.
        pairs: `prepare_pairs` steps, with the weights of their datasets.
        trainer: Config of the whole run.
        phases: Result of `expand_schedule(trainer.num_train_steps, ...)`.
        generation: Config of the generation steps. Its `model_path`, `trainer` and `step` are filled in here. It may be
            None if no phase is followed by generation.
        title: Heading of the report.
        keeping: Which checkpoints are written, and whether the weights after the last update are exported.
        eval_every: See `TrainConfig`.
        tensor_parallel: See `TrainConfig`.
    """
    pairs_path = _pairs_path(pairs)
    train_steps: list[ExecutorStep] = []
    infer_steps: list[ExecutorStep] = []
    repeats = len(phases) > 2 or sum(phase.infer for phase in phases) > 1
    for phase in phases:
        # As in M11, names give the number of updates. If several phases could share a name, the last update is added.
        suffix = f"-to-{phase.stop}" if repeats else ""
        trained = ExecutorStep(
            name=f"train-{phase.num_updates}{suffix}",
            fn=train,
            config=TrainConfig(
                trainer=versioned(trainer),
                model_path=output_path_of(model),
                pairs_path=pairs_path,
                stop_step=versioned(phase.stop),
                eval_every=versioned(eval_every),
                tensor_parallel=tensor_parallel,
                live=take(train_steps[-1]) if train_steps else None,
                checkpoint=keeping.checkpoint,  # not part of the identity: it changes no output
            ),
        )
        train_steps.append(trained)
        if phase.infer:
            infer_steps.append(_infer_step(model, _require(generation, phase), phase.stop, trained, suffix))
    outputs = ReportConfig(
        title=versioned(title),
        train_outputs=tuple(output_path_of(step) for step in train_steps),
        infer_outputs=tuple(output_path_of(step) for step in infer_steps),
    )
    reporting = ExecutorStep(name="report", fn=report, config=outputs)
    exported = keeping.export_steps(model, train_steps[-1], trainer)
    return [model, *(step for step, _ in pairs), *train_steps, *infer_steps, *exported, reporting]


def _pairs_path(pairs: Sequence[tuple[ExecutorStep, float]]) -> Any:
    if len(pairs) == 1:
        return output_path_of(pairs[0][0])
    # A weight matters only if there are several datasets.
    return tuple(WeightedPairs(output_path_of(step), versioned(weight)) for step, weight in pairs)


def _infer_step(
    model: ExecutorStep, generation: InferConfig, step: int, trained: ExecutorStep, suffix: str
) -> ExecutorStep:
    count = generation.prompts.count
    return ExecutorStep(
        name=f"infer{'' if count is None else f'-{count}'}{suffix}",
        fn=infer,
        config=dataclasses.replace(
            generation,
            prompts=versioned(generation.prompts),
            sampling=versioned(generation.sampling),
            chat=versioned(generation.chat),
            compute_dtype=versioned(generation.compute_dtype),
            chat_config=versioned_chat(generation.chat_config),
            model_path=output_path_of(model),
            trainer=borrow(trained),
            step=versioned(step),
        ),
    )


def _require(generation: InferConfig | None, phase: TrainingPhase) -> InferConfig:
    if generation is None:
        raise ConfigError(f"the schedule generates after update {phase.stop}, but no generation settings were given")
    return generation
