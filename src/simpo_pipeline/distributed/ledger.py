"""The ledger: the ordered record of what this process did that its peers must do too.

A pod compares program k of host A with program k of host B. CPU and GPU do not, so this record is what proves there
that every process launched the same programs over many hosts in the same order. Beside those launches it holds the
meetings (gather, agree) in between: a host that goes on to a meeting while the others launch has left them as well.
Programs on the devices of one process alone are counted, not compared: hosts serve shards of unequal length.

It knows names and fingerprints, nothing of what programs compute.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Sequence

from simpo_pipeline.errors import ProgramError

_LAUNCH = "launch "
# Frames of these are not where something was launched from, but how.
_PLUMBING = (
    "simpo_pipeline.distributed",
    "simpo_pipeline.executor.processes",
    "steps.joined_job",
    "jaxtyping",
    "beartype",
    "contextlib",
    "functools",
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: which program, and on how many devices of how many processes it ran."""

    program: str
    fingerprint: str
    num_devices: int
    num_processes: int = 1


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that all processes do together: a launch over many processes, or a meeting."""

    identity: str
    """Equal in all processes."""
    text: str
    """For people: what it is, and from which line."""

    @property
    def is_launch(self) -> bool:
        """Whether it is a launch, and no meeting."""
        return self.identity.startswith(_LAUNCH)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Page:
    """What was done together since the processes were last found equal."""

    number: int
    events: list[Event] = dataclasses.field(default_factory=list)
    """Grows at its end while others read it."""

    def digest(self) -> str:
        """SHA-256 over its events, in order."""
        return _digest(event.identity for event in list(self.events))

    def launch_digest(self) -> str:
        """SHA-256 over the launches among its events, in order."""
        return _digest(event.identity for event in list(self.events) if event.is_launch)


class Ledger:
    """Launches in the order in which they were made; and, since the last `turn_page`, everything done together.

    One thread writes. Others may read at any time.
    """

    def __init__(self) -> None:
        self._launches: list[Launch] = []
        self._page = Page(0)
        self._closed: str | None = None

    def record(self, launch: Launch) -> None:
        """Appends one launch; called just before the program reaches the devices.

        Raises:
            ProgramError: the program spans processes, and these have parted.
        """
        if launch.num_processes > 1:
            if self._closed is not None:
                raise ProgramError(f"{launch.program!r} runs on devices of many processes, and {self._closed}")
            where = call_site()
            identity = f"{_LAUNCH}{launch.program} {launch.fingerprint}"
            self._page.events.append(Event(identity, f"launched {launch.program!r} ({where})"))
        self._launches.append(launch)

    def record_meeting(self, kind: str, where: str) -> Event:
        """Appends a meeting of all processes, called from `where`; returns its event."""
        event = Event(f"{kind} {where}", f"came to {kind} ({where})")
        self._page.events.append(event)
        return event

    def turn_page(self) -> None:
        """Forgets the events so far: they were compared, and are equal."""
        self._page = Page(self._page.number + 1)

    def close(self, why: str) -> None:
        """From now on every launch over many processes raises, because their launches no longer match."""
        self._closed = why

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Every launch so far."""
        return tuple(self._launches)

    @property
    def multi_process_launches(self) -> tuple[Launch, ...]:
        """The launches over several processes, which peers must match, in order."""
        return tuple(launch for launch in self._launches if launch.num_processes > 1)

    @property
    def page(self) -> Page:
        """The current page."""
        return self._page

    def digest(self) -> str:
        """SHA-256 over the order and fingerprints of the launches over several processes."""
        return _digest(f"{launch.program} {launch.fingerprint}" for launch in self.multi_process_launches)


def first_parting(pages: Sequence[Sequence[Event]]) -> tuple[int, list[Event | None]] | None:
    """The first position at which the processes' events differ, and each one's event there.

    None for a process whose record ends before; records of which one is the beginning of the other do not part.
    """
    for position in range(max(map(len, pages), default=0)):
        there = [page[position] if position < len(page) else None for page in pages]
        if len({event.identity for event in there if event is not None}) > 1:
            return position, there
    return None


def end_of_shortest(pages: Sequence[Sequence[Event]]) -> tuple[int, list[Event | None]]:
    """The position at which the shortest record ends, and each process's event there."""
    position = min(map(len, pages))
    return position, [page[position] if position < len(page) else None for page in pages]


def call_site() -> str:
    """`module:line` of the innermost caller that is not plumbing."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_PLUMBING):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
