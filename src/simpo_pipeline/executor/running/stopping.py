"""Calls of step functions that are stopped when their job loses its lease or is interrupted."""

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

    Python cannot end a thread from outside. So after a stop, every write of the function raises the reason. If the
    function has not ended after the grace time, the process exits: its results can no longer be used.

    Args:
        fence: The fence of the lease, which is asked before every write until the call is stopped.
        heartbeat_seconds: The interval between two renewals of the lease. It limits the grace time.
        before_exit: Called before the process exits because of a cancelled call.
    """

    def __init__(self, fence: Fence, heartbeat_seconds: float, before_exit: Callable[[], None]):
        self._fence = fence
        self._grace_seconds = min(heartbeat_seconds, _MAX_GRACE_SECONDS)
        self._before_exit = before_exit
        self._lock = threading.Lock()
        self._reason: StepError | None = None
        self._ended = threading.Event()

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Call the function and return its result.

        Raises:
            StepError: The reason for which the call was stopped, whatever the function returned or raised.
        """
        try:
            result = function()
        except Exception as error:
            self._end()
            if self._reason is not None and error is not self._reason:
                raise self._reason from error
            raise
        finally:
            self._end()
        if self._reason is not None:
            raise self._reason
        return result

    def _end(self) -> None:
        with self._lock:
            self._ended.set()

    def check(self) -> None:
        """See Fence.check."""
        if self._reason is not None:
            raise self._reason
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
        """Stop the call if the fence is closed: a function that ignores a refused write must not count as succeeded."""
        try:
            yield
        except LeaseLostError as error:
            self._stop(error)
            raise

    def lose(self) -> None:
        """Stop the call because its lease is lost. Return at once."""
        self._stop(LeaseLostError("The step was stopped because this job lost its lease to another job."))

    def cancel(self) -> None:
        """Stop the call because its job was interrupted. Return at once."""
        self._stop(StepCancelledError("The step was stopped because its job was interrupted."))

    def _stop(self, reason: StepError) -> None:
        with self._lock:
            if self._reason is not None or self._ended.is_set():
                return
            self._reason = reason
        threading.Thread(target=self._exit_unless_ended, name="stop-step", daemon=True).start()

    def _exit_unless_ended(self) -> None:
        if self._ended.wait(self._grace_seconds):
            return
        _logger.critical(
            "the step did not end within %.1f s of the request (%s); this process exits",
            self._grace_seconds,
            self._reason,
        )
        if isinstance(self._reason, StepCancelledError):
            self._before_exit()
        os._exit(STOPPED_EXIT_CODE)
