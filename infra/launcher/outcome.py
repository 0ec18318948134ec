"""Following a job on all hosts until it finishes, and its outcome."""

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
from launcher.options import PollTiming

LAST_LINES = 20


class Feed(Protocol):
    """A source of one host's output lines and state."""

    @property
    def host(self) -> int: ...

    def lines(self, first: int) -> Iterator[tuple[int, str]]:
        """Yield the numbered lines from number `first` on, each once. Stops when the job or the connection ends."""
        ...

    @property
    def was_cut(self) -> bool:
        """Whether lines may be missing at the end of the last read."""
        ...

    def state(self) -> HostState | None:
        """Return the state of the host's job, or None if the host does not respond."""
        ...

    def close(self) -> None:
        """Close the feed. A reader of its lines then reaches their end."""
        ...


@dataclasses.dataclass(frozen=True)
class HostResult:
    """The end of the job on one host. `state` is None for a host that stopped responding."""

    host: int
    state: HostState | None
    last_lines: tuple[str, ...]

    @property
    def is_success(self) -> bool:
        """Whether the command exited with code 0."""
        return self.state is not None and self.state.word in ("exited", "dead") and self.state.exit_code == 0

    def told(self, count: int) -> str:
        """Return a description of what happened, for the user."""
        if self.state is None:
            what = "stopped responding"
        elif self.state.word == "exited" and self.state.is_out_of_memory:
            what = f"ran out of host memory (exit code {self.state.exit_code})"
        elif self.state.word == "exited":
            what = f"exited with code {self.state.exit_code}"
        else:
            what = f"has no running job ({self.state.word})"
        lines = "\n".join(f"    {line}" for line in self.last_lines)
        return f"host {self.host} of {count} {what}; no other host failed before it. Its last lines:\n{lines}"


class _Follower(threading.Thread):
    """Passes one host's lines on until its job has finished or the host stays silent."""

    def __init__(self, feed: Feed, ends: "queue.Queue[HostResult]", following: "Following") -> None:
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
            self._ends.put(HostResult(self._feed.host, state, tuple(self._last)))

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
        """Save and print the lines that were not seen yet."""
        for number, line in self._feed.lines(self._seen + 1):
            self._seen = number
            self._last.append(line)
            file.write(line)
            self._following.console.say(f"[host {self._feed.host}] {line}")


class Following:
    """Follows one attempt of a job on all its hosts."""

    def __init__(
        self, feeds: Sequence[Feed], timing: PollTiming, clock: Clock, console: Console, folder: pathlib.Path
    ) -> None:
        self.timing = timing
        self.clock = clock
        self.console = console
        self.is_over = threading.Event()
        self._feeds = feeds
        self._folder = folder

    def line_file(self, host: int) -> LineFile:
        """Return the local file for a host's lines."""
        return LineFile(self._folder / f"host_{host}.log", self.console)

    def first_failed(self) -> HostResult | None:
        """Wait for all hosts. After one has failed, wait at most `timing.grace` seconds for the others.

        Returns:
            The host that failed first by the hosts' clocks, which need not be the first whose failure was noticed.
            A host that does not respond is returned only if no other failure was reported. None if all succeeded.
        """
        ends: queue.Queue[HostResult] = queue.Queue()
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
        reported = [(end, end.state.ended) for end in failed if end.state is not None]
        # Among those without a known time, the one that was noticed first.
        first = min(reported, key=lambda each: (not each[1], each[1]), default=None)
        return first[0] if first else failed[0] if failed else None

    def _collect(self, ends: "queue.Queue[HostResult]", count: int) -> list[HostResult]:
        failed: list[HostResult] = []
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
