"""Versions of local files: which inode lies at a path, and when it was written. See conditional.py.

Every write makes a new file and moves it into place, so a version is never seen twice.
"""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from simpo_pipeline.errors import FileLockedError
from simpo_pipeline.storage.filesystem import storage_border
from simpo_pipeline.storage.paths import base_name, strip_file_scheme

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_LOCK_WAIT_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.002


def version_of_stat(found: os.stat_result) -> str:
    """The version of a file that was looked up."""
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def read_version(path: str) -> tuple[bytes, str]:
    """The content of a file and its version."""
    with storage_border("read", path), open(strip_file_scheme(path), "rb") as file:
        return file.read(), version_of_stat(os.fstat(file.fileno()))


def write_version(path: str, data: bytes, expected: str | None) -> str | None:
    """Put `data` over the version `expected` (None: nothing); the version made, or None when it is not there."""
    place = strip_file_scheme(path)
    with storage_border("write", path), _written_aside(place, data) as aside:
        made = version_of_stat(os.stat(aside))
        if expected is None:
            return made if _link(aside, place) else None
        with held_still(place) as current:
            if current != expected:
                return None
            os.replace(aside, place)
    return made


def remove_version(path: str, expected: str) -> bool:
    """Remove the version `expected`; False when another one is there."""
    place = strip_file_scheme(path)
    with storage_border("remove", path), held_still(place) as current:
        if current == expected:
            os.remove(place)
        return current in (None, expected)


@contextmanager
def _written_aside(place: str, data: bytes) -> Generator[str]:
    """A new file beside the place, with the content on disk; gone after the block unless it was moved."""
    folder, name = os.path.split(os.path.abspath(place))
    os.makedirs(folder, exist_ok=True)
    aside = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield aside
    finally:
        Path(aside).unlink(missing_ok=True)


def _link(aside: str, place: str) -> bool:
    """Give the file its name too, which fails if the name exists."""
    try:
        os.link(aside, place)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _move_exclusively(aside, place)
    return True


def _move_exclusively(aside: str, place: str) -> bool:
    """For file systems without hard links (gcsfuse): claim the name with an empty file, then fill it."""
    try:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    os.replace(aside, place)
    return True


@contextmanager
def held_still(place: str) -> Generator[str | None]:
    """Keep others from replacing or removing the file while the block runs; gives its version, None if it is absent.

    The lock is on the file itself. Whoever waited for it finds out that the name leads to another file now.
    """
    descriptor = _open_locked(place)
    try:
        yield version_of_stat(os.fstat(descriptor)) if descriptor is not None else None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_locked(place: str) -> int | None:
    while True:
        try:
            descriptor = _open(place)
        except FileNotFoundError:
            return None
        try:
            _lock(descriptor, place)
            if os.path.samestat(os.fstat(descriptor), os.stat(place)):
                return descriptor
        except FileNotFoundError:
            pass  # removed while we waited
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(place: str) -> int:
    """For writing if that is allowed, because a lock over NFS asks for it."""
    try:
        return os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(place, os.O_RDONLY | os.O_CLOEXEC)


def _lock(descriptor: int, place: str) -> None:
    """Wait for the lock, but not for ever: its holder may be a stopped process."""
    waited_since = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - waited_since > _LOCK_WAIT_SECONDS:
                raise FileLockedError(
                    f"{base_name(place)!r} in {os.path.dirname(place)!r} is locked by another process of this machine "
                    f"for more than {_LOCK_WAIT_SECONDS:.0f} s. Is that process stopped? Continue or end it."
                ) from None
            time.sleep(_LOCK_POLL_SECONDS)
