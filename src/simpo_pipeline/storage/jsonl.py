"""JSON lines: one row per line.

On a local disk each row has reached the operating system when `write` returns, so it survives if the process dies. An
object store cannot append: rows stay in memory, and `flush()` and `close()` write the whole object.
"""

import json
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, cast

from simpo_pipeline.errors import DataError, SimpoPipelineError
from simpo_pipeline.storage.fence import OPEN, Fence
from simpo_pipeline.storage.files import open_read, write_bytes
from simpo_pipeline.storage.filesystem import storage_border
from simpo_pipeline.storage.json_text import json_text
from simpo_pipeline.storage.stores import store_of


class JsonlWriter:
    """Writes a new file of rows and replaces an earlier file, so a step that runs again starts its log again."""

    def __init__(self, path: str, fence: Fence = OPEN):
        self.path = path
        self._fence = fence
        self._lines: list[bytes] = []
        self._closed = False
        with storage_border("write", path):
            self._file = store_of(path).open_append(path, fence.hold())

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Raises:
            DataError: The row contains values that JSON does not have, such as NaN. The message names the key.
            StorageError: The writer is closed, or the line could not be written.
        """
        # Half of a surrogate pair is written as a JSON escape, as in files.json_bytes.
        line = json_text(dict(row), self.path).encode("utf-8", errors="backslashreplace") + b"\n"
        with storage_border("write", self.path), self._fence.hold():
            if self._closed:
                raise ValueError("the writer is closed")
            if self._file is None:
                self._lines.append(line)
            else:
                self._file.write(line)
                self._file.flush()

    def flush(self) -> None:
        """Make all rows so far readable by others."""
        if self._file is None:
            write_bytes(self.path, b"".join(self._lines), self._fence)

    def close(self) -> None:
        """Write the remaining rows. A second call does nothing.

        Raises:
            StorageError: They could not be written.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            if self._file is not None:
                with storage_border("write", self.path):
                    self._file.close()

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SimpoPipelineError:
            if error is None:
                raise
            # The error of the block propagates. A failure to write the remaining rows must not replace it.


def read_jsonl(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file in order. Blank lines are skipped.

    Raises:
        PathNotFoundError: The file does not exist.
        DataError: A line is not a JSON object. The message names the file and the line.
    """
    with open_read(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_row(line, path, number)


def _parse_row(line: bytes, path: str, number: int) -> dict[str, Any]:
    try:
        row: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}). Each line must be one JSON object.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: got a {type(row).__name__}. Each line must be one JSON object.")
    return cast(dict[str, Any], row)
