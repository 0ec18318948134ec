"""The lease: one job's renewable claim on one output path, a small file that only one job can create.

A lease is over when its holder is a process of this very machine that no longer exists, or when its file was not seen
to change for `expiry_seconds` by the observer's own clock: clocks of different machines are never compared.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, cast

from simpo_pipeline.errors import ConfigError, LeaseLostError, PathNotFoundError, StorageError
from simpo_pipeline.storage.conditional import create_only, remove_if_same, replace_if_same
from simpo_pipeline.storage.files import read_bytes

_logger = logging.getLogger("simpo_pipeline.executor")


@dataclass(frozen=True)
class LeaseConfig:
    """How often leases are renewed, and when others may assume that nobody renews them."""

    heartbeat_seconds: float = 15.0
    expiry_seconds: float = 120.0
    poll_seconds: float = 2.0
    """How often a job looks again at a step that another job runs."""

    def __post_init__(self) -> None:
        if not 0 < self.poll_seconds:
            raise ConfigError(f"lease.poll_seconds is {self.poll_seconds}; it must be more than 0.")
        if not 0 < 2 * self.heartbeat_seconds <= self.expiry_seconds:
            raise ConfigError(
                f"lease.heartbeat_seconds is {self.heartbeat_seconds} and lease.expiry_seconds {self.expiry_seconds}; "
                "the heartbeat must be more than 0 and at most half of the expiry."
            )


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

    def encode(self) -> bytes:
        """The content of the lease file."""
        return json.dumps(self.__dict__, sort_keys=True).encode("ascii")

    def describe(self) -> str:
        """The holder, in words."""
        return f"pid {self.pid} on host {self.host_name} (run {self.run_id}, last heartbeat {self.time})"

    def is_gone(self) -> bool:
        """Whether the holder is known to have died: a process of this machine that does not exist."""
        if self.host_name != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return False


def parse_holder(data: bytes) -> Holder | None:
    """The holder in a lease file; None when the content is no lease (then only its age counts)."""
    try:
        fields = cast(dict[str, Any], json.loads(data))
        run_id, host_name, written = (str(fields[name]) for name in ("run_id", "host_name", "time"))
        pid, beat = int(fields["pid"]), int(fields["beat"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return Holder(run_id, host_name, pid, written, beat) if pid > 0 else None


class LeaseWatch:
    """Remembers when each lease file of others was last seen to change."""

    def __init__(self, config: LeaseConfig, clock: Callable[[], float] = time.monotonic):
        self._config = config
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}

    def is_fresh(self, path: str, data: bytes) -> bool:
        """Whether the holder of the lease file at `path`, which now contains `data`, must be assumed to live."""
        holder = parse_holder(data)
        if holder is not None and holder.is_gone():
            return False
        now = self._clock()
        known = self._seen.get(path)
        if known is None or known[0] != data:
            self._seen[path] = (data, now)
            return True
        return now - known[1] < self._config.expiry_seconds


@dataclass
class _Lease:
    path: str
    holder: Holder
    renewed: float
    lost: bool
    lock: threading.Lock


class LeaseKeeper:
    """The leases this job holds, renewed by a thread that lives as long as the `with` block."""

    def __init__(self, run_id: str, config: LeaseConfig, watch: LeaseWatch):
        self._config = config
        self._watch = watch
        self._holder = Holder(run_id, socket.gethostname(), os.getpid(), _now())
        self._leases: dict[str, _Lease] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease-heartbeat", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for path in list(self._leases):
            self.release(path)

    def acquire(self, path: str) -> bool:
        """Take the lease, also from a holder that is gone; False while someone else holds it."""
        mine = replace(self._holder, time=_now())
        while True:
            if create_only(path, mine.encode()):
                return self._hold(path, mine)
            try:
                theirs = read_bytes(path)
            except PathNotFoundError:
                continue
            holder = parse_holder(theirs)
            if holder is not None and holder.run_id == mine.run_id and path not in self._leases:
                return self._hold(path, holder)  # created by us, though the store's answer was lost on its way
            if self._watch.is_fresh(path, theirs):
                return False
            if replace_if_same(path, theirs, mine.encode()):
                _logger.info("took over %s from %s", path, holder.describe() if holder else "an unreadable lease")
                return self._hold(path, mine)

    def _hold(self, path: str, holder: Holder) -> bool:
        self._leases[path] = _Lease(path, holder, time.monotonic(), False, threading.Lock())
        return True

    def holds(self, path: str) -> bool:
        """Whether this job took the lease and did not give it up."""
        return path in self._leases

    def confirm(self, path: str) -> None:
        """Make sure, by looking, that the lease is still ours; called before what only a holder may write.

        Raises:
            LeaseLostError: someone else took it, after we failed to renew it in time.
        """
        lease = self._leases[path]
        try:
            holder = parse_holder(read_bytes(path))
        except PathNotFoundError:
            holder = None
        if lease.lost or holder is None or holder.run_id != lease.holder.run_id:
            lease.lost = True
            owner = holder.describe() if holder is not None else "nobody we can read"
            raise LeaseLostError(
                f"This job lost its lease {path!r}, now held by {owner}; nothing more is written there. It was not "
                f"renewed within {self._config.expiry_seconds} s: was this job frozen, or storage out of reach?"
            )

    def release(self, path: str) -> None:
        """Give the lease up; nothing happens to it if it was lost, and what cannot be removed expires by itself."""
        lease = self._leases.pop(path)
        with lease.lock:
            try:
                remove_if_same(path, lease.holder.encode())
            except StorageError as error:
                _logger.warning("could not remove the lease %s, it will expire: %s", path, error)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._config.heartbeat_seconds):
            for path, lease in list(self._leases.items()):
                with lease.lock:
                    if path in self._leases and not lease.lost:
                        self._renew(lease)

    def _renew(self, lease: _Lease) -> None:
        renewed = replace(lease.holder, time=_now(), beat=lease.holder.beat + 1)
        try:
            if replace_if_same(lease.path, lease.holder.encode(), renewed.encode()):
                lease.holder, lease.renewed = renewed, time.monotonic()
            else:
                lease.lost = True
                _logger.error("lost the lease %s", lease.path)
        except StorageError as error:
            _logger.warning("could not renew the lease %s, will try again: %s", lease.path, error)
            lease.lost = time.monotonic() - lease.renewed > self._config.expiry_seconds


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
