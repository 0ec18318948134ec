"""What one process shows of itself to the others of its job: where it is, and whether it moves.

The main thread sets it as it goes; the monitor's thread reads it and publishes it. Every write is one assignment.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

Failure = Mapping[str, Any]
OnAbort = Callable[[Failure], None]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of work.

    Attributes:
        name: What people read of it.
        deadline_seconds: It may go so long without progress; None: any time.
        on_abort: Called, in another thread, when the process has to be ended from outside during this phase.
    """

    name: str
    deadline_seconds: float | None
    on_abort: OnAbort | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The standing of one process at one moment, as its peers see it."""

    host: str
    pid: int
    beat: int
    phase: str
    page: int
    num_events: int
    idle_seconds: float
    stalled: bool
    waiting: str | None
    failure: Failure | None
    leaving: str | None

    def describe(self, index: int, count: int) -> str:
        """The process, in words."""
        return f"host {self.host} (process {index} of {count}, pid {self.pid})"


class Standing:
    """Where this process is; one phase at a time."""

    def __init__(self, deadline_seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_progress = clock()
        self.phase = Phase("between steps", deadline_seconds)
        self.waiting: str | None = None
        # The page of the ledger in which this process failed, and how.
        self.failure: tuple[int, Failure] | None = None
        self.leaving: str | None = None
        # The page of the ledger in which a peer failed, and what is known of it.
        self.peer_failure: tuple[int, str] | None = None

    def progress(self) -> None:
        """Says that the process moves."""
        self._last_progress = self._clock()

    def enter(self, phase: Phase) -> None:
        """Begins another phase."""
        self.progress()
        self.phase = phase

    def report(self, beat: int, page: int, num_events: int) -> Report:
        """What the peers get to see now."""
        idle_seconds = self._clock() - self._last_progress
        deadline = self.phase.deadline_seconds
        return Report(
            host=socket.gethostname(),
            pid=os.getpid(),
            beat=beat,
            phase=self.phase.name,
            page=page,
            num_events=num_events,
            idle_seconds=idle_seconds,
            stalled=self.waiting is None and deadline is not None and idle_seconds > deadline,
            waiting=self.waiting,
            failure=self.failure[1] if self.failure is not None and self.failure[0] == page else None,
            leaving=self.leaving,
        )
