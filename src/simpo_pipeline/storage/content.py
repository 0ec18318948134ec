"""Checksums of the content of files that no step wrote: a file, or the files of a folder.

Checksums of large local files are cached, because planning needs them each time. A cached checksum counts only for the
same file (device and inode) with the same size and times. One of the times cannot be set by programs, so a file that is
changed in place is read again even if its size and its time of modification stay the same. A checksum is cached only if
the file was last changed well before it was read: a later change then gives the file another time.
"""

import base64
import fnmatch
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

from simpo_pipeline.errors import ConfigError, PathNotFoundError, StorageError
from simpo_pipeline.storage.checksum import crc32c_of
from simpo_pipeline.storage.files import in_parallel, list_files, list_names, read_json, write_json
from simpo_pipeline.storage.filesystem import filesystem_of, storage_border
from simpo_pipeline.storage.paths import absolute, is_local, join, user_cache_folder

logger = logging.getLogger(__name__)

_MIN_CACHED_BYTES = 1 << 20
_MIN_LOGGED_BYTES = 1 << 30
# Two changes within this time may leave a file with the same times: FAT rounds them to 2 s.
_CLOCK_TICK_NS = 3_000_000_000
_CRC32C = re.compile(r"[0-9a-f]{8}")
# These schemes name revisions and pages of other sites, which are not read only to compute a checksum.
_NAMED_SCHEMES = ("hf", "http", "https")


def is_identified_by_name(path: str) -> bool:
    """Return whether `content_checksums` reads nothing at this path, because it is on a hub or a web site."""
    return not is_local(path) and path.split("://", 1)[0] in _NAMED_SCHEMES


def content_checksums(path: str, names: Sequence[str] = ()) -> str | dict[str, str] | None:
    """Return the CRC32C of a file, or those of the files of a folder by relative path. None if nothing is there.

    Google Cloud Storage lists checksums, so nothing is read from there. Of `hf://` and `http(s)://`, nothing is read
    at all, and None is returned.

    Args:
        path: Local path or URL of a file or folder.
        names: Patterns of names. If given, only the matching files directly in the folder count.

    Raises:
        ConfigError: The path begins with `~`, or is a URL that lost a slash or its bucket.
        StorageError: A file cannot be read, or it changes while it is read.
    """
    if not path or is_identified_by_name(path):
        return None
    if not is_local(path):
        return _remote_checksums(absolute(path), names)
    local = absolute(path)
    mode = _mode_of(local)
    if mode is None and path.startswith("~"):
        raise ConfigError(f"{path!r} does not exist, and '~' is not replaced by a home folder. Write the whole path.")
    if mode is None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return None
    if stat.S_ISREG(mode):
        return _cached_crc32c(local)
    if names:  # without a look at the folders below, which may have many files
        found = [name for name in list_names(local) if _counts(name, names) and os.path.isfile(join(local, name))]
    else:
        with storage_border("list", local):
            found = sorted(_files_below(local, "", frozenset()))
    return dict(zip(found, in_parallel(lambda name: _cached_crc32c(join(local, name)), found), strict=True))


def _mode_of(path: str) -> int | None:
    """Return the mode of a local file or folder, or None if nothing is there."""
    with storage_border("look up", path):
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None


def _files_below(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the relative paths of the files below a folder. Unlike `list_files`, follow links to folders.

    A link to one of the folders that contain it leads to files that already count.
    """
    found = os.stat(folder)
    identity = found.st_dev, found.st_ino
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_below(entry.path, f"{prefix}{entry.name}/", above | {identity})
            elif entry.is_file():
                yield f"{prefix}{entry.name}"


def _counts(relative_path: str, names: Sequence[str]) -> bool:
    return not names or ("/" not in relative_path and any(fnmatch.fnmatch(relative_path, name) for name in names))


def _remote_checksums(path: str, names: Sequence[str]) -> str | dict[str, str] | None:
    entries = [entry for entry in list_files(path) if _counts(entry.relative_path, names)]
    if entries:
        return {entry.relative_path: entry.crc32c or crc32c_of(join(path, entry.relative_path)) for entry in entries}
    return _remote_file_checksum(path)


def _remote_file_checksum(path: str) -> str | None:
    with storage_border("look up", path):
        filesystem, inner_path = filesystem_of(path)
        try:
            found = cast(Any, filesystem).info(inner_path)
        except FileNotFoundError:
            return None
    if found.get("type") != "file":
        return None
    stored = found.get("crc32c")
    return base64.b64decode(stored).hex() if stored else crc32c_of(path)


def _cached_crc32c(path: str) -> str:
    """Return the CRC32C of a local file, without reading it if it has not changed since it was last read."""
    before = _state_of(path)
    if before[0] < _MIN_CACHED_BYTES:
        return crc32c_of(path)
    cache = os.path.join(user_cache_folder("checksums"), f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json")
    cached = _read_cache(cache)
    is_current = cached.get("path") == path and cached.get("state") == before
    if is_current and _CRC32C.fullmatch(str(cached.get("crc32c"))):
        return cached["crc32c"]
    if before[0] >= _MIN_LOGGED_BYTES:
        logger.info("computing the checksum of %s (%.1f GB); later plans reuse it", path, before[0] / 1e9)
    is_settled = time.time_ns() - max(before[1], before[2]) > _CLOCK_TICK_NS
    checksum = crc32c_of(path)
    if _state_of(path) != before:
        raise StorageError(
            f"{path!r} changed while its checksum was computed. Start again when the program that writes it has ended."
        )
    if is_settled:
        _write_cache(cache, {"path": path, "state": before, "crc32c": checksum})
    return checksum


def _state_of(path: str) -> list[int]:
    with storage_border("read", path):
        found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino]


def _read_cache(path: str) -> dict[str, Any]:
    try:
        cached = read_json(path)
    except PathNotFoundError:
        return {}
    except StorageError as error:
        logger.warning("a cached checksum cannot be read, so the file is read again: %s", error)
        return {}
    return cast(dict[str, Any], cached) if isinstance(cached, dict) else {}


def _write_cache(path: str, entry: dict[str, Any]) -> None:
    try:
        write_json(path, entry)
    except StorageError as error:
        logger.warning("a checksum cannot be cached, so the next plan reads the file again: %s", error)
