"""A folder together with the right to write in it: the handle that a running step gets for its output path."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from simpo_pipeline.errors import StorageError
from simpo_pipeline.storage import files
from simpo_pipeline.storage.fence import OPEN, Fence
from simpo_pipeline.storage.filesystem import storage_border
from simpo_pipeline.storage.jsonl import JsonlWriter
from simpo_pipeline.storage.paths import is_local, join, strip_file_scheme

# Hidden, so that a manifest never lists what a killed process left.
_STAGING_PREFIX = ".staging-"


class OutputFolder:
    """Writes files below `path`, local or any fsspec URL, for as long as `fence` allows it.

    Names are relative paths below the folder. Missing parent folders are created. Each file is written atomically, as
    in files.py. A write behind a closed fence raises the fence's error (LeaseLostError, StepCancelledError).

    Args:
        path: The folder.
        fence: Asked before every write.
        reserved: Names in the folder that only its owner may write.
    """

    def __init__(self, path: str, fence: Fence = OPEN, reserved: Collection[str] = ()):
        self.path = path
        self._fence = fence
        self._reserved = frozenset(reserved)

    def subfolder(self, name: str) -> "OutputFolder":
        """Return a folder inside this one, behind the same fence."""
        return OutputFolder(self.path_of(name), self._fence)

    def path_of(self, name: str) -> str:
        """Return the path of a file, to read it.

        Raises:
            StorageError: The name is not a relative path to something inside the folder.
        """
        if {".", "..", ""} & set(name.split("/")):
            raise StorageError(
                f"{name!r} is no name inside the folder {self.path!r}: it must be relative, without '.', '..' or empty "
                "parts."
            )
        return join(self.path, name)

    def _path_to_write(self, name: str) -> str:
        path = self.path_of(name)
        if name in self._reserved:
            raise StorageError(f"{name!r} in {self.path!r} is written by the executor. Choose another name.")
        return path

    def check(self) -> None:
        """Raise if nothing more may be written. Call it before work whose only purpose is a write."""
        self._fence.check()

    def write_text(self, name: str, text: str) -> None:
        """Write or replace a UTF-8 file."""
        files.write_bytes(self._path_to_write(name), text.encode("utf-8"), self._fence)

    def write_json(self, name: str, value: Any) -> None:
        """Write or replace a file of indented JSON.

        Raises:
            DataError: The value contains something that JSON does not have, such as NaN.
        """
        path = self._path_to_write(name)
        files.write_bytes(path, files.json_bytes(value, path), self._fence)

    def open_write(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Yield a binary file to stream into. It appears after the block; if the block raises, it never does."""
        return files.open_write(self._path_to_write(name), self._fence)

    def open_rows(self, name: str) -> JsonlWriter:
        """Return a writer of a new file of JSON lines, which replaces an earlier file."""
        return JsonlWriter(self._path_to_write(name), self._fence)

    def upload(self, local_path: Path, name: str) -> None:
        """Copy a local file into the folder."""
        files.upload(local_path, self._path_to_write(name), self._fence)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything below it. A missing path is no error."""
        files.remove_tree(self._path_to_write(name), self._fence)

    @contextmanager
    def staged(self) -> Generator[Path]:
        """Yield an empty local folder to fill, for libraries that write local files only.

        After the block each file is moved into this folder, or uploaded. If the block raises, none is. Only one such
        block may be open for a folder at a time, over all processes of the job.

        Raises:
            StorageError: A file could not be written.
        """
        self.check()
        with ExitStack() as stack:
            if is_local(self.path):
                folder = stack.enter_context(self._staging_folder(Path(strip_file_scheme(self.path))))
                publish = self._move
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simpo_pipeline_")))
                publish = self.upload
            yield folder
            for file in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
                publish(file, file.relative_to(folder).as_posix())

    @contextmanager
    def _staging_folder(self, target: Path) -> Generator[Path]:
        """Yield a new folder inside `target`, and remove it and those that an earlier holder left there."""
        with storage_border("write", self.path):
            files.make_parent(self.path)
            target.mkdir(exist_ok=True)
            with self._fence.hold():
                for left in target.glob(f"{_STAGING_PREFIX}*"):
                    shutil.rmtree(left, ignore_errors=True)
            folder = target / f"{_STAGING_PREFIX}{uuid.uuid4().hex}"
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _move(self, file: Path, name: str) -> None:
        path = self._path_to_write(name)
        with storage_border("write", path):
            files.make_parent(path)
            with self._fence.hold():
                os.replace(file, strip_file_scheme(path))
