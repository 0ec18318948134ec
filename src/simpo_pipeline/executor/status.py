"""What a step leaves beside its outputs, and what a reader may believe of it.

    .executor_status        one token
    .executor_status.lock   the lease of the job that runs it (see lease.py)
    .executor_info          what ran, of which identity (see info.py)
    manifest.json           path, bytes and CRC32C of every output; what begins with a dot is no output
    error.json              host, exception and traceback of every process that failed

Commit order: outputs, manifest, info, then SUCCESS. Only SUCCESS together with a manifest means that outputs are there.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.executor.lease import Holder, LeaseWatch, parse_holder
from simpo_pipeline.storage.checksum import crc32c_of
from simpo_pipeline.storage.files import (
    FileEntry,
    list_files,
    read_bytes,
    read_json,
    remove_tree,
    write_json,
    write_text,
)
from simpo_pipeline.storage.paths import join

STATUS_FILE = ".executor_status"
LEASE_FILE = ".executor_status.lock"
MANIFEST_FILE = "manifest.json"
ERROR_FILE = "error.json"
_MAX_TOKEN_BYTES = 64


class Status(StrEnum):
    """The tokens of a status file."""

    RUNNING = "RUNNING"
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    DEP_FAILED = "DEP_FAILED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class LeaseSight:
    """A lease file of another job, as seen once."""

    holder: Holder | None
    fresh: bool

    def describe(self) -> str:
        """The holder, in words."""
        return self.holder.describe() if self.holder else "an unreadable lease"


@dataclass(frozen=True)
class StepRecord:
    """What storage says about a step."""

    status: Status | None = None
    unreadable_status: str | None = None
    """The content of a status file that is none of the tokens."""
    manifest: str | None = "is missing"
    """What is wrong with the manifest or with a file it lists; None when all files are there in their sizes."""
    has_error: bool = False
    lease: LeaseSight | None = None
    what_changed: str | None = None
    """For a step that never ran: how it differs from the nearest step of its name that did."""

    @property
    def done(self) -> bool:
        """Whether the outputs may be read."""
        return self.status is Status.SUCCESS and self.manifest is None


def read_record(output_path: str, watch: LeaseWatch) -> StepRecord:
    """What storage says about the step at an output path: one listing, and a read of each of its small files found."""
    sizes = {entry.relative_path: entry.num_bytes for entry in list_files(output_path)}
    token = _read_if_there(join(output_path, STATUS_FILE)) if STATUS_FILE in sizes else None
    status, unreadable = _parse_status(token) if token is not None else (None, None)
    lease: LeaseSight | None = None
    if LEASE_FILE in sizes:
        path = join(output_path, LEASE_FILE)
        data = _read_if_there(path)
        lease = LeaseSight(parse_holder(data), watch.is_fresh(path, data)) if data is not None else None
    manifest = "is missing"
    if MANIFEST_FILE in sizes:
        manifest = _find_damage(output_path, sizes)
    return StepRecord(status, unreadable, manifest, ERROR_FILE in sizes, lease)


def _find_damage(output_path: str, sizes: Mapping[str, int]) -> str | None:
    """What keeps a reader from believing the outputs, by names and sizes; checksums would mean reading it all."""
    try:
        entries = read_manifest(output_path)
    except StorageError:
        return "cannot be read"
    for entry in entries:
        found = sizes.get(entry.relative_path)
        if found is None:
            return f"lists {entry.relative_path}, which is gone"
        if found != entry.num_bytes:
            return f"lists {entry.relative_path} with {entry.num_bytes} bytes, and it has {found}"
    return None


def _read_if_there(path: str) -> bytes | None:
    try:
        return read_bytes(path)
    except PathNotFoundError:
        return None


def _parse_status(data: bytes) -> tuple[Status | None, str | None]:
    token = data[:_MAX_TOKEN_BYTES].decode("utf-8", errors="replace").strip()
    known = {status.value: status for status in Status}
    return (known[token], None) if token in known and len(data) <= _MAX_TOKEN_BYTES else (None, token)


def write_status(output_path: str, status: Status) -> None:
    """Record the token."""
    write_text(join(output_path, STATUS_FILE), status.value)


def write_error(output_path: str, error: dict[str, Any]) -> None:
    """Record who failed, and how."""
    write_json(join(output_path, ERROR_FILE), error)


def remove_error(output_path: str) -> None:
    """Remove the error of an earlier attempt."""
    remove_tree(join(output_path, ERROR_FILE))


def write_manifest(output_path: str) -> None:
    """List every output file with its size and checksum."""

    def checksum_of(entry: FileEntry) -> str:
        return entry.crc32c or crc32c_of(join(output_path, entry.relative_path))

    entries = [entry for entry in list_files(output_path) if _is_output(entry.relative_path)]
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 2)) as pool:
        checksums = list(pool.map(checksum_of, entries))
    files = [
        {"path": entry.relative_path, "bytes": entry.num_bytes, "crc32c": checksum}
        for entry, checksum in zip(entries, checksums, strict=True)
    ]
    write_json(join(output_path, MANIFEST_FILE), {"files": files})


def read_manifest(output_path: str) -> list[FileEntry]:
    """The outputs that a reader may believe.

    Raises:
        PathNotFoundError: nothing was committed at this output path.
        StorageError: the manifest is damaged.
    """
    path = join(output_path, MANIFEST_FILE)
    manifest = read_json(path)
    try:
        return [FileEntry(str(file["path"]), int(file["bytes"]), str(file["crc32c"])) for file in manifest["files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path!r} is no manifest ({error!r}). Remove the step's status to run it again.") from error


def _is_output(relative_path: str) -> bool:
    hidden = any(part.startswith(".") for part in relative_path.split("/"))
    return not hidden and relative_path not in (MANIFEST_FILE, ERROR_FILE)
