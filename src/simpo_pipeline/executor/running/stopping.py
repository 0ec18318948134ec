"""Calls of step functions that are stopped when their job loses its lease or is interrupted.

Python cannot end a thread from outside. So from a stop on, every write of the function raises the reason, and whatever
it returns is discarded. If it has not ended after a grace time, the process exits, because its results can no longer be
used. That ends the other steps of the process too: they are recorded as cancelled, so that other jobs need not wait for
their leases to expire.
"""

import logging
import os
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import TypeVar, final

from simpo_pipeline.errors import LeaseLostError, StepCancelledError, StepError
from simpo_pipeline.storage.fence import Fence

_logger = logging.getLogger("simpo_pipeline.executor")
ResultT = TypeVar("ResultT")
STOPPED_EXIT_CODE = 1
_MAX_GRACE_SECONDS = 5.0


@final
class StoppableCall(Fence):
    """One call of a step function, and the fence of its output folder.

    Args:
        step_name: The name of the step, for messages.
        fence: The fence of the lease. It is asked before every write until the call is stopped.
        record_cancelled: Records that the step was cancelled. Called if the process has to exit during the call.
    """

    def __init__(self, step_name: str, fence: Fence, record_cancelled: Callable[[], None]):
        self.step_name = step_name
        self.record_cancelled = record_cancelled
        self.ended = threading.Event()
        self.reason: StepError | None = None
        """Why the call was stopped; None while it may go on."""
        self._fence = fence
        self._lock = threading.Lock()
        self._on_stop: Callable[[], None] | None = None

    def call(self, function: Callable[[], ResultT], on_stop: Callable[[], None]) -> ResultT:
        """Call the function and return its result.

        Args:
            function: What to call.
            on_stop: Called in a thread of its own when the call is stopped.

        Raises:
            StepError: The reason for which the call was stopped, whatever the function returned or raised.
        """
        self._on_stop = on_stop
        try:
            try:
                if self.reason is not None:
                    raise self.reason
                result = function()
            finally:
                with self._lock:  # from here on a stop does nothing
                    self.ended.set()
        except Exception as error:
            if self.reason is not None and error is not self.reason:
                raise self.reason from error
            raise
        if self.reason is not None:
            raise self.reason
        return result

    def check(self) -> None:
        """See Fence.check."""
        if self.reason is not None:
            raise self.reason
        with self._noted():
            self._fence.check()

    @contextmanager
    def hold(self) -> Generator[None]:
        """See Fence.hold."""
        self.check()
        with ExitStack() as held:
            with self._noted():
                held.enter_context(self._fence.hold())
            yield

    @contextmanager
    def _noted(self) -> Generator[None]:
        """Stop the call if its lease is lost: a function that ignores this error must not count as succeeded."""
        try:
            yield
        except LeaseLostError as error:
            self.stop(error)
            raise

    def lose(self) -> None:
        """Stop the call because its lease is lost. Return at once."""
        self.stop(LeaseLostError("The step was stopped because this job lost its lease to another job."))

    def cancel(self) -> None:
        """Stop the call because its job was interrupted. Return at once."""
        self.stop(StepCancelledError("The step was stopped because its job was interrupted."))

    def stop(self, reason: StepError) -> None:
        """Refuse all further writes with `reason`. Return at once. Only the first stop counts."""
        with self._lock:
            if self.reason is not None or self.ended.is_set():
                return
            self.reason = reason
        if self._on_stop is not None:
            threading.Thread(target=self._on_stop, name="stop-step", daemon=True).start()


class RunningCalls:
    """The step functions that this process is calling under a lease.

    Args:
        heartbeat_seconds: The interval between two renewals of a lease. It limits the grace time of a stopped call.
    """

    def __init__(self, heartbeat_seconds: float):
        self._grace_seconds = min(heartbeat_seconds, _MAX_GRACE_SECONDS)
        self._calls: list[StoppableCall] = []
        self._exiting = threading.Lock()
        self.interrupted = False
        """Whether the job was interrupted, so that no further step may start."""

    def call(self, call: StoppableCall, function: Callable[[], ResultT]) -> ResultT:
        """Make the call. See StoppableCall.call."""
        self._calls.append(call)
        try:
            if self.interrupted:
                call.cancel()
            return call.call(function, lambda: self._exit_unless_ended(call))
        finally:
            self._calls.remove(call)

    def interrupt(self) -> None:
        """Stop all calls because the job was interrupted, and return at once. Later calls do not start."""
        self.interrupted = True
        for call in list(self._calls):
            call.cancel()

    def _exit_unless_ended(self, call: StoppableCall) -> None:
        if call.ended.wait(self._grace_seconds):
            return
        with self._exiting:  # never released: the process ends
            try:
                _logger.critical(
                    "step %s did not end within %.1f s of its stop (%s); this process exits",
                    *(call.step_name, self._grace_seconds, call.reason),
                )
                self._cancel_all()
            finally:
                os._exit(STOPPED_EXIT_CODE)

    def _cancel_all(self) -> None:
        """Record all calls whose lease is not lost as cancelled. Storage that does not answer is not waited for."""
        for other in list(self._calls):
            other.cancel()
        cancelled = [other for other in list(self._calls) if isinstance(other.reason, StepCancelledError)]
        recorders = [threading.Thread(target=other.record_cancelled, daemon=True) for other in cancelled]
        for recorder in recorders:
            recorder.start()
        for recorder in recorders:
            recorder.join(self._grace_seconds)
