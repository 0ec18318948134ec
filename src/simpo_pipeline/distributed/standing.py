"""The standing of a process in its job: its current phase, and whether it makes progress.

The main thread updates it; the monitor thread reads and publishes it. Every write is a single assignment.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Callable

from simpo_pipeline.processes import Failure

OnAbort = Callable[[Failure], None]


@dataclasses.dataclass(frozen=True)
class WatchedPhase:
    """A named part of a process's work.

    Attributes:
        name: Name shown in messages.
        deadline_seconds: Longest time without progress; None means no limit.
        on_abort: Called in another thread if the monitor has to end the process during this phase.
    """

    name: str
    deadline_seconds: float | None
    on_abort: OnAbort | None = None


@dataclasses.dataclass(frozen=True)
class StatusReport:
    """A snapshot of the standing of one process, as its peers see it."""

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
        """Return a description of the process for messages."""
        return f"host {self.host} (process {index} of {count}, pid {self.pid})"


class ProcessStatus:
    """The current standing of this process. It is in one phase at a time."""

    def __init__(self, deadline_seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_progress = clock()
        self.phase = WatchedPhase("between steps", deadline_seconds)
        self.waiting: str | None = None
        # The ledger page on which this process failed, and its failure.
        self.failure: tuple[int, Failure] | None = None
        self.leaving: str | None = None
        # The ledger page on which a peer failed, and a description of its failure.
        self.peer_failure: tuple[int, str] | None = None

    def progress(self) -> None:
        """Record that the process makes progress."""
        self._last_progress = self._clock()

    def enter(self, phase: WatchedPhase) -> None:
        """Start another phase."""
        self.progress()
        self.phase = phase

    def report(self, beat: int, page: int, num_events: int) -> StatusReport:
        """Return a snapshot for the peers."""
        idle_seconds = self._clock() - self._last_progress
        deadline = self.phase.deadline_seconds
        return StatusReport(
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
