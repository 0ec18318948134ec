"""Versions of local files: the inode, the time of the last write and the size. Paths here have no scheme.

Every write creates a new file and renames it, so no version occurs twice. See conditional.py.
"""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from simpo_pipeline.errors import FileLockedError
from simpo_pipeline.storage.paths import base_name

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_LOCK_WAIT_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.002


def version_of_stat(found: os.stat_result) -> str:
    """Return the version of a file from its `os.stat`."""
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def read_version(path: str) -> tuple[bytes, str]:
    """Return the content of a file and its version."""
    with open(path, "rb") as file:
        return file.read(), version_of_stat(os.fstat(file.fileno()))


def write_version(path: str, data: bytes, expected: str | None) -> str | None:
    """Replace the version `expected` (None: no file). Return the new version, or None if the file differs."""
    with temporary_beside(path) as file:
        file.write(data)
        close_on_disk(file)
        version = version_of_stat(os.stat(file.name))
        if expected is None:
            return version if _link(file.name, path) else None
        with held_still(path) as current:
            if current != expected:
                return None
            os.replace(file.name, path)
    return version


def remove_version(path: str, expected: str) -> bool:
    """Remove the version `expected`. Return False if another version is there; a missing file counts as removed."""
    with held_still(path) as current:
        if current == expected:
            os.remove(path)
        return current in (None, expected)


@contextmanager
def temporary_beside(path: str) -> Generator[BinaryIO]:
    """Yield a new file in the folder of `path`. It is removed after the block unless it was renamed."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
    finally:
        Path(temporary).unlink(missing_ok=True)


def close_on_disk(file: BinaryIO) -> None:
    """Sync the content of a file to disk, then close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _link(temporary: str, path: str) -> bool:
    """Give the file its name as a second one. Return False if the name exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _move_exclusively(temporary, path)
    return True


def _move_exclusively(temporary: str, path: str) -> bool:
    """On file systems without hard links (gcsfuse), claim the name with an empty file, then replace that file."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    os.replace(temporary, path)
    return True


@contextmanager
def held_still(path: str) -> Generator[str | None]:
    """Keep other processes from replacing or removing the file during the block.

    Yields its version, or None if it does not exist. The lock is on the file itself. A process that waited for the lock
    then finds that the name belongs to another file.
    """
    descriptor = _open_locked(path)
    try:
        yield version_of_stat(os.fstat(descriptor)) if descriptor is not None else None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_locked(path: str) -> int | None:
    while True:
        try:
            descriptor = _open(path)
        except FileNotFoundError:
            return None
        try:
            _lock(descriptor, path)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # removed while this process waited
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: str) -> int:
    """Open the file for writing if permissions allow it, because a lock over NFS requires that."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _lock(descriptor: int, path: str) -> None:
    """Wait for the lock for a limited time, because its holder may be a stopped process."""
    waited_since = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - waited_since > _LOCK_WAIT_SECONDS:
                raise FileLockedError(
                    f"{base_name(path)!r} in {os.path.dirname(path)!r} has been locked by another process on this "
                    f"machine for more than {_LOCK_WAIT_SECONDS:.0f} s. Is that process stopped? Resume it or end it."
                ) from None
            time.sleep(_LOCK_POLL_SECONDS)
