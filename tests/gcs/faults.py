"""Injected faults: seeded faults in responses, and a signal to a process at a request with a given number."""

import os
import random
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

_STATUSES = ("429", "500", "503")
_KINDS = {*_STATUSES, "cut_before", "cut_after", "slow", "delete_lost"}


def _concerns(method: str, name: str, methods: list[str] | None, match: str | None) -> bool:
    return (methods is None or method in methods) and (match is None or re.search(match, name) is not None)


@dataclass
class Faults:
    """Selection of the requests that fail and how, by a seeded generator in the order of arrival.

    The kinds of fault:

    - "429", "500", "503": the server responds with this status and does not execute the request.
    - "cut_before": the connection is closed before the request is executed.
    - "cut_after": the request is executed, then the connection is closed without a response or in the middle of it.
    - "slow": the server pauses before it executes the request.
    - "delete_lost": a DELETE is executed and gets status 503, so that a retry does not find the object.
    """

    seed: int = 0
    rate: float = 1.0
    kinds: list[str] = field(default_factory=list)
    match: str | None = None
    """A regular expression on the object's name."""
    methods: list[str] | None = None
    times: int | None = None
    """Maximum number of faults; None for no limit."""
    slow_seconds: float = 0.2

    def __post_init__(self):
        unknown = set(self.kinds) - _KINDS
        if unknown:
            raise ValueError(f"There are no faults {sorted(unknown)}.")
        self._random = random.Random(self.seed)

    def choose(self, method: str, name: str) -> str | None:
        """Return the fault of the request that arrives now, or None."""
        kinds = [kind for kind in self.kinds if kind != "delete_lost" or method == "DELETE"]
        if not kinds or self.times == 0 or not _concerns(method, name, self.methods, self.match):
            return None
        if self._random.random() >= self.rate:
            return None
        if self.times is not None:
            self.times -= 1
        return self._random.choice(kinds)

    def cuts_in_the_middle(self) -> bool:
        """Return whether half of a cut response is sent; otherwise none of it is."""
        return self._random.random() < 0.5


def status_of(fault: str | None) -> int | None:
    """Return the error status of a fault that replaces the execution of the request, or None."""
    return int(fault) if fault in _STATUSES else None


@dataclass
class StopAt:
    """Counter of requests from 1 that sends a signal to a process at number `request`. With 0 it only counts."""

    pid: int = 0
    request: int = 0
    when: str = "before"
    signal: str = "KILL"
    methods: list[str] | None = None
    match: str | None = None
    """A regular expression on the object's name."""

    def __post_init__(self):
        if self.when not in ("before", "after") or self.signal not in ("KILL", "STOP"):
            raise ValueError(f"There is no {self.when!r} or no {self.signal!r}.")
        if self.request and self.pid <= 0:
            raise ValueError("A signal needs the pid of a process.")
        self.counted = 0
        self.fired = False

    def is_due(self, method: str, name: str) -> bool:
        """Count the request that arrives now, and return whether the signal is due at it."""
        if not _concerns(method, name, self.methods, self.match):
            return False
        self.counted += 1
        return self.counted == self.request

    def fire(self) -> None:
        """Send the signal and wait until it has taken effect, which takes a moment."""
        self.fired = True
        try:
            os.kill(self.pid, getattr(signal, f"SIG{self.signal}"))
        except ProcessLookupError:
            return
        states = "ZX" if self.signal == "KILL" else "T"
        deadline = time.monotonic() + 5
        while _state(self.pid) not in states and time.monotonic() < deadline:
            time.sleep(0.001)


def _state(pid: int) -> str:
    """Return the state letter of a process in Linux, or X if the process is gone."""
    try:
        # The second field is the program name in parentheses, which may contain spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
