"""The operations that are the same on every fsspec file system except the local disk.

A write is one upload, which object stores publish when it is complete.
"""

import io
import tempfile
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage.filesystem import filesystem_of, storage_border
from simpo_pipeline.storage.paths import base_name, join
from simpo_pipeline.storage.store import Guard, Store

_TEMPORARY_PREFIX = "simpo_pipeline_"


class RemoteStore(Store):
    """See Store. Listings and versions are left to the implementations."""

    def read_bytes(self, path: str) -> bytes:
        filesystem, inner_path = filesystem_of(path)
        return filesystem.cat_file(inner_path)

    def open_read(self, path: str) -> io.BufferedReader:
        filesystem, inner_path = filesystem_of(path)
        return io.BufferedReader(filesystem.open(inner_path, "rb"))

    @contextmanager
    def local_copy(self, path: str) -> Generator[Path]:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX) as folder:
            yield self._download(path, Path(folder, base_name(path)))

    def _download(self, path: str, target: Path) -> Path:
        filesystem, inner_path = filesystem_of(path)
        with storage_border("read", path):
            if filesystem.isfile(inner_path):
                filesystem.get_file(inner_path, str(target))
                return target
        with storage_border("list", path):
            entries = sorted(self.list_files(path))
        if not entries:
            raise PathNotFoundError(f"Cannot read {path!r}: nothing is stored there.")
        for entry in entries:
            copy = target / entry.relative_path
            if not copy.resolve().is_relative_to(target.resolve()):
                raise StorageError(
                    f"{join(path, entry.relative_path)!r} would be copied outside its folder; rename it."
                )
            copy.parent.mkdir(parents=True, exist_ok=True)
            with storage_border("read", join(path, entry.relative_path)):
                filesystem.get_file(join(inner_path, entry.relative_path), str(copy))
        return target

    def write_bytes(self, path: str, data: bytes, guard: Guard) -> None:
        filesystem, inner_path = filesystem_of(path)
        with guard:
            filesystem.pipe_file(inner_path, data)

    @contextmanager
    def open_write(self, path: str, guard: Guard) -> Generator[BinaryIO]:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX) as folder:
            spool = Path(folder, "spool")
            with spool.open("wb") as file:
                yield file
            with storage_border("write", path):
                self.upload(spool, path, guard)

    def open_append(self, path: str, guard: Guard) -> BinaryIO | None:
        return None

    def upload(self, local_path: Path, path: str, guard: Guard) -> None:
        filesystem, inner_path = filesystem_of(path)
        with guard:
            filesystem.put_file(str(local_path), inner_path)

    def make_parent(self, path: str) -> None:
        pass  # object stores have no folders

    def lock(self, path: str) -> AbstractContextManager[str | None] | None:
        return None
