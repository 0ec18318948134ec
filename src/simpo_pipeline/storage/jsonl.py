"""JSON lines: one row a line, kept even when the process dies after the row was written.

Locally each row reaches the operating system before `write` returns. An object store cannot append, so there the rows
are held and the whole object is written at `flush()` and at the end.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from simpo_pipeline.errors import DataError, SimpoPipelineError
from simpo_pipeline.storage.fence import held_fences
from simpo_pipeline.storage.files import make_parent, open_read, write_bytes
from simpo_pipeline.storage.filesystem import storage_border
from simpo_pipeline.storage.paths import is_local, strip_file_scheme


class JsonlWriter:
    """Writes a new file of rows, over any earlier one: a step that runs again starts its log again."""

    def __init__(self, path: str):
        self.path = path
        self._lines: list[bytes] = []
        self._file: BinaryIO | None = None
        self._closed = False
        if is_local(path):
            make_parent(path)
            with storage_border("write", path), held_fences(path):
                # A new file, not the old one emptied: whoever still has that open writes into nothing.
                Path(strip_file_scheme(path)).unlink(missing_ok=True)
                self._file = open(strip_file_scheme(path), "xb")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Raises:
            DataError: the row is not made of JSON values.
            StorageError: the writer is closed or the line could not be written.
        """
        try:
            line = json.dumps(dict(row), ensure_ascii=False).encode("utf-8") + b"\n"
        except TypeError as error:
            raise DataError(
                f"A row for {self.path!r} is not JSON: {error}. Give str, int, float, bool, list, dict."
            ) from error
        with storage_border("write", self.path), held_fences(self.path):
            if self._closed:
                raise ValueError("the writer is closed")
            if self._file is None:
                self._lines.append(line)
            else:
                self._file.write(line)
                self._file.flush()

    def flush(self) -> None:
        """Make every row so far readable by others."""
        if self._file is None:
            write_bytes(self.path, b"".join(self._lines))

    def close(self) -> None:
        """Write what is left; a second close does nothing.

        Raises:
            StorageError: it could not be written.
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
            # What ended the block goes on; that the rest could not be written either must not take its place.


def read_jsonl(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file in order; blank lines are left out.

    Raises:
        PathNotFoundError: there is no such file.
        DataError: a line is not a JSON object; file and line are named.
    """
    with open_read(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_row(line, path, number)


def _parse_row(line: bytes, path: str, number: int) -> dict[str, Any]:
    try:
        row: object = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}). Each line must be one JSON object.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: got a {type(row).__name__}. Each line must be one JSON object.")
    return cast(dict[str, Any], row)
