"""File systems of fsspec that have no conditional writes: a write compares the version first, under a lock.

The lock belongs to this process. That is enough for `memory://`, which no other process can reach. On any other file
system, two processes may both succeed.
"""

import hashlib
import threading
from typing import Any, cast, final

from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.filesystem import filesystem_of
from simpo_pipeline.storage.paths import base_name
from simpo_pipeline.storage.remote_store import RemoteStore


@final
class FsspecStore(RemoteStore):
    """See Store.

    Args:
        in_process: The storage is fsspec's `memory://`. There each write creates a new file, whose creation time is its
            version. On other file systems the version is a hash of the content.
    """

    def __init__(self, *, in_process: bool = False):
        self.has_conditional_writes = in_process
        self._in_process = in_process
        self._lock = threading.RLock()

    def list_files(self, path: str) -> list[FileEntry]:
        filesystem, inner_path = filesystem_of(path)
        start = inner_path.rstrip("/") + "/"
        found = filesystem.find(inner_path, detail=True).items()
        return [self._entry(name[len(start) :], info) for name, info in found if name.startswith(start)]

    def _entry(self, relative_path: str, info: dict[str, Any]) -> FileEntry:
        created = info.get("created")
        version = repr(created) if self._in_process else None
        modified = created if isinstance(created, float) else None
        return FileEntry(relative_path, int(info["size"]), None, version, modified)

    def list_names(self, path: str) -> list[str]:
        filesystem, inner_path = filesystem_of(path)
        try:
            names = filesystem.ls(inner_path, detail=False)
        except FileNotFoundError:
            return []
        return [base_name(name) for name in names if name.rstrip("/") != inner_path.rstrip("/")]

    def read_version(self, path: str) -> tuple[bytes, str]:
        data = self.read_bytes(path)
        return data, self._version(path, data)

    def write_version(self, path: str, data: bytes, expected: str | None) -> str | None:
        filesystem, inner_path = filesystem_of(path)
        with self._lock:
            if self._current(path) != expected:
                return None
            filesystem.pipe_file(inner_path, data)
            return self._version(path, data)

    def remove_version(self, path: str, expected: str) -> bool:
        filesystem, inner_path = filesystem_of(path)
        with self._lock:
            current = self._current(path)
            if current == expected:
                filesystem.rm(inner_path)
            return current in (None, expected)

    def _current(self, path: str) -> str | None:
        try:
            return self.read_version(path)[1]
        except FileNotFoundError:
            return None

    def _version(self, path: str, data: bytes) -> str:
        if self._in_process:
            filesystem, inner_path = filesystem_of(path)
            return repr(cast(Any, filesystem).created(inner_path).timestamp())
        return hashlib.sha256(data).hexdigest()
