"""A folder together with the right to write in it: the handle that a running step gets for its output path."""

import tempfile
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from simpo_pipeline.errors import StorageError
from simpo_pipeline.storage import files
from simpo_pipeline.storage.fence import OPEN, Fence
from simpo_pipeline.storage.jsonl import JsonlWriter
from simpo_pipeline.storage.paths import is_local, join, strip_file_scheme


class OutputFolder:
    """Writes files below `path`, local or any fsspec URL, for as long as `fence` allows it.

    Names are relative paths below the folder. Missing parent folders are created. Each file is written atomically, as
    in files.py. A write behind a closed fence raises the fence's error (LeaseLostError, StepCancelledError).
    """

    def __init__(self, path: str, fence: Fence = OPEN):
        self.path = path
        self._fence = fence

    def subfolder(self, name: str) -> "OutputFolder":
        """Return a folder inside this one, behind the same fence."""
        return OutputFolder(self.path_of(name), self._fence)

    def path_of(self, name: str) -> str:
        """Return the path of a file, to read it.

        Raises:
            StorageError: The name is not a relative path inside the folder.
        """
        if ".." in name.split("/"):
            raise StorageError(f"{name!r} leaves the folder {self.path!r}: a name must be relative, without '..'.")
        return join(self.path, name)

    def check(self) -> None:
        """Raise if nothing more may be written. Call it before work whose only purpose is a write."""
        self._fence.check()

    def write_text(self, name: str, text: str) -> None:
        """Write or replace a UTF-8 file."""
        files.write_bytes(self.path_of(name), text.encode("utf-8"), self._fence)

    def write_json(self, name: str, value: Any) -> None:
        """Write or replace a file of indented JSON.

        Raises:
            DataError: The value contains something that JSON does not have, such as NaN.
        """
        path = self.path_of(name)
        files.write_bytes(path, files.json_bytes(value, path), self._fence)

    def open_write(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Yield a binary file to stream into. It appears after the block; if the block raises, it never does."""
        return files.open_write(self.path_of(name), self._fence)

    def open_rows(self, name: str) -> JsonlWriter:
        """Return a writer of a new file of JSON lines, which replaces an earlier file."""
        return JsonlWriter(self.path_of(name), self._fence)

    def upload(self, local_path: Path, name: str) -> None:
        """Copy a local file into the folder."""
        files.upload(local_path, self.path_of(name), self._fence)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything below it. A missing path is no error."""
        files.remove_tree(self.path_of(name), self._fence)

    @contextmanager
    def staged(self) -> Generator[Path]:
        """Yield a local folder to fill, for libraries that write local files only.

        It is this folder itself if that is local. Otherwise it is a temporary folder, which is uploaded after the
        block; if the block raises, nothing is uploaded.

        Raises:
            StorageError: A file could not be written.
        """
        self.check()
        if is_local(self.path):
            folder = Path(strip_file_scheme(self.path))
            files.make_parent(self.path)
            folder.mkdir(exist_ok=True)
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="simpo_pipeline_") as name:
            folder = Path(name)
            yield folder
            for file in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
                self.upload(file, file.relative_to(folder).as_posix())
