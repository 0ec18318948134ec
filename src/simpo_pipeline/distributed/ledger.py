"""The ledger: an ordered record of the operations of this process that its peers must match.

A pod compares program k of host A with program k of host B. CPUs and GPUs do not, so on them this record is the proof
that every process launched the same multi-process programs in the same order. The ledger also records the meetings
(gather, agree) between those launches, because a host that reaches a meeting while the others launch has diverged too.
Programs on the devices of a single process are counted but not compared, because hosts serve shards of unequal length.

The ledger knows names and fingerprints, but not what programs compute.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Sequence

from simpo_pipeline.errors import ProgramError

_LAUNCH = "launch "
# Modules whose frames `call_site` skips: they perform a launch but do not decide on it.
_PLUMBING = (
    "simpo_pipeline.distributed",
    "simpo_pipeline.processes",
    "simpo_pipeline.job.joining",
    "jaxtyping",
    "beartype",
    "contextlib",
    "functools",
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the program, and the number of devices and processes that it ran on."""

    program: str
    fingerprint: str
    num_devices: int
    num_processes: int = 1


@dataclasses.dataclass(frozen=True)
class Event:
    """One operation that all processes share: a launch that spans processes, or a meeting."""

    identity: str
    """Text that must be equal in all processes."""
    text: str
    """Human-readable description: the operation and the line that called it."""

    @property
    def is_launch(self) -> bool:
        """Whether the event is a launch rather than a meeting."""
        return self.identity.startswith(_LAUNCH)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Page:
    """The shared events since the ledgers of the processes were last compared."""

    number: int
    events: list[Event] = dataclasses.field(default_factory=list)
    """Append-only; other threads may read it at any time."""

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the events, in order."""
        return _digest(event.identity for event in list(self.events))

    def launch_digest(self) -> str:
        """Return the SHA-256 (hex) of the launches among the events, in order."""
        return _digest(event.identity for event in list(self.events) if event.is_launch)


class Ledger:
    """All launches in the order in which they were made, and the shared events since the last `turn_page`.

    Only one thread may write. Other threads may read at any time.
    """

    def __init__(self) -> None:
        self._launches: list[Launch] = []
        self._page = Page(0)
        self._closed: str | None = None

    def record(self, launch: Launch) -> None:
        """Append one launch. Call this just before the program reaches the devices.

        Raises:
            ProgramError: the program spans processes, and the processes have diverged.
        """
        if launch.num_processes > 1:
            if self._closed is not None:
                raise ProgramError(f"cannot launch {launch.program!r}, which spans several processes: {self._closed}")
            where = call_site()
            identity = f"{_LAUNCH}{launch.program} {launch.fingerprint}"
            self._page.events.append(Event(identity, f"launched {launch.program!r} ({where})"))
        self._launches.append(launch)

    def record_meeting(self, kind: str, where: str) -> Event:
        """Append a meeting of all processes, called from `where`, and return its event."""
        event = Event(f"{kind} {where}", f"reached {kind} ({where})")
        self._page.events.append(event)
        return event

    def turn_page(self) -> None:
        """Discard the events so far, after they were compared."""
        self._page = Page(self._page.number + 1)

    def close(self, why: str) -> None:
        """Make every later launch that spans processes raise, because the launches no longer match."""
        self._closed = why

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Every launch so far."""
        return tuple(self._launches)

    @property
    def multi_process_launches(self) -> tuple[Launch, ...]:
        """The launches that span processes, in order. Peers must match them."""
        return tuple(launch for launch in self._launches if launch.num_processes > 1)

    @property
    def page(self) -> Page:
        """The current page."""
        return self._page

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the names and fingerprints of the launches that span processes, in order."""
        return _digest(f"{launch.program} {launch.fingerprint}" for launch in self.multi_process_launches)


def first_divergence(pages: Sequence[Sequence[Event]]) -> tuple[int, list[Event | None]] | None:
    """Return the first position at which the processes' events differ, and each process's event at that position.

    The event is None for a process whose record ends earlier. A record that is a prefix of another does not diverge
    from it. Return None if no records diverge.
    """
    for position in range(max(map(len, pages), default=0)):
        there = [page[position] if position < len(page) else None for page in pages]
        if len({event.identity for event in there if event is not None}) > 1:
            return position, there
    return None


def end_of_shortest(pages: Sequence[Sequence[Event]]) -> tuple[int, list[Event | None]]:
    """Return the position at which the shortest record ends, and each process's event at that position."""
    position = min(map(len, pages))
    return position, [page[position] if position < len(page) else None for page in pages]


def call_site() -> str:
    """Return `module:line` of the innermost caller outside the modules in `_PLUMBING`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_PLUMBING):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
