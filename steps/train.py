"""Step `train`: SimPO updates up to a given one, on a trainer that starts here or is taken live from another step."""

import dataclasses
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from simpo_pipeline.data.config import PAIRS_FILE
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.executor.step import THIS_OUTPUT_PATH, unwrap_versioned_value
from simpo_pipeline.job.profile import profiled
from simpo_pipeline.job.session import JobSession, session_of
from simpo_pipeline.processes import joint_digest
from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.jsonl import JsonlWriter
from simpo_pipeline.storage.paths import join
from simpo_pipeline.tracking.tracker import NoTracker, Tracker
from simpo_pipeline.training.config import CheckpointConfig, TrainerConfig
from simpo_pipeline.training.evaluator import Evaluator, open_sweep, read_held_out
from simpo_pipeline.training.phase_checkpoints import PhaseCheckpoints, refuse_impossible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simpo_pipeline.data.loader import PairLoader
    from simpo_pipeline.data.order import Mixture
    from simpo_pipeline.data.pairs import TokenizedPair
    from simpo_pipeline.training.trainer import Trainer

logger = logging.getLogger(f"simpo_pipeline.{__name__}")


@dataclasses.dataclass(frozen=True)
class WeightedPairs:
    """One dataset of several: an output of `prepare_pairs`, and in which proportion to the others it is read."""

    path: str
    weight: float

    def __post_init__(self) -> None:
        weight = unwrap_versioned_value(self.weight)
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"the weight of {self.path} is {weight}: give a finite number above 0, or leave it out")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One phase of a run.

    Attributes:
        trainer: The whole run: its length, schedule, data order and loss. Equal in every phase of the run.
        model_path: Folder of the model: its tokenizer, and the weights to start from when `live` is None.
        pairs_path: Output of `prepare_pairs`, or several with their weights.
        stop_step: The last update of this phase, counted over the whole run.
        eval_every: After every so many updates, before the first and after the last of the run, the pairs that
            `prepare_pairs` held out are evaluated; None evaluates none.
        tensor_parallel: Over so many neighbouring devices each matrix is split too, in the step that starts the run.
        live: A `Trainer` taken from an earlier step (`take(step)`); this step becomes its owner.
        checkpoint: When the state is written, for a job that was killed; no output depends on it, so it bears no
            identity.
    """

    trainer: TrainerConfig
    model_path: str
    pairs_path: str | tuple[WeightedPairs, ...]
    stop_step: int
    eval_every: int | None = None
    tensor_parallel: int = 1
    live: Any = None
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    output_path: str = THIS_OUTPUT_PATH

    def __post_init__(self) -> None:
        stop_step = unwrap_versioned_value(self.stop_step)
        num_train_steps = unwrap_versioned_value(self.trainer).num_train_steps
        if not 1 <= stop_step <= num_train_steps:
            raise ConfigError(f"stop_step is {stop_step}, and the run has updates 1 to {num_train_steps}")
        eval_every = unwrap_versioned_value(self.eval_every)
        if eval_every is not None and eval_every < 1:
            raise ConfigError(f"eval_every is {eval_every}: give a number of updates of at least 1, or None")
        if self.pairs_path == ():
            raise ConfigError("pairs_path is empty: give the output of prepare_pairs, or several with their weights")

    @property
    def datasets(self) -> tuple[WeightedPairs, ...]:
        """The datasets to train on; one alone has all the weight."""
        return (WeightedPairs(self.pairs_path, 1.0),) if isinstance(self.pairs_path, str) else self.pairs_path

    def evaluates_after(self, step: int) -> bool:
        """Whether the held-out pairs are evaluated after an update."""
        return self.eval_every is not None and (step % self.eval_every == 0 or step == self.trainer.num_train_steps)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The pairs of all datasets, which of them belong to which, and the token that fills what is left of a row.

    `held_out` is None where none are to be evaluated.
    """

    pairs: "Sequence[TokenizedPair]"
    mixture: "Mixture"
    held_out: "Sequence[TokenizedPair] | None"
    pad_id: int


def train(config: TrainConfig, run: StepRun) -> Live:
    """Runs the updates up to `stop_step`; writes `metrics.jsonl` and `summary.json`; returns the live trainer.

    With `eval_every` it writes `evaluations.jsonl` too. Where a job before this one left a checkpoint, it goes on from
    there; the outputs are those of one that never stopped.

    Raises:
        ConfigError: the live trainer belongs to another run, or is already beyond `stop_step`; or `checkpoint`,
            `eval_every` or `--profile` ask for what this job cannot do.
        DataError: a pair holds a token that the model does not know, or too many; no device has been touched.
        TrainingError: a checkpoint is not what was written.
    """
    session = session_of(run)
    refuse_impossible(config.checkpoint, run)
    _refuse_profile_beyond(session.profile, config.trainer.num_train_steps)
    is_leader = run.processes.is_leader
    # Metrics are equal on all hosts; the leader records them. Opened first, so that a tracker that cannot be opened
    # (no login, say) ends the job before any device is touched.
    tracker = session.tracker if is_leader else NoTracker()
    data = _read_data(config)
    first_step = 1 if config.live is None else config.live.step + 1
    trainer, checkpoints = _start(config, run, session) if config.live is None else _take(config, run)
    loader = _open_loader(config, trainer, data)
    rows: list[dict[str, float]] = checkpoints.earlier("metrics")
    with (
        JsonlWriter(join(config.output_path, "metrics.jsonl")) if is_leader else nullcontext() as metrics_file,
        _open_evaluator(config, trainer, data, tracker, is_leader) as evaluator,
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
    # Its parts lie in several processes, and each hashes its own.
    digest = joint_digest(run.processes.gather(trainer.digest()))
    summary = _summarize(first_step, rows, digest)
    if is_leader:
        write_json(join(config.output_path, "summary.json"), summary)
    tracker.summary({f"train/{name}": value for name, value in summary.items()})
    return Live(trainer, digest=digest, free=trainer.free)


def _refuse_profile_beyond(profile: int | None, num_train_steps: int) -> None:
    if profile is not None and profile > num_train_steps:
        raise ConfigError(f"--profile {profile}: the run has updates 1 to {num_train_steps}")


def _spans(
    step: int, config: TrainConfig, profile: int | None, run: StepRun
) -> list[tuple[int, AbstractContextManager[None]]]:
    """Up to which updates to train, and what to do around that: the profiled update is a phase of its own."""
    if profile is None or not step < profile <= config.stop_step:
        return [(config.stop_step, nullcontext())]
    around = profiled(config.output_path, run.processes.process_index)
    return [(profile - 1, nullcontext()), (profile, around), (config.stop_step, nullcontext())]


def _progress(rows: list[dict[str, float]], evaluator: Evaluator | None) -> dict[str, list[Any]]:
    """What a checkpoint remembers of the outputs so far; copies, since the lists grow on."""
    return {"metrics": list(rows), "evaluations": [] if evaluator is None else list(evaluator.rows)}


def _resume_evaluations(evaluator: Evaluator, checkpoints: PhaseCheckpoints, step: int, config: TrainConfig) -> None:
    """Writes the evaluations of before again, and makes the one that is due where the phase begins."""
    for row in checkpoints.earlier("evaluations"):
        evaluator.write(row)
    done = bool(evaluator.rows) and evaluator.rows[-1]["step"] == step
    # A phase that takes its trainer live begins where the one before has evaluated.
    resumed = checkpoints.record is not None and config.evaluates_after(step)
    if step == 0 or (resumed and not done):
        evaluator.evaluate()


def _start(config: TrainConfig, run: StepRun, session: JobSession) -> "tuple[Trainer, PhaseCheckpoints]":
    # Imported here because planning must not import jax.
    from simpo_pipeline.distributed.mesh import training_mesh
    from simpo_pipeline.training.trainer import Trainer

    # The programs first: they say whether this process may touch the devices.
    programs, mesh = session.programs, training_mesh(config.tensor_parallel)
    checkpoints = PhaseCheckpoints(config.checkpoint, run, mesh, after=0, until=config.stop_step)
    if checkpoints.record is None:
        return Trainer.start(config.trainer, config.model_path, programs=programs, mesh=mesh), checkpoints
    step, load = checkpoints.record.step, checkpoints.load
    trainer = Trainer.resume(config.trainer, config.model_path, step, load, programs=programs, mesh=mesh)
    return trainer, checkpoints


def _take(config: TrainConfig, run: StepRun) -> "tuple[Trainer, PhaseCheckpoints]":
    trainer: Trainer = config.live
    if trainer.config != config.trainer:
        raise ConfigError(
            f"the live trainer is of another run: it has {trainer.config}, this step was given {config.trainer}; "
            "all phases of one run share one trainer config"
        )
    checkpoints = PhaseCheckpoints(config.checkpoint, run, trainer.mesh, after=trainer.step, until=config.stop_step)
    if checkpoints.record is not None:
        trainer.restore(checkpoints.record.step, checkpoints.load)
    return trainer, checkpoints


def _open_evaluator(
    config: TrainConfig, trainer: "Trainer", data: TrainingData, tracker: Tracker, is_leader: bool
) -> AbstractContextManager[Evaluator | None]:
    if data.held_out is None:
        return nullcontext()
    sweep = open_sweep(data.held_out, trainer, data.pad_id)
    return Evaluator(trainer, sweep, tracker, config.output_path, is_leader=is_leader)


def _read_data(config: TrainConfig) -> TrainingData:
    # Imported here because planning must not pay for transformers, pyarrow and grain.
    from simpo_pipeline.data.chat import load_tokenizer, pad_token_id
    from simpo_pipeline.data.order import Mixture
    from simpo_pipeline.data.pairs import check_lengths, check_vocabulary, read_pairs
    from simpo_pipeline.model.hf_weights import load_config

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


def _open_loader(config: TrainConfig, trainer: "Trainer", data: TrainingData) -> "PairLoader":
    from simpo_pipeline.data.loader import PairLoader

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
