"""Who holds a lease: a run, in a process, on a machine. The content of a lease file."""

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
    """Who holds a lease, as its file says."""

    run_id: str
    host_name: str
    pid: int
    time: str
    """UTC of the last heartbeat, for people to read."""
    beat: int = 0
    """Makes each renewal change the file."""
    pid_space: str = ""
    """Where the pid means something: one boot of one machine, and there one pid namespace, as a container has."""
    started: str = ""
    """When the process started, in ticks since boot: a pid may be given again."""

    @staticmethod
    def of_this_process(run_id: str) -> "Holder":
        """This process, for one run."""
        pid = os.getpid()
        return Holder(run_id, socket.gethostname(), pid, utc_now(), 0, _pid_space(), _start_time(pid) or "")

    def encode(self) -> bytes:
        """The content of the lease file."""
        return json.dumps(self.__dict__, sort_keys=True).encode("ascii")

    def describe(self) -> str:
        """The holder, in words."""
        return f"pid {self.pid} on host {self.host_name} (run {self.run_id}, last heartbeat {self.time})"

    def is_gone(self) -> bool:
        """Whether the holder is known to have died: its pid means something here, and is nobody's or another's now."""
        if not self.pid_space or self.pid_space != _pid_space():
            return False
        started = _start_time(self.pid)
        return started != self.started if started is not None else not _exists(self.pid)


def parse_holder(data: bytes) -> Holder | None:
    """The holder in a lease file; None when the content is no lease (then only its age counts)."""
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
    """Empty where there is no /proc to ask: then nobody is known to have died."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process of this pid namespace started; None when that cannot be read: /proc may hide those of others.

    Of a process that has ended, and whose exit status nobody has read, "ended".
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    after_name = text.rpartition(")")[2].split()  # the name may hold spaces and brackets
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
    """The time in UTC, for people to read."""
    return datetime.now(UTC).isoformat(timespec="seconds")
