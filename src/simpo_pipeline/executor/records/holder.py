"""Holder of a lease: a run, in a process, on a machine. This is the content of a lease file."""

import functools
import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

_START_TIME_FIELD = 22


@dataclass(frozen=True)
class Holder:
    """The holder of a lease, as recorded in the lease file."""

    run_id: str
    host_name: str
    pid: int
    time: str
    """Time of the last heartbeat in UTC, for people to read."""
    beat: int = 0
    """Counter of renewals, so that each renewal changes the file."""
    pid_space: str = ""
    """Scope in which the pid is valid: one boot of one machine, and one pid namespace (such as a container's) on it."""
    started: str = ""
    """Start time of the process in ticks since boot. It is needed because pids are reused."""

    @staticmethod
    def of_this_process(run_id: str) -> "Holder":
        """Return the holder that represents this process in one run."""
        pid = os.getpid()
        return Holder(run_id, socket.gethostname(), pid, utc_now(), 0, _pid_space(), _start_time(pid) or "")

    def encode(self) -> bytes:
        """Return the content of the lease file."""
        return json.dumps(self.__dict__, sort_keys=True).encode("ascii")

    def describe(self) -> str:
        """Return a description of the holder for messages."""
        return f"pid {self.pid} on host {self.host_name} (run {self.run_id}, last heartbeat {self.time})"

    def is_gone(self) -> bool:
        """Return whether the holder is known to have died.

        This is known if its pid is valid in this pid space, and no process or a different process has that pid now.
        """
        if not self.pid_space or self.pid_space != _pid_space():
            return False
        started = _start_time(self.pid)
        return started != self.started if started is not None else not _exists(self.pid)


def parse_holder(data: bytes) -> Holder | None:
    """Parse the content of a lease file. Return None if it is not a lease; then only its age counts."""
    try:
        fields = cast(dict[str, Any], json.loads(data))
        texts = [str(fields[name]) for name in ("run_id", "host_name", "time")]
        pid, beat = int(fields["pid"]), int(fields["beat"])
        pid_space, started = str(fields.get("pid_space", "")), str(fields.get("started", ""))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    run_id, host_name, written = texts
    return Holder(run_id, host_name, pid, written, beat, pid_space, started) if pid > 0 else None


@functools.cache
def _pid_space() -> str:
    """Return the pid space of this process. Without /proc it is empty, and no holder is known to have died."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Return the start time of a process in this pid namespace.

    Return None if it cannot be read: /proc may hide the processes of other users. Return "ended" for a process that
    has exited but whose exit status has not been read.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    after_name = text.rpartition(")")[2].split()  # the name may contain spaces and parentheses
    return "ended" if after_name[0] in "ZX" else after_name[_START_TIME_FIELD - 3]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def utc_now() -> str:
    """Return the current time in UTC, for people to read."""
    return datetime.now(UTC).isoformat(timespec="seconds")
