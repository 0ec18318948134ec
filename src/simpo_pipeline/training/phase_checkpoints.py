"""Checkpoints of a training phase: which one it resumes from, and when it writes one."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from simpo_pipeline.errors import ConfigError, SimpoPipelineError
from simpo_pipeline.executor.records.status import CHECKPOINTS_FOLDER
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join
from simpo_pipeline.training.config import CheckpointConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from simpo_pipeline.training.checkpoints import CheckpointRecord, Checkpoints
    from simpo_pipeline.training.state import TrainState
    from simpo_pipeline.training.trainer import Trainer

logger = logging.getLogger(__name__)

# JSON values that a resuming step needs in addition to the state.
Progress = dict[str, Any]


def refuse_impossible(config: CheckpointConfig, run: StepRun) -> None:
    """Check that the job can write such checkpoints. Called before any device is touched.

    Raises:
        ConfigError: `when` is "on_failure" in a job of several processes.
    """
    if config.when == "on_failure" and run.processes.process_count > 1:
        raise ConfigError(
            f"checkpoint.when is 'on_failure' in a job of {run.processes.process_count} processes: the state is "
            "sharded over all of them, and a process that fails cannot make the others write their shards. Use 'every' "
            "with a number of updates."
        )


class PhaseCheckpoints:
    """Context manager around the updates of one phase. It does nothing if `when` is "never".

    A replay resumes from a checkpoint, but writes none.
    """

    def __init__(self, config: CheckpointConfig, run: StepRun, mesh: "Mesh", *, after: int, until: int):
        """Find the checkpoint to resume from, for a phase that runs the updates `after + 1` to `until`."""
        self._config = config
        self._until = until
        self._writes = not run.replaying
        self._hands_on = run.is_used_live
        self._files = None if config.when == "never" else _open(config, run, mesh)
        self._trainer: Trainer | None = None
        self._progress: Callable[[], Progress] = dict
        self._signals = _StopSignals()
        self.record: CheckpointRecord | None = None if self._files is None else self._files.newest(after, until)
        """The finished checkpoint to resume from; None if there is none."""

    def earlier(self, name: str) -> list[Any]:
        """Return one part of the progress stored in `record`; empty if there is no `record`."""
        return [] if self.record is None else list(self.record.progress[name])

    def load(self, abstract: "TrainState") -> "TrainState":
        """Return the state stored in `record`."""
        assert self._files is not None and self.record is not None
        return self._files.restore(self.record, abstract)

    def watch(self, trainer: "Trainer", progress: Callable[[], Progress]) -> "PhaseCheckpoints":
        """Set the trainer whose state is written with the result of `progress`. Return self, for a `with` statement."""
        self._trainer, self._progress = trainer, progress
        return self

    def __enter__(self) -> "PhaseCheckpoints":
        if self._config.when == "on_failure" and self._writes:
            self._signals.hold()
        return self

    def after_update(self) -> None:
        """Begin a checkpoint if one is due; otherwise record one whose write has finished in the meantime."""
        if self._files is None or self._trainer is None or not self._writes:
            return
        if self._signals.received is not None:
            self._write()
            self._signals.deliver()
        every = self._config.every
        # After the last update, the outputs themselves are recorded next.
        if every is not None and self._trainer.step % every == 0 and self._trainer.step != self._until:
            self._begin()
        else:
            self._files.settle(wait=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._signals.release()
        if self._files is None or (error is not None and not isinstance(error, Exception)):
            return  # interrupted: the job has to end quickly, whatever state it has
        try:
            self._end(failed=error is not None)
        except SimpoPipelineError as second:
            if error is None:
                raise
            logger.error("no checkpoint was written: %s", second)  # must not hide the first error
        self._signals.deliver()

    def _end(self, *, failed: bool) -> None:
        assert self._files is not None and self._trainer is not None
        on_failure = self._config.when == "on_failure"
        whole = self._trainer.has_state
        if self._writes and whole and (failed if on_failure else self._hands_on and not failed):
            self._write()
        self._files.settle()
        self._files.close()

    def _write(self) -> None:
        assert self._files is not None and self._trainer is not None
        if self.record is None or self.record.step != self._trainer.step:
            self._begin()
            self._files.settle()

    def _begin(self) -> None:
        assert self._files is not None and self._trainer is not None
        trainer = self._trainer
        self._files.begin(
            trainer.state, step=trainer.step, data_position=trainer.data_position, progress=self._progress()
        )


def _open(config: CheckpointConfig, run: StepRun, mesh: "Mesh") -> "Checkpoints":
    # Imported here because planning must not import jax, and a job without checkpoints needs no orbax.
    from simpo_pipeline.training.checkpoints import Checkpoints

    if run.replaying:  # it reads the checkpoints of the first run and writes none
        output = OutputFolder(join(run.recorded_path, CHECKPOINTS_FOLDER))
    else:
        output = run.output.subfolder(CHECKPOINTS_FOLDER)
    return Checkpoints(output, config, run.processes, mesh, version=run.version)


class _StopSignals:
    """Handlers that defer SIGTERM and SIGINT to the end of the update. A second signal is not deferred."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def hold(self) -> None:
        """Start to defer signals. Only the main thread receives signals, so this does nothing in other threads."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Restore the previous handlers."""
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous or signal.SIG_DFL)

    def deliver(self) -> None:
        """Do now what the deferred signal would have done when it arrived."""
        self.release()
        number, self.received = self.received, None
        if number is not None:
            signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if again:
            self.deliver()
        logger.warning("%s: stopping after this update, with a checkpoint", signal.Signals(number).name)
