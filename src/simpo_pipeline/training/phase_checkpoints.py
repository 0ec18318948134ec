"""The checkpoints of a training step: from which one it goes on, and when it writes one."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from simpo_pipeline.errors import ConfigError, SimpoPipelineError
from simpo_pipeline.executor.records.status import CHECKPOINTS_FOLDER
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.storage.paths import join
from simpo_pipeline.training.config import CheckpointConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from simpo_pipeline.training.checkpoints import CheckpointRecord, Checkpoints
    from simpo_pipeline.training.state import TrainState
    from simpo_pipeline.training.trainer import Trainer

logger = logging.getLogger(f"simpo_pipeline.{__name__}")

# Made of JSON values: what a step that goes on from a checkpoint has to know besides the state.
Progress = dict[str, Any]


def refuse_impossible(config: CheckpointConfig, run: StepRun) -> None:
    """Said before any device is touched.

    Raises:
        ConfigError: `on_failure` in a job of many processes.
    """
    if config.when == "on_failure" and run.processes.process_count > 1:
        raise ConfigError(
            f"checkpoint.when is 'on_failure' in a job of {run.processes.process_count} processes: the state lies in "
            "all of them, and one that fails cannot make the others write theirs. Use 'every' with a number of updates."
        )


class PhaseCheckpoints:
    """Around the updates of one phase; where `when` is never it does nothing.

    A replay goes on from a checkpoint, and writes none.
    """

    def __init__(self, config: CheckpointConfig, run: StepRun, mesh: "Mesh", *, after: int, until: int):
        """The phase runs the updates after `after` up to `until`."""
        self._config = config
        self._until = until
        self._writes = not run.replaying
        self._hands_on = run.is_used_live
        self._files = None if config.when == "never" else _open(config, run, mesh)
        self._trainer: Trainer | None = None
        self._progress: Callable[[], Progress] = dict
        self._signals = _StopSignals()
        self.record: CheckpointRecord | None = None if self._files is None else self._files.newest(after, until)
        """The finished checkpoint to go on from."""

    def earlier(self, name: str) -> list[Any]:
        """A part of the progress up to `record`; empty without one."""
        return [] if self.record is None else list(self.record.progress[name])

    def load(self, abstract: "TrainState") -> "TrainState":
        """The state of `record`."""
        assert self._files is not None and self.record is not None
        return self._files.restore(self.record, abstract)

    def watch(self, trainer: "Trainer", progress: Callable[[], Progress]) -> "PhaseCheckpoints":
        """Names the trainer whose state is to be written, with what `progress` says then; for a `with` statement."""
        self._trainer, self._progress = trainer, progress
        return self

    def __enter__(self) -> "PhaseCheckpoints":
        if self._config.when == "on_failure" and self._writes:
            self._signals.hold()
        return self

    def after_update(self) -> None:
        """Writes a checkpoint where one is due, or records the one that has been written meanwhile."""
        if self._files is None or self._trainer is None or not self._writes:
            return
        if self._signals.received is not None:
            self._write()
            self._signals.deliver()
        every = self._config.every
        # After the last update the outputs themselves are about to be recorded.
        if every is not None and self._trainer.step % every == 0 and self._trainer.step != self._until:
            self._begin()
        else:
            self._files.settle(wait=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._signals.release()
        if self._files is None or (error is not None and not isinstance(error, Exception)):
            return  # interrupted: whatever this job holds, it is told to hurry
        try:
            self._end(failed=error is not None)
        except SimpoPipelineError as second:
            if error is None:
                raise
            logger.error("no checkpoint was written: %s", second)  # must not hide what went wrong before
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

    folder = join(run.recorded_path or run.output_path, CHECKPOINTS_FOLDER)
    return Checkpoints(folder, config, run.processes, mesh, version=run.version)


class _StopSignals:
    """SIGTERM and SIGINT wait for the end of the update; the second of them does not."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def hold(self) -> None:
        """From now on they are noted. Only a main thread hears of signals; in others nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """From now on they do what they did before."""
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous or signal.SIG_DFL)

    def deliver(self) -> None:
        """Does now what the signal would have done when it came."""
        self.release()
        number, self.received = self.received, None
        if number is not None:
            signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if again:
            self.deliver()
        logger.warning("%s: stopping after this update, with a checkpoint", signal.Signals(number).name)
