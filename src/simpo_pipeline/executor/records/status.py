"""Records of a step next to its outputs, and which of them a reader may trust.

    .executor_status        one token
    .executor_status.lock   the lease of the job that runs the step (see lease.py)
    .executor_info          what ran, and its identity (see info.py)
    .executor_code          fingerprints of the source of the step (see code.py)
    manifest.json           path, bytes and CRC32C of every output; files that begin with a dot are not outputs
    error.json              host, exception and traceback of every process that failed

Commit order: outputs, manifest, code, info, then SUCCESS. Only SUCCESS together with a manifest means that outputs
exist. These four files are written only if the file still has the version that the writer knows (see commit.py).
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.executor.records.holder import Holder, parse_holder
from simpo_pipeline.executor.records.lease import LeaseWatch
from simpo_pipeline.storage.checksum import crc32c_of, crc32c_of_bytes
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.files import json_bytes, list_files, read_bytes, read_json
from simpo_pipeline.storage.paths import join

STATUS_FILE = ".executor_status"
LEASE_FILE = ".executor_status.lock"
INFO_FILE = ".executor_info"
CODE_FILE = ".executor_code"
MANIFEST_FILE = "manifest.json"
ERROR_FILE = "error.json"
# Hidden, so that no manifest lists its content: written by training/checkpoints.py, removed by
# running/checkpoint_cleanup.py.
CHECKPOINTS_FOLDER = ".checkpoints"
OWN_FILES = (STATUS_FILE, LEASE_FILE, INFO_FILE, CODE_FILE, MANIFEST_FILE, ERROR_FILE)
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
    """The lease file of another job, as seen at one time."""

    holder: Holder | None
    fresh: bool

    def describe(self) -> str:
        """Return a description of the holder for messages."""
        return self.holder.describe() if self.holder else "an unreadable lease"


@dataclass(frozen=True)
class StepRecord:
    """State of a step in storage."""

    status: Status | None = None
    unreadable_status: str | None = None
    """The content of the status file if it is not one of the tokens."""
    manifest_problem: str | None = "is missing"
    """The problem with the manifest or with a file it lists. None if all files exist with the listed sizes."""
    has_error: bool = False
    lease: LeaseSight | None = None
    what_changed: str | None = None
    """For a step that never ran: how it differs from the nearest step of the same name that did."""
    code: FileEntry | None = None
    """The listed fingerprints of the source of the step. None if the step recorded none."""
    changed_code: tuple[str, ...] = ()
    """For a step that is done: the modules of its function whose source changed since it ran."""
    versions: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    """The version of each existing executor file, by name. None where the listing does not report versions."""
    has_checkpoints: bool = False

    @property
    def done(self) -> bool:
        """Whether the outputs may be read."""
        return self.status is Status.SUCCESS and self.manifest_problem is None


def read_record(output_path: str, watch: LeaseWatch | None) -> StepRecord:
    """Read the record of the step at an output path. Without a watch, the lease is not read.

    This takes one listing. If the listing reports checksums, it is enough to recognize a step that is done. Otherwise,
    the small files that exist are read.
    """
    entries = {entry.relative_path: entry for entry in list_files(output_path)}
    token = _read_token(output_path, entries[STATUS_FILE]) if STATUS_FILE in entries else None
    status, unreadable = _parse_status(token) if token is not None else (None, None)
    lease: LeaseSight | None = None
    if LEASE_FILE in entries and watch is not None:
        path = join(output_path, LEASE_FILE)
        data = _read_if_there(path)
        lease = LeaseSight(parse_holder(data), watch.is_fresh(path, data)) if data is not None else None
    manifest_problem = "is missing"
    if MANIFEST_FILE in entries:
        manifest_problem = _find_damage(output_path, entries)
    own = {name: entry.version for name, entry in entries.items() if name in OWN_FILES}
    checkpoints = any(is_of_checkpoint(name) for name in entries)
    return StepRecord(
        status,
        unreadable,
        manifest_problem,
        has_error=ERROR_FILE in entries,
        lease=lease,
        code=entries.get(CODE_FILE),
        versions=own,
        has_checkpoints=checkpoints,
    )


_TOKENS = {(len(token), crc32c_of_bytes(token)): token for token in (status.value.encode() for status in Status)}


def _read_token(output_path: str, entry: FileEntry) -> bytes | None:
    """Return the content of the status file, derived from its size and checksum if the listing reports them."""
    known = _TOKENS.get((entry.num_bytes, entry.crc32c or ""))
    return known if known is not None else _read_if_there(join(output_path, STATUS_FILE))


def _find_damage(output_path: str, found: Mapping[str, FileEntry]) -> str | None:
    """Return the reason why a reader must not trust the outputs, or None.

    If the listing reports checksums, the manifest that follows from it is compared with the stored one. If they differ,
    or if the listing reports no checksums, names and sizes are compared, and checksums only where the listing reports
    them: computing checksums would mean reading all outputs.
    """
    outputs = [entry for name, entry in found.items() if is_output(name)]
    there = found[MANIFEST_FILE]
    if there.crc32c is not None and all(entry.crc32c for entry in outputs):
        expected = manifest_bytes(outputs)
        if (there.num_bytes, there.crc32c) == (len(expected), crc32c_of_bytes(expected)):
            return None
    try:
        listed = read_manifest(output_path)
    except StorageError:
        return "cannot be read"
    for entry in listed:
        other = found.get(entry.relative_path)
        if other is None:
            return f"lists {entry.relative_path}, which is gone"
        if other.num_bytes != entry.num_bytes:
            return f"lists {entry.relative_path} with {entry.num_bytes} bytes, but it has {other.num_bytes}"
        if other.crc32c is not None and other.crc32c != entry.crc32c:
            return f"lists {entry.relative_path} with CRC32C {entry.crc32c}, but it has {other.crc32c}"
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


def manifest_bytes(outputs: list[FileEntry]) -> bytes:
    """Return the manifest of outputs whose checksums are known. The same outputs give the same bytes."""
    files = [
        {"path": entry.relative_path, "bytes": entry.num_bytes, "crc32c": entry.crc32c} for entry in sorted(outputs)
    ]
    return json_bytes({"files": files})


def find_outputs(output_path: str) -> list[FileEntry]:
    """Return every output that exists now, with its checksum."""
    return outputs_among(output_path, list_files(output_path))


def outputs_among(output_path: str, entries: list[FileEntry]) -> list[FileEntry]:
    """Return the outputs in a listing of an output path, with their checksums."""

    def with_checksum(entry: FileEntry) -> FileEntry:
        checksum = entry.crc32c or crc32c_of(join(output_path, entry.relative_path))
        return FileEntry(entry.relative_path, entry.num_bytes, checksum)

    outputs = [entry for entry in entries if is_output(entry.relative_path)]
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 2)) as pool:
        return list(pool.map(with_checksum, outputs))


def read_manifest(output_path: str) -> list[FileEntry]:
    """Return the outputs that a reader may trust.

    Raises:
        PathNotFoundError: Nothing was committed at this output path.
        StorageError: The manifest is damaged.
    """
    path = join(output_path, MANIFEST_FILE)
    manifest = read_json(path)
    listed: Any = cast(dict[str, Any], manifest).get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, list):
        raise StorageError(f"{path!r} is not a manifest: it lists no files. Remove the step's status to run it again.")
    return [_listed_file(path, file) for file in cast(list[Any], listed)]


def _listed_file(manifest_path: str, file: Any) -> FileEntry:
    fields = cast(dict[str, Any], file) if isinstance(file, dict) else {}
    match fields.get("path"), fields.get("bytes"), fields.get("crc32c"):
        case str(relative_path), int(num_bytes), str(crc32c) if not isinstance(num_bytes, bool):
            return FileEntry(relative_path, num_bytes, crc32c)
        case _:
            raise StorageError(
                f"{manifest_path!r} is not a manifest: it lists {file!r}. Remove the step's status to run it again."
            )


def is_output(relative_path: str) -> bool:
    """Return whether a file below an output path belongs to the step and not to the executor."""
    hidden = any(part.startswith(".") for part in relative_path.split("/"))
    return not hidden and relative_path not in OWN_FILES


def is_of_checkpoint(relative_path: str) -> bool:
    """Return whether a file below an output path belongs to a checkpoint of the step."""
    return relative_path.startswith(f"{CHECKPOINTS_FOLDER}/")
