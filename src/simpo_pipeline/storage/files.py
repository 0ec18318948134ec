"""Whole files and folders, local or remote: a reader sees the old content or the new content, never a mixture.

Each function asks the store that serves the path (stores.py). Missing parent folders are created. Every failure is a
StorageError, except that of a fence, whose error passes unchanged. Steps write through an `OutputFolder`
(output_folder.py), which passes the fence of their lease.
"""

import io
import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from simpo_pipeline.errors import StorageError
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.fence import OPEN, Fence
from simpo_pipeline.storage.filesystem import storage_border
from simpo_pipeline.storage.json_text import json_text
from simpo_pipeline.storage.stores import store_of

_NUM_READERS = 32
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def read_bytes(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        PathNotFoundError: The file does not exist.
    """
    with storage_border("read", path):
        return store_of(path).read_bytes(path)


def read_text(path: str) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        PathNotFoundError: The file does not exist.
        StorageError: The content is not UTF-8.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StorageError(
            f"Cannot read {path!r}: line {line} is not UTF-8. Save the file as UTF-8 text, and do not compress it."
        ) from error


def read_json(path: str) -> Any:
    """Return the value in a JSON file.

    Raises:
        PathNotFoundError: The file does not exist.
        StorageError: The content is not JSON.
    """
    with storage_border("read", path):
        return json.loads(read_bytes(path))


def write_bytes(path: str, data: bytes, fence: Fence = OPEN) -> None:
    """Write or replace a file atomically."""
    fence.check()
    with storage_border("write", path):
        store_of(path).write_bytes(path, data, fence.hold())


def write_text(path: str, text: str) -> None:
    """Write or replace a UTF-8 file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str, value: Any) -> None:
    """Write or replace a file of indented JSON atomically.

    Raises:
        DataError: The value contains something that JSON does not have, such as NaN.
    """
    write_bytes(path, json_bytes(value, path))


def json_bytes(value: Any, path: str = "a JSON file") -> bytes:
    """Return the content of a JSON file, formatted like all JSON files here. Equal values give equal bytes.

    Raises:
        DataError: The value contains something that JSON does not have, such as NaN. The message names `path`.
    """
    text = json_text(value, path, indent=2) + "\n"
    # Half of a surrogate pair, as in a file name that is not UTF-8, is written as a JSON escape: \udc80.
    return text.encode(errors="backslashreplace")


def open_write(path: str, fence: Fence = OPEN) -> AbstractContextManager[BinaryIO]:
    """Yield a binary file to stream into. It appears at `path` after the block; if the block raises, it never does."""
    fence.check()
    return store_of(path).open_write(path, fence.hold())


def open_read(path: str) -> io.BufferedReader:
    """Return a binary file to stream from. The caller closes it.

    Raises:
        PathNotFoundError: The file does not exist.
    """
    with storage_border("read", path):
        return store_of(path).open_read(path)


def upload(local_path: Path, path: str, fence: Fence = OPEN) -> None:
    """Copy a local file to `path` atomically."""
    fence.check()
    with storage_border("write", path):
        store_of(path).upload(local_path, path, fence.hold())


def local_copy(path: str) -> AbstractContextManager[Path]:
    """Yield a local path with the content of a file or folder: `path` itself if it is local, otherwise a copy.

    The copy is removed after the block.

    Raises:
        PathNotFoundError: Nothing is stored at `path`.
    """
    return store_of(path).local_copy(path)


def exists(path: str) -> bool:
    """Return whether a file or folder exists."""
    with storage_border("look up", path):
        return store_of(path).exists(path)


def list_files(path: str) -> list[FileEntry]:
    """Return all files below a folder, at any depth, sorted by relative path; none if the folder does not exist."""
    with storage_border("list", path):
        return sorted(store_of(path).list_files(path))


def list_names(path: str) -> list[str]:
    """Return the sorted names of the files and folders directly inside a folder; none if it does not exist."""
    with storage_border("list", path):
        return sorted(store_of(path).list_names(path))


def remove_tree(path: str, fence: Fence = OPEN) -> None:
    """Remove a file, or a folder with everything below it. A missing path is no error."""
    with storage_border("remove", path):
        store_of(path).remove_tree(path, fence.hold())


def make_parent(path: str) -> None:
    """Create the local folder that will contain `path`. Object stores have no folders."""
    with storage_border("make the folder of", path):
        store_of(path).make_parent(path)


def in_parallel(work: Callable[[ItemT], ResultT], items: Collection[ItemT]) -> list[ResultT]:
    """Return `work(item)` for every item, in order. Many threads call it, for requests that wait for storage.

    The first error is raised.
    """
    if not items:
        return []
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="storage") as pool:
        return list(pool.map(work, items))
