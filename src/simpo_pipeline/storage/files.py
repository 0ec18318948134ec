"""Whole files and folders, local or remote: a reader sees the old content or the new, never a part.

Locally a write goes to a dot file beside its place, is synced and renamed; remotely it is one upload, which object
stores publish at its end. Parent folders are made. Every failure is a StorageError.
"""

import io
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.fence import check_fences, held_fences
from simpo_pipeline.storage.filesystem import FileSystem, filesystem_of, storage_border
from simpo_pipeline.storage.gcs import is_gcs, list_object_names, list_objects
from simpo_pipeline.storage.local_versions import version_of_stat
from simpo_pipeline.storage.paths import base_name, is_local, join, parent, strip_file_scheme

_NUM_READERS = 32
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def read_bytes(path: str) -> bytes:
    """The content of a file.

    Raises:
        PathNotFoundError: there is no such file.
    """
    if is_local(path):
        with storage_border("read", path), open(strip_file_scheme(path), "rb") as file:
            return file.read()
    filesystem, inner_path = filesystem_of(path)
    with storage_border("read", path):
        return filesystem.cat_file(inner_path)


def read_text(path: str) -> str:
    """The content of a UTF-8 file.

    Raises:
        PathNotFoundError: there is no such file.
        StorageError: it is not UTF-8.
    """
    with storage_border("read", path):
        return read_bytes(path).decode("utf-8")


def read_json(path: str) -> Any:
    """The value in a JSON file.

    Raises:
        PathNotFoundError: there is no such file.
        StorageError: it is not JSON.
    """
    with storage_border("read", path):
        return json.loads(read_bytes(path))


def write_bytes(path: str, data: bytes) -> None:
    """Put `data` at `path` in one piece, over what was there."""
    if is_local(path):
        with storage_border("write", path), open_write(path) as file:
            file.write(data)
        return
    filesystem, inner_path = filesystem_of(path)
    with storage_border("write", path), held_fences(path):
        filesystem.pipe_file(inner_path, data)


def write_text(path: str, text: str) -> None:
    """Put UTF-8 text at `path` in one piece."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str, value: Any) -> None:
    """Put `value` at `path` as indented JSON in one piece."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A JSON file's content, as every one here is laid out: the same bytes for the same value."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Half of a surrogate pair, as in the name of a file that is not UTF-8, is written as JSON spells it: \udc80.
    return text.encode(errors="backslashreplace")


@contextmanager
def open_write(path: str) -> Generator[BinaryIO]:
    """A binary file to stream into; it appears at `path` when the block ends well, and not at all when it raises."""
    check_fences(path)
    if is_local(path):
        with _local_replacement(strip_file_scheme(path)) as file:
            yield file
        return
    with tempfile.TemporaryDirectory(prefix="simpo_pipeline_") as folder:
        spool = Path(folder, "spool")
        with spool.open("wb") as file:
            yield file
        filesystem, inner_path = filesystem_of(path)
        with storage_border("write", path), held_fences(path):
            filesystem.put_file(str(spool), inner_path)


@contextmanager
def _local_replacement(path: str) -> Generator[BinaryIO]:
    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, f".{base_name(path)}.{uuid.uuid4().hex}.tmp")
    with storage_border("write", path):
        os.makedirs(folder, exist_ok=True)
        file = open(temporary, "wb")
    try:
        with file:
            yield file
            with storage_border("write", path):
                file.flush()
                os.fsync(file.fileno())
        with storage_border("write", path), held_fences(path):
            os.replace(temporary, path)
        with storage_border("write", path):
            _sync_folder(folder)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, inner_path = filesystem_of(path)
    with storage_border("look up", path):
        return filesystem.exists(inner_path)


def list_files(path: str) -> list[FileEntry]:
    """All files below a folder, at any depth, sorted by relative path; none when the folder does not exist."""
    if is_gcs(path):
        return sorted(list_objects(path))
    if is_local(path):
        with storage_border("list", path):
            return sorted(_local_entries(strip_file_scheme(path).rstrip("/") or "/", ""))
    filesystem, inner_path = filesystem_of(path)
    with storage_border("list", path):
        found = filesystem.find(inner_path, detail=True)
    start = inner_path.rstrip("/") + "/"
    return sorted(_listed(name[len(start) :], info, path) for name, info in found.items() if name.startswith(start))


def _local_entries(folder: str, below: str) -> Iterator[FileEntry]:
    """Links to folders are not followed: they may lead in a circle."""
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _local_entries(entry.path, f"{below}{entry.name}/")
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue  # another process removed it since, or it is a link to nothing
            if stat.S_ISREG(found.st_mode):
                version = version_of_stat(found)
                yield FileEntry(f"{below}{entry.name}", found.st_size, None, version, found.st_mtime)


def _listed(relative_path: str, info: dict[str, Any], path: str) -> FileEntry:
    """An entry of a listing by fsspec. The in-memory store tells when a file was made, and makes one at each write."""
    created = info.get("created")
    version = repr(created) if path.startswith("memory://") else None
    return FileEntry(relative_path, int(info["size"]), None, version, created if isinstance(created, float) else None)


def list_names(path: str) -> list[str]:
    """The names of what lies directly inside a folder, sorted; none when the folder does not exist."""
    if is_gcs(path):
        return sorted(list_object_names(path))
    if is_local(path):
        try:
            with storage_border("list", path):
                return sorted(os.listdir(strip_file_scheme(path)))
        except PathNotFoundError:
            return []
    filesystem, inner_path = filesystem_of(path)
    try:
        with storage_border("list", path):
            names = filesystem.ls(inner_path, detail=False)
    except PathNotFoundError:
        return []
    return sorted(base_name(name) for name in names if name.rstrip("/") != inner_path.rstrip("/"))


def remove_tree(path: str) -> None:
    """Remove a file or a folder with all below it; nothing happens when nothing is there."""
    filesystem, inner_path = filesystem_of(path)
    try:
        with storage_border("remove", path), held_fences(path):
            filesystem.rm(inner_path, recursive=True)
    except PathNotFoundError:
        return


def open_read(path: str) -> io.BufferedReader:
    """A binary file to stream from; the caller closes it.

    Raises:
        PathNotFoundError: there is no such file.
    """
    if is_local(path):
        with storage_border("read", path):
            return open(strip_file_scheme(path), "rb")
    filesystem, inner_path = filesystem_of(path)
    with storage_border("read", path):
        return io.BufferedReader(filesystem.open(inner_path, "rb"))


def upload(local_path: Path, path: str) -> None:
    """Copy one local file to `path`, where it appears in one piece."""
    if is_local(path):
        with storage_border("read", str(local_path)), open_write(path) as target, local_path.open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 20)
        return
    filesystem, inner_path = filesystem_of(path)
    with storage_border("write", path), held_fences(path):
        filesystem.put_file(str(local_path), inner_path)


@contextmanager
def local_copy(path: str) -> Generator[Path]:
    """A local path with the content of a file or folder: itself when local, else a copy that goes with the block.

    Raises:
        PathNotFoundError: nothing is stored at `path`.
    """
    if is_local(path):
        local_path = Path(strip_file_scheme(path))
        if not local_path.exists():
            raise PathNotFoundError(f"Cannot read {path!r}: nothing is stored there.")
        yield local_path
        return
    filesystem, inner_path = filesystem_of(path)
    with tempfile.TemporaryDirectory(prefix="simpo_pipeline_") as folder:
        yield _download(filesystem, inner_path, path, Path(folder))


def _download(filesystem: FileSystem, inner_path: str, path: str, folder: Path) -> Path:
    target = folder / base_name(path)
    with storage_border("read", path):
        if filesystem.isfile(inner_path):
            filesystem.get_file(inner_path, str(target))
            return target
    entries = list_files(path)
    if not entries:
        raise PathNotFoundError(f"Cannot read {path!r}: nothing is stored there.")
    for entry in entries:
        copy = target / entry.relative_path
        if not copy.resolve().is_relative_to(target.resolve()):
            raise StorageError(f"{join(path, entry.relative_path)!r} would be copied outside its folder; rename it.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        with storage_border("read", join(path, entry.relative_path)):
            filesystem.get_file(join(inner_path, entry.relative_path), str(copy))
    return target


def make_parent(path: str) -> None:
    """Make the local folder that will hold `path`; object stores have no folders to make."""
    if is_local(path):
        with storage_border("make the folder of", path):
            os.makedirs(parent(os.path.abspath(strip_file_scheme(path))), exist_ok=True)


def in_parallel(work: Callable[[ItemT], ResultT], items: Collection[ItemT]) -> list[ResultT]:
    """Return `work` of every item, in order, from many threads: for requests that wait for storage.

    The first error is raised.
    """
    if not items:
        return []
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="storage") as pool:
        return list(pool.map(work, items))
