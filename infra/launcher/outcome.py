"""Following a job on all hosts to its end, and the verdict."""

import dataclasses
import pathlib
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from launcher.clock import Clock
from launcher.console import Console, LineFile
from launcher.host_job import HostState
from launcher.options import Timing

LAST_LINES = 20


class Feed(Protocol):
    """A host, as the one who follows it sees it."""

    @property
    def host(self) -> int: ...

    def lines(self, first: int) -> Iterator[tuple[int, str]]:
        """Its lines from a number on, each once, with their numbers; ends with the job or with the connection."""
        ...

    @property
    def was_cut(self) -> bool:
        """Whether the lines that were read last may lack some at their end."""
        ...

    def state(self) -> HostState | None:
        """How its job stands; None if the host does not answer."""
        ...

    def close(self) -> None:
        """Whoever reads its lines sees their end."""
        ...


@dataclasses.dataclass(frozen=True)
class HostEnd:
    """How a host's part ended. `state` is None for a host that did not answer any more."""

    host: int
    state: HostState | None
    last_lines: tuple[str, ...]

    @property
    def is_success(self) -> bool:
        """Whether the command ended with 0."""
        return self.state is not None and self.state.word in ("exited", "dead") and self.state.exit_code == 0

    def told(self, count: int) -> str:
        """What happened, for a person."""
        if self.state is None:
            what = "did not answer any more"
        elif self.state.word == "exited" and self.state.is_out_of_memory:
            what = f"was ended for lack of the host's memory (exit code {self.state.exit_code})"
        elif self.state.word == "exited":
            what = f"ended with exit code {self.state.exit_code}"
        else:
            what = f"has no running job ({self.state.word})"
        lines = "\n".join(f"    {line}" for line in self.last_lines)
        return f"host {self.host} of {count} {what}, and no other did before. Its last lines:\n{lines}"


class _Follower(threading.Thread):
    """Passes one host's lines on until its job has ended or the host stays silent."""

    def __init__(self, feed: Feed, ends: "queue.Queue[HostEnd]", following: "Following") -> None:
        super().__init__(daemon=True)
        self._feed = feed
        self._ends = ends
        self._following = following
        self._seen = 0
        self._last: deque[str] = deque(maxlen=LAST_LINES)

    def run(self) -> None:
        file = self._following.line_file(self._feed.host)
        state: HostState | None = None
        try:
            state = self._follow(file)
        finally:
            file.close()
            self._ends.put(HostEnd(self._feed.host, state, tuple(self._last)))

    def _follow(self, file: LineFile) -> HostState | None:
        clock, timing = self._following.clock, self._following.timing
        silent_since: float | None = None
        while not self._following.is_over.is_set():
            self._read_new(file)
            state = self._feed.state()
            if state is not None and not state.is_running:
                if self._feed.was_cut:
                    self._read_new(file)
                return state
            if state is not None:
                silent_since = None
            elif silent_since is None:
                silent_since = clock.now()
            elif clock.now() - silent_since > timing.reach:
                return None
            clock.wait(self._following.is_over, timing.poll)
        return None

    def _read_new(self, file: LineFile) -> None:
        """Passes on what was not seen yet."""
        for number, line in self._feed.lines(self._seen + 1):
            self._seen = number
            self._last.append(line)
            file.write(line)
            self._following.console.say(f"[host {self._feed.host}] {line}")


class Following:
    """One attempt of a job, followed on all its hosts."""

    def __init__(
        self, feeds: Sequence[Feed], timing: Timing, clock: Clock, console: Console, folder: pathlib.Path
    ) -> None:
        self.timing = timing
        self.clock = clock
        self.console = console
        self.is_over = threading.Event()
        self._feeds = feeds
        self._folder = folder

    def line_file(self, host: int) -> LineFile:
        """Where a host's lines are kept on this machine."""
        return LineFile(self._folder / f"host_{host}.log", self.console)

    def first_failed(self) -> HostEnd | None:
        """Waits for all hosts; when one has failed, no longer than `timing.grace` for the others. None: all ended well.

        The one that ended first by the hosts' clocks, not the one that was heard of first. A host that does not answer
        is named if none failed with an exit code.
        """
        ends: queue.Queue[HostEnd] = queue.Queue()
        followers = [_Follower(feed, ends, self) for feed in self._feeds]
        for follower in followers:
            follower.start()
        try:
            failed = self._collect(ends, len(followers))
        finally:
            self.is_over.set()
            for feed in self._feeds:
                feed.close()
        for follower in followers:
            follower.join()
        told = [(end, end.state.ended) for end in failed if end.state is not None]
        # Of those whose time is not known, the one that was heard of first.
        first = min(told, key=lambda each: (not each[1], each[1]), default=None)
        return first[0] if first else failed[0] if failed else None

    def _collect(self, ends: "queue.Queue[HostEnd]", count: int) -> list[HostEnd]:
        failed: list[HostEnd] = []
        ended = 0
        deadline = float("inf")
        while ended < count and self.clock.now() < deadline:
            try:
                end = ends.get_nowait()
            except queue.Empty:
                self.clock.wait(self.is_over, self.timing.tick)
                continue
            ended += 1
            if not end.is_success:
                failed.append(end)
                deadline = min(deadline, self.clock.now() + self.timing.grace)
        return failed
