"""Writes that happen only if the file is as expected: what leases are made of.

`create_only` is atomic everywhere it is allowed. `replace_if_same` and `remove_if_same` are atomic between processes
of one machine (a lock on the folder, which the kernel drops when its holder dies); on object stores they compare and
then write, so a loser may notice only at its next look.
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage.files import make_parent, read_bytes, remove_tree, write_bytes
from simpo_pipeline.storage.filesystem import filesystem_of, storage_border
from simpo_pipeline.storage.paths import base_name, is_local, parent, strip_file_scheme

_CREATE_ONLY_SCHEMES = ("gs", "gcs", "memory")
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def create_only(path: str, data: bytes) -> bool:
    """Put `data` at `path` unless something is there; False when something is.

    Raises:
        StorageError: this file system cannot promise that only one of two writers succeeds.
    """
    if is_local(path):
        return _create_locally(strip_file_scheme(path), data)
    scheme = path.split("://", 1)[0]
    if scheme not in _CREATE_ONLY_SCHEMES:
        allowed = ", ".join(f"{known}://" for known in _CREATE_ONLY_SCHEMES)
        raise StorageError(
            f"{scheme}:// has no create-only write. Use a local folder or one of {allowed} for {path!r}."
        )
    filesystem, inner_path = filesystem_of(path)
    try:
        with storage_border("create", path):
            filesystem.pipe_file(inner_path, data, mode="create")
    except StorageError as error:
        if isinstance(error.__cause__, FileExistsError):
            return False
        raise
    return True


def _create_locally(path: str, data: bytes) -> bool:
    """Create with the content complete: written aside and hard-linked into place, which fails if the name exists."""
    make_parent(path)
    aside = os.path.join(parent(os.path.abspath(path)), f".{base_name(path)}.{uuid.uuid4().hex}.tmp")
    with storage_border("create", path):
        try:
            Path(aside).write_bytes(data)
            os.link(aside, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return _create_exclusively(path, data)
        finally:
            Path(aside).unlink(missing_ok=True)
    return True


def _create_exclusively(path: str, data: bytes) -> bool:
    """For file systems without hard links (gcsfuse): exclusive creation, readers may glimpse an empty file."""
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def replace_if_same(path: str, expected: bytes, data: bytes) -> bool:
    """Put `data` at `path` if it holds `expected`; False when it holds something else or nothing."""
    with _folder_lock(path):
        if not _holds(path, expected):
            return False
        write_bytes(path, data)
        return True


def remove_if_same(path: str, expected: bytes) -> bool:
    """Remove `path` if it holds `expected`; False when it holds something else or nothing."""
    with _folder_lock(path):
        if not _holds(path, expected):
            return False
        remove_tree(path)
        return True


def _holds(path: str, expected: bytes) -> bool:
    try:
        return read_bytes(path) == expected
    except PathNotFoundError:
        return False


@contextmanager
def _folder_lock(path: str) -> Generator[None]:
    """Exclude other processes of this machine while the block runs; nothing on object stores."""
    if not is_local(path):
        yield
        return
    folder = parent(os.path.abspath(strip_file_scheme(path)))
    with storage_border("lock the folder of", path):
        make_parent(path)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with storage_border("lock the folder of", path):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
