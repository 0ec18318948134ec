"""The code of step `train`."""

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from simpo_pipeline.data.chat import load_tokenizer, pad_token_id
from simpo_pipeline.data.config import PAIRS_FILE
from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.order import Mixture
from simpo_pipeline.data.pairs import TokenizedPair, check_lengths, check_vocabulary, read_pairs
from simpo_pipeline.distributed.mesh import training_mesh
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.job.profile import profiled
from simpo_pipeline.job.session import JobSession, session_of
from simpo_pipeline.model.hf_weights import load_config
from simpo_pipeline.processes import joint_digest
from simpo_pipeline.storage.paths import join
from simpo_pipeline.tracking.tracker import NoTracker, Tracker
from simpo_pipeline.training.evaluator import Evaluator, open_sweep, read_held_out
from simpo_pipeline.training.phase_checkpoints import PhaseCheckpoints, refuse_impossible
from simpo_pipeline.training.trainer import Trainer
from steps.train import TrainConfig

logger = logging.getLogger("simpo_pipeline.steps.train")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The pairs of all datasets, the mixture in which they are read, and the padding token.

    `held_out` is None if evaluation is disabled.
    """

    pairs: Sequence[TokenizedPair]
    mixture: Mixture
    held_out: Sequence[TokenizedPair] | None
    pad_id: int


def train(config: TrainConfig, run: StepRun) -> Live:
    """Run the updates up to `stop_step`, write `metrics.jsonl` and `summary.json`, and return the live trainer.

    If `eval_every` is set, `evaluations.jsonl` is written too. If an earlier job left a checkpoint, training resumes
    from it, and the outputs are the same as those of an uninterrupted job.

    Raises:
        ConfigError: The live trainer belongs to another run or has reached `stop_step`, or `checkpoint`,
            `eval_every` or `--profile` is impossible in this job.
        DataError: A pair has a token outside the model's vocabulary, or too many tokens. Raised before any device work.
        TrainingError: The contents of a checkpoint differ from what was written.
    """
    session = session_of(run)
    refuse_impossible(config.checkpoint, run)
    _refuse_profile_beyond(session.profile, config.trainer.num_train_steps)
    is_leader = run.processes.is_leader
    # Metrics are equal on all hosts, so only the leader records them. The tracker is opened first: if that fails (for
    # example without a login), the job fails before any device is touched.
    tracker = session.tracker if is_leader else NoTracker()
    data = _read_data(config)
    first_step = 1 if config.live is None else config.live.step + 1
    trainer, checkpoints = _start(config, run, session) if config.live is None else _take(config, run)
    loader = _open_loader(config, trainer, data)
    rows: list[dict[str, float]] = checkpoints.earlier("metrics")
    with (
        run.output.open_rows("metrics.jsonl") if is_leader else nullcontext() as metrics_file,
        _open_evaluator(config, trainer, data, tracker, run) as evaluator,
        checkpoints.watch(trainer, lambda: _progress(rows, evaluator)),
    ):
        if metrics_file is not None:
            for row in rows:
                metrics_file.write(row)
        if evaluator is not None:
            _resume_evaluations(evaluator, checkpoints, trainer.step, config)

        def record(step: int, metrics: dict[str, float]) -> None:
            row = {"step": step, **metrics}
            rows.append(row)
            if metrics_file is not None:
                metrics_file.write(row)
            tracker.log({f"train/{name}": value for name, value in metrics.items()}, step=step)
            logger.info(
                "step %d/%d loss %.5f lr %.2e grad_norm %.3f %.1f s %.0f tok/s",
                *(step, config.trainer.num_train_steps, metrics["loss"], metrics["learning_rate"]),
                *(metrics["grad_norm"], metrics["step_seconds"], metrics["tokens_per_second"]),
            )
            if evaluator is not None and config.evaluates_after(step):
                evaluator.evaluate()
            checkpoints.after_update()

        for stop, around in _spans(trainer.step, config, session.profile, run):
            with around:
                trainer.train_until(stop, loader, record)
        session.has_profiled |= session.profile is not None and first_step <= session.profile <= trainer.step
    # The state is sharded over the processes; each process hashes its own shards.
    digest = joint_digest(run.processes.gather(trainer.digest()))
    summary = _summarize(first_step, rows, digest)
    if is_leader:
        run.output.write_json("summary.json", summary)
    tracker.summary({f"train/{name}": value for name, value in summary.items()})
    return Live(trainer, digest=digest, free=trainer.free)


def _refuse_profile_beyond(profile: int | None, num_train_steps: int) -> None:
    if profile is not None and profile > num_train_steps:
        raise ConfigError(f"--profile is {profile}; expected 1 to {num_train_steps}, the updates of the run")


def _spans(
    step: int, config: TrainConfig, profile: int | None, run: StepRun
) -> list[tuple[int, AbstractContextManager[None]]]:
    """Return (last update, context manager) of each part of the phase; the profiled update is a part of its own."""
    if profile is None or not step < profile <= config.stop_step:
        return [(config.stop_step, nullcontext())]
    around = profiled(run.output, run.processes.process_index)
    return [(profile - 1, nullcontext()), (profile, around), (config.stop_step, nullcontext())]


def _progress(rows: list[dict[str, float]], evaluator: Evaluator | None) -> dict[str, list[Any]]:
    """Return the rows written so far, for a checkpoint. The lists are copied because they keep growing."""
    return {"metrics": list(rows), "evaluations": [] if evaluator is None else list(evaluator.rows)}


def _resume_evaluations(evaluator: Evaluator, checkpoints: PhaseCheckpoints, step: int, config: TrainConfig) -> None:
    """Write the evaluations before the checkpoint again, and run the one that is due at the start, if any."""
    for row in checkpoints.earlier("evaluations"):
        evaluator.write(row)
    done = bool(evaluator.rows) and evaluator.rows[-1]["step"] == step
    # If the trainer was taken live, the previous phase has already evaluated at this update.
    resumed = checkpoints.record is not None and config.evaluates_after(step)
    if step == 0 or (resumed and not done):
        evaluator.evaluate()


def _start(config: TrainConfig, run: StepRun, session: JobSession) -> tuple[Trainer, PhaseCheckpoints]:
    # `session.programs` comes first: from its creation on, stray executions on the devices are forbidden.
    programs, mesh = session.programs, training_mesh(config.tensor_parallel)
    checkpoints = PhaseCheckpoints(config.checkpoint, run, mesh, after=0, until=config.stop_step)
    if checkpoints.record is None:
        return Trainer.start(config.trainer, config.model_path, programs=programs, mesh=mesh), checkpoints
    trainer = Trainer.resume(
        config.trainer,
        config.model_path,
        checkpoints.record.step,
        checkpoints.load,
        data_position=checkpoints.record.data_position,
        programs=programs,
        mesh=mesh,
    )
    return trainer, checkpoints


def _take(config: TrainConfig, run: StepRun) -> tuple[Trainer, PhaseCheckpoints]:
    trainer = config.live
    assert trainer is not None, "the step has no trainer to take"
    config.check_continues(trainer.config, trainer.step)
    checkpoints = PhaseCheckpoints(config.checkpoint, run, trainer.mesh, after=trainer.step, until=config.stop_step)
    if checkpoints.record is not None:
        record = checkpoints.record
        trainer.restore(record.step, checkpoints.load, data_position=record.data_position)
    return trainer, checkpoints


def _open_evaluator(
    config: TrainConfig, trainer: Trainer, data: TrainingData, tracker: Tracker, run: StepRun
) -> AbstractContextManager[Evaluator | None]:
    if data.held_out is None:
        return nullcontext()
    sweep = open_sweep(data.held_out, trainer, data.pad_id)
    return Evaluator(trainer, sweep, tracker, run.output, is_leader=run.processes.is_leader)


def _read_data(config: TrainConfig) -> TrainingData:
    datasets = [read_pairs(join(dataset.path, PAIRS_FILE)) for dataset in config.datasets]
    pairs = [pair for dataset in datasets for pair in dataset]
    pad_id = pad_token_id(load_tokenizer(config.model_path))
    held_out = None
    if config.eval_every is not None:
        held_out = read_held_out([dataset.path for dataset in config.datasets])
    for some in (pairs, held_out or []):
        check_vocabulary(some, pad_id, load_config(config.model_path).vocab_size)
        check_lengths(some, config.trainer.train_seq_len)
    weights = tuple(dataset.weight for dataset in config.datasets)
    return TrainingData(pairs, Mixture(tuple(map(len, datasets)), weights), held_out, pad_id)


def _open_loader(config: TrainConfig, trainer: Trainer, data: TrainingData) -> PairLoader:
    return PairLoader(
        pairs=data.pairs,
        mixture=data.mixture,
        batch_size=config.trainer.train_batch_size,
        seq_len=config.trainer.train_seq_len,
        seed=config.trainer.seed,
        pad_id=data.pad_id,
        num_updates=config.trainer.num_train_steps,
        packing=config.trainer.packing,
        num_groups=trainer.num_groups,
    )


def _summarize(first_step: int, rows: list[dict[str, float]], digest: str) -> dict[str, Any]:
    seconds = sum(row["step_seconds"] for row in rows)
    tokens = int(sum(row["tokens"] for row in rows))
    return {
        "first_step": first_step,
        "step": int(rows[-1]["step"]),
        "state_digest": digest,
        "loss": rows[-1]["loss"],
        "tokens": tokens,
        "padding_share": round(sum(row["padding_share"] for row in rows) / len(rows), 4),
        "train_seconds": round(seconds, 6),
        "tokens_per_second": round(tokens / seconds, 1),
    }
