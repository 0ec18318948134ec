"""The lease: one job's renewable claim on one output path, stored in a small file that only one job can create.

A lease expires when its holder is known to have died, or when an observer has not seen its file change for
`expiry_seconds`. Each observer uses its own clock; clocks of different machines are never compared. A job that takes
over a lease replaces exactly the version of the file that it saw. The holder does the same at each heartbeat, and thus
detects that it lost the lease.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

from simpo_pipeline.errors import ConfigError, FileLockedError, LeaseLostError, PathNotFoundError, StorageError
from simpo_pipeline.executor.records.holder import Holder, parse_holder, utc_now
from simpo_pipeline.storage.conditional import ConditionalFiles

_logger = logging.getLogger("simpo_pipeline.executor")
_RENEWAL_THREADS = 8
_RENEWAL_ATTEMPTS = 3
MAX_EXPIRY_SECONDS = 1800.0
# CLOCK_BOOTTIME keeps running while the machine sleeps, as the clocks of other machines do.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True)
class LeaseConfig:
    """How often leases are renewed, and when other jobs may consider them expired."""

    heartbeat_seconds: float = 15.0
    expiry_seconds: float = 120.0
    poll_seconds: float = 2.0
    """How often a job checks a step that another job is running."""

    def __post_init__(self) -> None:
        if not 0 < 2 * self.heartbeat_seconds <= self.expiry_seconds:
            raise ConfigError(
                f"lease.heartbeat_seconds is {self.heartbeat_seconds} and lease.expiry_seconds is "
                f"{self.expiry_seconds}; the heartbeat must be more than 0 and at most half of the expiry."
            )
        if not 0 < self.poll_seconds <= self.expiry_seconds:
            raise ConfigError(
                f"lease.poll_seconds is {self.poll_seconds}; it must be more than 0 and at most lease.expiry_seconds, "
                f"{self.expiry_seconds}."
            )
        if self.expiry_seconds > MAX_EXPIRY_SECONDS:
            raise ConfigError(
                f"lease.expiry_seconds is {self.expiry_seconds}; it must be at most {MAX_EXPIRY_SECONDS:.0f}: `gc` "
                "considers every holder dead after an hour without a heartbeat."
            )


class LeaseWatch:
    """Remembers when each lease file of another job was last seen to change."""

    def __init__(self, config: LeaseConfig, clock: Callable[[], float] = time.monotonic):
        self._config = config
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}

    def is_fresh(self, path: str, data: bytes) -> bool:
        """Return whether the holder of the lease file at `path`, which now contains `data`, must be assumed alive."""
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
    """When the last successful renewal started, by this machine's clock."""
    lost: bool = False
    lost_to: str | None = None
    """The owner when the loss was first reported. Cached, so that a step that keeps writing reads storage only once."""
    on_lost: Callable[[], None] | None = None
    """Called once, then set to None."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class LeaseKeeper:
    """The leases that this job holds. A background thread renews them for the duration of the `with` block."""

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
        """Take the lease, possibly from a holder that is gone. Return False while another holder has it."""
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
                except FileLockedError as error:  # by a holder that was suspended during a write
                    _logger.warning("could not take over the lease %s; will try again: %s", path, error)
                    return False
                if version is not None and not ours:
                    _logger.info("took over %s from %s", path, holder.describe() if holder else "an unreadable lease")
            if version is not None:
                self._leases[path] = _Lease(path, mine, version, began)
                return True

    def holds(self, path: str) -> bool:
        """Return whether this job acquired the lease and has not released it."""
        return path in self._leases

    def when_lost(self, path: str, tell: Callable[[], None] | None) -> None:
        """Set the function to call, from a heartbeat thread, if the lease is lost. None calls nothing."""
        lease = self._leases.get(path)
        if lease is not None:
            lease.on_lost = tell

    def check(self, path: str) -> None:
        """Check that this job still holds the lease.

        Storage is read only if the last heartbeat is so old that the lease may have expired.

        Raises:
            LeaseLostError: Another job took the lease, after this job failed to renew it in time.
        """
        lease = self._held(path)
        if lease.lost or _now() - lease.renewed >= self._config.expiry_seconds:
            self.confirm(path)

    @contextmanager
    def hold(self, path: str) -> Generator[None]:
        """Check that this job holds the lease. On a local disk, no job can take it over while the block runs.

        Raises:
            LeaseLostError: See `check`.
        """
        self.check(path)
        if not self._files.can_hold(path):
            yield  # an upload may take longer than the expiry, and heartbeats must continue
            return
        lease = self._held(path)
        with lease.lock, self._files.held(path, lease.version) as ours:
            if ours:
                yield
                return
        lease.lost = True
        self.confirm(path)

    def confirm(self, path: str) -> None:
        """Verify, by renewing it, that this job still holds the lease.

        Raises:
            LeaseLostError: Another job took the lease, after this job failed to renew it in time.
        """
        lease = self._held(path)
        with lease.lock:
            if not lease.lost:
                self._renew(lease)
        if lease.lost:
            lease.lost_to = lease.lost_to or self._owner(path)
            raise LeaseLostError(
                f"This job lost its lease {path!r}, now held by {lease.lost_to}; nothing more is written there. "
                f"It was not renewed within {self._config.expiry_seconds} s: was this job suspended, or was "
                "storage unreachable?"
            )

    def _held(self, path: str) -> _Lease:
        lease = self._leases.get(path)
        if lease is None:
            raise LeaseLostError(f"This job released its lease {path!r}; nothing more is written there.")
        return lease

    def _owner(self, path: str) -> str:
        try:
            holder = parse_holder(self._files.read(path)[0])
        except PathNotFoundError:
            return "no job: the job that took it has released it"
        except StorageError:
            holder = None
        return holder.describe() if holder is not None else "an unknown holder"

    def release(self, path: str) -> None:
        """Release the lease. A lost lease is left as it is; a lease file that cannot be removed expires by itself."""
        lease = self._leases.pop(path)
        with lease.lock:
            if lease.lost:
                return
            try:
                if not self._files.remove(path, lease.version) and self._adopt(lease):
                    self._files.remove(path, lease.version)
            except StorageError as error:
                _logger.warning("could not remove the lease %s; it will expire: %s", path, error)

    def _renew_until_stopped(self) -> None:
        with ThreadPoolExecutor(_RENEWAL_THREADS, thread_name_prefix="lease-renewal") as pool:
            while not self._stop.wait(self._config.heartbeat_seconds):
                for lease in list(self._leases.values()):
                    pool.submit(self._beat, lease)

    def _beat(self, lease: _Lease) -> None:
        if not lease.lock.acquire(blocking=False):
            return  # it is being renewed, or held during a write
        try:
            if lease.path in self._leases and not lease.lost:
                self._renew(lease)
        except StorageError as error:
            # The next renewal will show whether another job took it over in the meantime.
            _logger.warning("could not renew the lease %s; will try again: %s", lease.path, error)
        finally:
            lease.lock.release()
        if lease.lost and lease.on_lost is not None:
            on_lost, lease.on_lost = lease.on_lost, None
            on_lost()

    def _renew(self, lease: _Lease) -> None:
        for _ in range(_RENEWAL_ATTEMPTS):
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
        raise StorageError(f"This job holds the lease {lease.path!r}, but could not renew it.")

    def _adopt(self, lease: _Lease) -> bool:
        """Adopt the stored lease if this job wrote it, in a renewal of which only the response was lost.

        Returns:
            Whether the stored lease belongs to this job.
        """
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
    """Fence that lets this process write while it holds a lease."""

    leases: LeaseKeeper
    path: str

    def check(self) -> None:
        """See Fence.check."""
        self.leases.check(self.path)

    def hold(self) -> AbstractContextManager[None]:
        """See Fence.hold."""
        return self.leases.hold(self.path)


class LeaseReader:
    """Fence for a process whose leader holds the lease. It reads the lease file at most once per heartbeat."""

    def __init__(self, path: str, run_id: str, files: ConditionalFiles, heartbeat_seconds: float):
        self._path = path
        self._run_id = run_id
        self._files = files
        self._heartbeat_seconds = heartbeat_seconds
        self._looked = -heartbeat_seconds

    def check(self) -> None:
        """See Fence.check."""
        now = _now()  # before the read: if this process freezes during the read, the lease is read again
        if now - self._looked < self._heartbeat_seconds:
            return
        try:
            holder = parse_holder(self._files.read(self._path)[0])
        except PathNotFoundError:
            holder = None
        if holder is None or holder.run_id != self._run_id:
            owner = holder.describe() if holder is not None else "an unknown holder"
            raise LeaseLostError(
                f"This job lost its lease {self._path!r}, now held by {owner}; nothing more is written."
            )
        self._looked = now

    @contextmanager
    def hold(self) -> Generator[None]:
        """See Fence.hold. Only the leader can keep other jobs out."""
        self.check()
        yield


def _now() -> float:
    return time.clock_gettime(_CLOCK)
