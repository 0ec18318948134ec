"""Files on the local disk, or on a network file system that is mounted there.

A write goes to a dot file beside its target, is synced to disk and then renamed.
"""

import io
import os
import shutil
import stat
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, final

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage import local_versions
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.filesystem import storage_border
from simpo_pipeline.storage.paths import parent, strip_file_scheme
from simpo_pipeline.storage.store import Guard, Store

_COPY_BYTES = 1 << 20


@final
class LocalStore(Store):
    """See Store. A version is the inode, the time of the last write and the size (local_versions.py)."""

    has_conditional_writes = True

    def read_bytes(self, path: str) -> bytes:
        with self.open_read(path) as file:
            return file.read()

    def open_read(self, path: str) -> io.BufferedReader:
        local_path = strip_file_scheme(path)
        mode = os.stat(local_path).st_mode
        if not stat.S_ISREG(mode):  # a pipe may never have content, and a device may never end
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise StorageError(f"Cannot read {path!r}: it is {kind}. Give the path of a file.")
        return open(local_path, "rb")

    @contextmanager
    def local_copy(self, path: str) -> Generator[Path]:
        local_path = Path(strip_file_scheme(path))
        if not local_path.exists():
            raise PathNotFoundError(f"Cannot read {path!r}: nothing is stored there.")
        yield local_path

    def write_bytes(self, path: str, data: bytes, guard: Guard) -> None:
        with self.open_write(path, guard) as file:
            file.write(data)

    @contextmanager
    def open_write(self, path: str, guard: Guard) -> Generator[BinaryIO]:
        target = strip_file_scheme(path)
        with ExitStack() as stack:
            with storage_border("write", path):
                file = stack.enter_context(local_versions.temporary_beside(target))
            yield file
            with storage_border("write", path):
                local_versions.close_on_disk(file)
                with guard:
                    os.replace(file.name, target)
                _sync_folder(os.path.dirname(file.name))

    def open_append(self, path: str, guard: Guard) -> BinaryIO | None:
        self.make_parent(path)
        with guard:
            # A new file instead of the old one truncated: a process that still has the old file open cannot write here.
            Path(strip_file_scheme(path)).unlink(missing_ok=True)
            return open(strip_file_scheme(path), "xb")

    def upload(self, local_path: Path, path: str, guard: Guard) -> None:
        with storage_border("read", str(local_path)), self.open_write(path, guard) as target:
            with local_path.open("rb") as source:
                shutil.copyfileobj(source, target, _COPY_BYTES)

    def make_parent(self, path: str) -> None:
        os.makedirs(parent(os.path.abspath(strip_file_scheme(path))), exist_ok=True)

    def list_files(self, path: str) -> list[FileEntry]:
        return list(_entries(strip_file_scheme(path).rstrip("/") or "/", ""))

    def list_names(self, path: str) -> list[str]:
        try:
            return os.listdir(strip_file_scheme(path))
        except FileNotFoundError:
            return []

    def read_version(self, path: str) -> tuple[bytes, str]:
        return local_versions.read_version(strip_file_scheme(path))

    def write_version(self, path: str, data: bytes, expected: str | None) -> str | None:
        return local_versions.write_version(strip_file_scheme(path), data, expected)

    def remove_version(self, path: str, expected: str) -> bool:
        return local_versions.remove_version(strip_file_scheme(path), expected)

    def lock(self, path: str) -> AbstractContextManager[str | None] | None:
        return local_versions.held_still(strip_file_scheme(path))


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: str, prefix: str) -> Iterator[FileEntry]:
    """Yield the files below a folder. Links to folders are not followed, because they may form a cycle."""
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path, f"{prefix}{entry.name}/")
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue  # another process has removed it, or it is a broken link
            if stat.S_ISREG(found.st_mode):
                version = local_versions.version_of_stat(found)
                yield FileEntry(f"{prefix}{entry.name}", found.st_size, None, version, found.st_mtime)
