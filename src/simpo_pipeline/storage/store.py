"""The interface to one kind of storage. `stores.store_of` returns the implementation that serves a path.

Methods raise whatever their libraries raise. The modules that call them (files.py, jsonl.py, conditional.py) turn every
failure into a StorageError with `storage_border`. `open_write` and `local_copy` do so themselves, because they run the
caller's block, whose errors must pass unchanged.
"""

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.filesystem import filesystem_of

Guard = AbstractContextManager[None]
"""Entered once, while a change becomes visible to others. It raises if this process may not write."""


@runtime_checkable
class Store(Protocol):
    """Reads, writes, lists and removes files of one kind of storage. Every path includes its scheme.

    The methods up to `list_names` do what the functions of the same name in files.py document, except that
    listings are unsorted.
    """

    def read_bytes(self, path: str) -> bytes: ...
    def open_read(self, path: str) -> io.BufferedReader: ...
    def local_copy(self, path: str) -> AbstractContextManager[Path]: ...
    def write_bytes(self, path: str, data: bytes, guard: Guard) -> None: ...
    def open_write(self, path: str, guard: Guard) -> AbstractContextManager[BinaryIO]: ...
    def upload(self, local_path: Path, path: str, guard: Guard) -> None: ...
    def make_parent(self, path: str) -> None: ...
    def list_files(self, path: str) -> list[FileEntry]: ...
    def list_names(self, path: str) -> list[str]: ...

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists."""
        filesystem, inner_path = filesystem_of(path)
        return filesystem.exists(inner_path)

    def remove_tree(self, path: str, guard: Guard) -> None:
        """Remove a file, or a folder with everything below it. A missing path is no error."""
        filesystem, inner_path = filesystem_of(path)
        try:
            with guard:
                filesystem.rm(inner_path, recursive=True)
        except FileNotFoundError:
            pass

    def open_append(self, path: str, guard: Guard) -> BinaryIO | None:
        """Return a new, empty file that others can read while it grows; None if this storage cannot append."""
        ...

    has_conditional_writes: bool
    """Whether only one process succeeds if several write or remove the same version of a file. See conditional.py."""

    def read_version(self, path: str) -> tuple[bytes, str]:
        """Return the content of a file and its version."""
        ...

    def write_version(self, path: str, data: bytes, expected: str | None) -> str | None:
        """Replace the version `expected` (None: no file). Return the new version, or None if the file differs."""
        ...

    def remove_version(self, path: str, expected: str) -> bool:
        """Remove the version `expected`. Return False if another version is there; a missing file counts as removed."""
        ...

    def lock(self, path: str) -> AbstractContextManager[str | None] | None:
        """Return a lock that keeps others from replacing or removing a file; None if this storage has no locks.

        The lock yields the version of the file, or None if the file does not exist.
        """
        ...
