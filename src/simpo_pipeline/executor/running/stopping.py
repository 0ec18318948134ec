"""Stops a step function from another thread, for when its job lost the right to go on, or is interrupted."""

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
    """Raised inside the function; no Exception, so that `except Exception` does not swallow it."""


class StoppableCall:
    """One call of a function that `stop` ends with an error, wherever it is in Python code.

    A function that sits in native code (a long device program) does not hear of it; it is given `grace_seconds`, and
    then the process ends: what it does is of no use to anyone.
    """

    def __init__(self, grace_seconds: float):
        self._grace_seconds = grace_seconds
        self._lock = threading.Lock()
        self._shield = threading.Lock()
        self._thread: int | None = None
        self._raised = False
        self._reason: StepError = LeaseLostError(
            "The step was stopped, because this job lost its lease to another one."
        )
        self._ended = threading.Event()

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """What the function returns.

        Raises:
            StepError: the one that `stop` was called with meanwhile.
        """
        with self._lock:
            self._thread = threading.get_ident()
        try:
            try:
                return function()
            finally:
                self._settle()
        except _Stopped as stopped:
            self._settle()  # the first time it may have been interrupted itself
            raise self._reason from stopped

    def _settle(self) -> None:
        """From here on nothing is raised in this thread; what was raised and not yet delivered arrives here."""
        with self._lock:
            self._thread = None
            self._ended.set()
        self._await_what_was_raised()

    def _await_what_was_raised(self) -> None:
        if self._raised:
            # Python delivers it at a jump backwards. To take it back instead would leave the interpreter, 3.11 at
            # least, looking for it for ever: slowly, and without end under a profiler.
            for _ in range(_JUMPS):
                pass

    @contextmanager
    def shielded(self) -> Generator[None]:
        """While the block runs, in the function's thread, `stop` waits; for short blocks that hold locks."""
        with self._shield:
            self._await_what_was_raised()
            yield

    def stop(self, reason: StepError | None = None) -> None:
        """End the call, from another thread; returns at once. Without a reason, the lease was lost."""
        with self._shield, self._lock:
            if self._thread is None or self._raised:
                return
            self._raised = True
            self._reason = reason or self._reason
            _raise_in(self._thread, _Stopped)
        threading.Thread(target=self._end_process_if_deaf, name="stop-step", daemon=True).start()

    def _end_process_if_deaf(self) -> None:
        if not self._ended.wait(self._grace_seconds):
            _logger.critical(
                "the step did not stop within %.1f s of being told to (%s); this process ends",
                self._grace_seconds,
                self._reason,
            )
            os._exit(LOST_EXIT_CODE)


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    """Python's own way to raise in another thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
