"""The lease: one job's renewable claim on one output path, a small file that only one job can create.

A lease is over when its holder is known to have died, or when its file was not seen to change for `expiry_seconds` by
the observer's own clock: clocks of different machines are never compared. Whoever takes it over replaces exactly the
version that was seen; so does the holder at each heartbeat, and learns in this way that it lost the lease.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from simpo_pipeline.errors import ConfigError, FileLockedError, LeaseLostError, PathNotFoundError, StorageError
from simpo_pipeline.executor.records.holder import Holder, parse_holder, utc_now
from simpo_pipeline.storage.conditional import ConditionalFiles

_logger = logging.getLogger("simpo_pipeline.executor")
_RENEWERS = 8
_RENEWALS = 3
MAX_EXPIRY_SECONDS = 1800.0
# CLOCK_BOOTTIME goes on while the machine sleeps, as the clocks of others do.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True)
class LeaseConfig:
    """How often leases are renewed, and when others may assume that nobody renews them."""

    heartbeat_seconds: float = 15.0
    expiry_seconds: float = 120.0
    poll_seconds: float = 2.0
    """How often a job looks again at a step that another job runs."""

    def __post_init__(self) -> None:
        if not 0 < 2 * self.heartbeat_seconds <= self.expiry_seconds:
            raise ConfigError(
                f"lease.heartbeat_seconds is {self.heartbeat_seconds} and lease.expiry_seconds {self.expiry_seconds}; "
                "the heartbeat must be more than 0 and at most half of the expiry."
            )
        if not 0 < self.poll_seconds <= self.expiry_seconds:
            raise ConfigError(
                f"lease.poll_seconds is {self.poll_seconds}; it must be more than 0 and at most lease.expiry_seconds, "
                f"{self.expiry_seconds}."
            )
        if self.expiry_seconds > MAX_EXPIRY_SECONDS:
            raise ConfigError(
                f"lease.expiry_seconds is {self.expiry_seconds}; it must be at most {MAX_EXPIRY_SECONDS:.0f}: after an "
                "hour without a heartbeat `gc` takes every holder for dead."
            )


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
    version: str
    renewed: float
    """When the last successful renewal was begun, by this machine's clock."""
    lost: bool = False
    lost_to: str | None = None
    """Who had it when the loss was told first: a step that goes on writing asks storage no more."""
    on_lost: Callable[[], None] | None = None
    """Called once; then None."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class LeaseKeeper:
    """The leases this job holds, renewed by a thread that lives as long as the `with` block."""

    def __init__(self, run_id: str, config: LeaseConfig, watch: LeaseWatch, files: ConditionalFiles):
        self._config = config
        self._watch = watch
        self._files = files
        self._holder = Holder.of_this_process(run_id)
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
        while True:
            began, mine = _now(), replace(self._holder, time=utc_now())
            version = self._files.create(path, mine.encode())
            if version is None:
                try:
                    theirs, seen = self._files.read(path)
                except PathNotFoundError:
                    continue
                holder = parse_holder(theirs)
                ours = holder is not None and holder.run_id == mine.run_id and path not in self._leases
                if not ours and self._watch.is_fresh(path, theirs):
                    return False
                try:
                    version = self._files.replace(path, seen, mine.encode())
                except FileLockedError as error:  # by a holder that was stopped in the very moment of a write
                    _logger.warning("could not take over the lease %s, will try again: %s", path, error)
                    return False
                if version is not None and not ours:
                    _logger.info("took over %s from %s", path, holder.describe() if holder else "an unreadable lease")
            if version is not None:
                self._leases[path] = _Lease(path, mine, version, began)
                return True

    def holds(self, path: str) -> bool:
        """Whether this job took the lease and did not give it up."""
        return path in self._leases

    def when_lost(self, path: str, tell: Callable[[], None] | None) -> None:
        """Have `tell` called, from the heartbeat's thread, should the lease be lost; None: nobody."""
        lease = self._leases.get(path)
        if lease is not None:
            lease.on_lost = tell

    def check(self, path: str) -> None:
        """Make sure that the lease is ours, asking storage only if the last heartbeat is so old that it may not be.

        Raises:
            LeaseLostError: someone else took it, after we failed to renew it in time.
        """
        lease = self._held(path)
        if lease.lost or _now() - lease.renewed >= self._config.expiry_seconds:
            self.confirm(path)

    @contextmanager
    def hold(self, path: str, shield: Callable[[], AbstractContextManager[None]] = nullcontext) -> Generator[None]:
        """Make sure that the lease is ours; on a local disk nobody can take it over while the block runs.

        `shield` is entered while locks are held: an error raised from another thread in their midst would leave them
        locked.

        Raises:
            LeaseLostError: as `check`.
        """
        self.check(path)
        if not self._files.can_hold(path):
            yield  # an upload may take longer than the expiry, and heartbeats must go on
            return
        lease = self._held(path)
        with shield(), lease.lock, self._files.held(path, lease.version) as ours:
            if ours:
                yield
                return
        lease.lost = True
        self.confirm(path)

    def confirm(self, path: str) -> None:
        """Make sure, by renewing it, that the lease is still ours.

        Raises:
            LeaseLostError: someone else took it, after we failed to renew it in time.
        """
        lease = self._held(path)
        with lease.lock:
            if not lease.lost:
                self._renew(lease)
        if lease.lost:
            lease.lost_to = lease.lost_to or self._owner(path)
            raise LeaseLostError(
                f"This job lost its lease {path!r}, now held by {lease.lost_to}; nothing more is written there. "
                f"It was not renewed within {self._config.expiry_seconds} s: was this job frozen, or storage out of "
                "reach?"
            )

    def _held(self, path: str) -> _Lease:
        lease = self._leases.get(path)
        if lease is None:
            raise LeaseLostError(f"This job gave its lease {path!r} up; nothing more is written there.")
        return lease

    def _owner(self, path: str) -> str:
        try:
            holder = parse_holder(self._files.read(path)[0])
        except PathNotFoundError:
            return "nobody: whoever took it has given it up"
        except StorageError:
            holder = None
        return holder.describe() if holder is not None else "nobody we can read"

    def release(self, path: str) -> None:
        """Give the lease up; nothing happens to it if it was lost, and what cannot be removed expires by itself."""
        lease = self._leases.pop(path)
        with lease.lock:
            if lease.lost:
                return
            try:
                if not self._files.remove(path, lease.version) and self._adopt(lease):
                    self._files.remove(path, lease.version)
            except StorageError as error:
                _logger.warning("could not remove the lease %s, it will expire: %s", path, error)

    def _renew_until_stopped(self) -> None:
        with ThreadPoolExecutor(_RENEWERS, thread_name_prefix="lease-renewal") as pool:
            while not self._stop.wait(self._config.heartbeat_seconds):
                for lease in list(self._leases.values()):
                    pool.submit(self._beat, lease)

    def _beat(self, lease: _Lease) -> None:
        if not lease.lock.acquire(blocking=False):
            return  # it is being renewed, or held for the moment of a write
        try:
            if lease.path in self._leases and not lease.lost:
                self._renew(lease)
        except StorageError as error:
            # Whether someone took it over in the meantime, the next renewal will tell.
            _logger.warning("could not renew the lease %s, will try again: %s", lease.path, error)
        finally:
            lease.lock.release()
        if lease.lost and lease.on_lost is not None:
            tell, lease.on_lost = lease.on_lost, None
            tell()

    def _renew(self, lease: _Lease) -> None:
        for _ in range(_RENEWALS):
            began = _now()
            renewed = replace(lease.holder, time=utc_now(), beat=lease.holder.beat + 1)
            version = self._files.replace(lease.path, lease.version, renewed.encode())
            if version is not None:
                lease.holder, lease.version, lease.renewed = renewed, version, began
                return
            if not self._adopt(lease):
                lease.lost = True
                _logger.error("lost the lease %s", lease.path)
                return
        raise StorageError(f"The lease {lease.path!r} is this job's, and yet it could not be renewed.")

    def _adopt(self, lease: _Lease) -> bool:
        """Whether what is there is ours all the same: written by a renewal that failed only because of its answer."""
        try:
            data, version = self._files.read(lease.path)
        except PathNotFoundError:
            return False
        holder = parse_holder(data)
        if holder is None or holder.run_id != lease.holder.run_id:
            return False
        lease.holder, lease.version = holder, version
        return True


@dataclass(frozen=True)
class LeaseFence:
    """Lets this process write as long as it holds a lease."""

    leases: LeaseKeeper
    path: str
    shield: Callable[[], AbstractContextManager[None]] = nullcontext

    def check(self) -> None:
        """See Fence.check."""
        self.leases.check(self.path)

    def hold(self) -> AbstractContextManager[None]:
        """See Fence.hold."""
        return self.leases.hold(self.path, self.shield)


class LeaseReader:
    """Lets a process write whose leader holds the lease: looks at the file, once a heartbeat at most."""

    def __init__(self, path: str, run_id: str, files: ConditionalFiles, heartbeat_seconds: float):
        self._path = path
        self._run_id = run_id
        self._files = files
        self._heartbeat_seconds = heartbeat_seconds
        self._looked = -heartbeat_seconds

    def check(self) -> None:
        """See Fence.check."""
        if _now() - self._looked < self._heartbeat_seconds:
            return
        try:
            holder = parse_holder(self._files.read(self._path)[0])
        except PathNotFoundError:
            holder = None
        if holder is None or holder.run_id != self._run_id:
            owner = holder.describe() if holder is not None else "nobody we can read"
            raise LeaseLostError(
                f"This job lost its lease {self._path!r}, now held by {owner}; nothing more is written."
            )
        self._looked = _now()

    @contextmanager
    def hold(self) -> Generator[None]:
        """See Fence.hold; only the leader can keep others out."""
        self.check()
        yield


def _now() -> float:
    return time.clock_gettime(_CLOCK)
