"""Calls of step functions that another thread can stop, when their job loses its lease or is interrupted."""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

from simpo_pipeline.errors import LeaseLostError, StepError

_logger = logging.getLogger("simpo_pipeline.executor")
ResultT = TypeVar("ResultT")
LOST_EXIT_CODE = 1
_JUMPS = 100


class _Stopped(BaseException):
    """Raised inside the function. It is not an `Exception`, so `except Exception` does not catch it."""


class StoppableCall:
    """One call of a function that `stop` can end with an error, anywhere in Python code.

    A function that is in native code, such as a long device program, does not notice the error. After `grace_seconds`
    the process exits, because the results of the function can no longer be used.
    """

    def __init__(self, grace_seconds: float):
        self._grace_seconds = grace_seconds
        self._lock = threading.Lock()
        self._shield = threading.Lock()
        self._thread: int | None = None
        self._raised = False
        self._reason: StepError = LeaseLostError("The step was stopped because this job lost its lease to another job.")
        self._ended = threading.Event()

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Call the function and return its result.

        Raises:
            StepError: the error that `stop` was called with during the call.
        """
        with self._lock:
            self._thread = threading.get_ident()
        try:
            try:
                return function()
            finally:
                self._settle()
        except _Stopped as stopped:
            self._settle()  # the first call may itself have been interrupted
            raise self._reason from stopped

    def _settle(self) -> None:
        """Let `stop` raise nothing more in this thread. An exception that is not yet delivered arrives here."""
        with self._lock:
            self._thread = None
            self._ended.set()
        self._await_pending_exception()

    def _await_pending_exception(self) -> None:
        if self._raised:
            # Python delivers the exception at a backward jump. If it were withdrawn instead, the interpreter (at least
            # 3.11) would keep checking for it forever: slowly, and without end under a profiler.
            for _ in range(_JUMPS):
                pass

    @contextmanager
    def shielded(self) -> Generator[None]:
        """Make `stop` wait while the block runs in the function's thread. Use it for short blocks that hold locks."""
        with self._shield:
            self._await_pending_exception()
            yield

    def stop(self, reason: StepError | None = None) -> None:
        """End the call from another thread, and return at once. Without a reason, the reason is a lost lease."""
        with self._shield, self._lock:
            if self._thread is None or self._raised:
                return
            self._raised = True
            self._reason = reason or self._reason
            _raise_in(self._thread, _Stopped)
        threading.Thread(target=self._exit_unless_stopped, name="stop-step", daemon=True).start()

    def _exit_unless_stopped(self) -> None:
        if not self._ended.wait(self._grace_seconds):
            _logger.critical(
                "the step did not stop within %.1f s of the request (%s); this process exits",
                self._grace_seconds,
                self._reason,
            )
            os._exit(LOST_EXIT_CODE)


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    """Raise an exception in another thread, with CPython's own function for this."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
