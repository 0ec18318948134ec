"""Writes that succeed only if the file is as expected. Leases and commits are built on them.

A version identifies one content of one file. `replace` and `remove` succeed only if the file has the given version,
`create` only if there is no file. If two processes try at once, one succeeds:

    gs://       generation preconditions, checked by the server
    local       hard links (which fail if the name exists), and renames under a lock on the file itself
    memory://   a lock of this process, which is the only one that can reach that storage
    others      refused, unless `unsafe_locks`: they compare, then write, and two processes may both succeed

These writes ignore fences (fence.py), because fences are built on them.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage.filesystem import storage_border
from simpo_pipeline.storage.store import Store
from simpo_pipeline.storage.stores import store_of


@dataclass(frozen=True)
class ConditionalFiles:
    """Conditional reads and writes on every file system that supports them."""

    unsafe_locks: bool = False
    """Also serve file systems without conditional writes. Two jobs may then run one step at the same time."""

    def check(self, path: str) -> None:
        """Raise if the file system of `path` cannot be used.

        Raises:
            StorageError: It has no conditional writes.
        """
        self._store(path)

    def create(self, path: str, data: bytes) -> str | None:
        """Create a file. Return its version, or None if a file exists."""
        return self._write(path, data, None)

    def read(self, path: str) -> tuple[bytes, str]:
        """Return the content of a file and its version.

        Raises:
            PathNotFoundError: The file does not exist.
        """
        store = self._store(path)
        with storage_border("read", path):
            return store.read_version(path)

    def replace(self, path: str, expected: str | None, data: bytes) -> str | None:
        """Replace the version `expected` (None: no file). Return the new version, or None if the file differs."""
        return self._write(path, data, expected)

    def remove(self, path: str, expected: str) -> bool:
        """Remove the version `expected`. Return False if another version is there; a missing file counts as removed."""
        store = self._store(path)
        with storage_border("remove", path):
            return store.remove_version(path, expected)

    def can_hold(self, path: str) -> bool:
        """Return whether `held` keeps other processes out, as it does on a local disk."""
        return store_of(path).lock(path) is not None

    @contextmanager
    def held(self, path: str, expected: str) -> Generator[bool]:
        """Yield whether the file has the version `expected`, and keep it so during the block, which should be short.

        Call this only where `can_hold` is true.
        """
        lock = store_of(path).lock(path)
        assert lock is not None, f"{path!r} cannot be held"
        with lock as current:
            yield current == expected

    def version_of(self, path: str) -> str | None:
        """Return the current version of a file; None if it does not exist."""
        try:
            return self.read(path)[1]
        except PathNotFoundError:
            return None

    def _write(self, path: str, data: bytes, expected: str | None) -> str | None:
        store = self._store(path)
        with storage_border("write", path):
            return store.write_version(path, data, expected)

    def _store(self, path: str) -> Store:
        store = store_of(path)
        if not store.has_conditional_writes and not self.unsafe_locks:
            scheme = path.split("://", 1)[0]
            raise StorageError(
                f"{scheme}:// has no conditional writes, so two jobs could run one step of {path!r} at once. Use gs:// "
                "or a local folder; or pass --unsafe_locks if no other job will ever use this prefix."
            )
        return store
