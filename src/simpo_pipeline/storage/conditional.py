"""Writes that happen only if the file is as expected: what leases and commits are made of.

A version names one content of one file. `replace` and `remove` succeed only on the version they are told, `create` only
where nothing is, and of two processes that try at once one succeeds:

    gs://       generation preconditions, checked by the store
    local       hard links (fail if the name exists) and renames under a lock on the file itself
    memory://   a lock of this process, beyond which that store does not reach
    others      refused, unless `unsafe_locks`: they compare, then write, and two processes may both succeed

Fences (fence.py) do not stand in their way: they are what fences are made of.
"""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage import gcs, local_versions
from simpo_pipeline.storage.checksum import crc32c_of_bytes
from simpo_pipeline.storage.files import read_bytes
from simpo_pipeline.storage.filesystem import filesystem_of, storage_border
from simpo_pipeline.storage.paths import is_local, strip_file_scheme


@runtime_checkable
class _Store(Protocol):
    def read(self, path: str) -> tuple[bytes, str]: ...
    def write(self, path: str, data: bytes, expected: str | None) -> str | None: ...
    def remove(self, path: str, expected: str) -> bool: ...


class _Gcs:
    """Generations."""

    read = staticmethod(gcs.read_object)
    write = staticmethod(gcs.write_object)
    remove = staticmethod(gcs.remove_object)


class _Local:
    """Inode and time of the last change."""

    read = staticmethod(local_versions.read_version)
    write = staticmethod(local_versions.write_version)
    remove = staticmethod(local_versions.remove_version)


class _Compared:
    """Compare, then write: as safe as `lock` makes it."""

    def __init__(self, lock: Any):
        self._lock = lock

    def read(self, path: str) -> tuple[bytes, str]:
        data = read_bytes(path)
        return data, self._version(path, data)

    def _version(self, path: str, data: bytes) -> str:
        return f"{crc32c_of_bytes(data)}-{len(data)}"

    def _current(self, path: str) -> str | None:
        try:
            return self.read(path)[1]
        except PathNotFoundError:
            return None

    def write(self, path: str, data: bytes, expected: str | None) -> str | None:
        with self._lock:
            if self._current(path) != expected:
                return None
            filesystem, inner_path = filesystem_of(path)
            with storage_border("write", path):
                filesystem.pipe_file(inner_path, data)
            return self._version(path, data)

    def remove(self, path: str, expected: str) -> bool:
        with self._lock:
            current = self._current(path)
            if current == expected:
                filesystem, inner_path = filesystem_of(path)
                with storage_border("remove", path):
                    filesystem.rm(inner_path)
            return current in (None, expected)


class _Memory(_Compared):
    """fsspec's in-memory store: each write makes a new file with its own time."""

    def _version(self, path: str, data: bytes) -> str:
        filesystem, inner_path = filesystem_of(path)
        with storage_border("look up", path):
            return repr(cast(Any, filesystem).created(inner_path).timestamp())


_STORES: dict[str, _Store] = {"gs": _Gcs(), "gcs": _Gcs(), "memory": _Memory(threading.RLock())}
_LOCAL = _Local()
_UNSAFE = _Compared(threading.RLock())


@dataclass(frozen=True)
class ConditionalFiles:
    """Conditional reads and writes on every file system that has them."""

    unsafe_locks: bool = False
    """Also on those that have none: two jobs may then run one step at once."""

    def check(self, path: str) -> None:
        """Make sure that the file system of `path` can serve.

        Raises:
            StorageError: it has no conditional writes.
        """
        self._store(path)

    def create(self, path: str, data: bytes) -> str | None:
        """Put `data` where nothing is; the version made, or None when something is there."""
        return self._store(path).write(path, data, None)

    def read(self, path: str) -> tuple[bytes, str]:
        """The content and its version.

        Raises:
            PathNotFoundError: there is no such file.
        """
        return self._store(path).read(path)

    def replace(self, path: str, expected: str | None, data: bytes) -> str | None:
        """Put `data` over the version `expected` (None: nothing); the version made, or None when it is not there."""
        return self._store(path).write(path, data, expected)

    def remove(self, path: str, expected: str) -> bool:
        """Remove the version `expected`; False when another one is there."""
        return self._store(path).remove(path, expected)

    def can_hold(self, path: str) -> bool:
        """Whether `held` keeps others out: on a local disk."""
        return is_local(path)

    @contextmanager
    def held(self, path: str, expected: str) -> Generator[bool]:
        """Whether the version `expected` is there; if so it stays while the block runs, which should be short."""
        with local_versions.held_still(strip_file_scheme(path)) as current:
            yield current == expected

    def version_of(self, path: str) -> str | None:
        """The version that is there now; None when there is nothing."""
        try:
            return self.read(path)[1]
        except PathNotFoundError:
            return None

    def _store(self, path: str) -> _Store:
        if is_local(path):
            return _LOCAL
        scheme = path.split("://", 1)[0]
        store = _STORES.get(scheme, _UNSAFE if self.unsafe_locks else None)
        if store is None:
            raise StorageError(
                f"{scheme}:// has no conditional writes, so two jobs could run one step of {path!r} at once. Use gs:// "
                "or a local folder; or pass --unsafe_locks if no other job will ever use this prefix."
            )
        return store
