"""Litter: files that no manifest names and no job uses. This module finds, removes and prints them for `gc`.

    scratch     .replay/<run id>/ of a run that has ended
    probe       .shared-<run id>, with which a run that has ended checked that all its hosts see the same prefix
    temporary   .NAME.<32 hex digits>.tmp, left by a writer that was killed
    attempt     outputs in a step's folder that its manifest does not name, or all of them if the step did not succeed
    checkpoint  .checkpoints/ in a step's folder, left by a job that will not resume or that failed to remove them

`gc` never removes the executor's own records, files that a running job may be using, or folders that do not belong to a
step. It removes only listed files, and each file only in the version that was listed. It removes the files of a step
under the step's lease, so that no job can start in the meantime.
"""

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from simpo_pipeline.errors import ConfigError, LeaseLostError, PathNotFoundError, StorageError
from simpo_pipeline.executor.commands.survey import (
    SeenLease,
    SeenStep,
    Survey,
    aligned_right,
    human_bytes,
    is_quiet,
    total_bytes,
)
from simpo_pipeline.executor.executor import PROBE_PREFIX
from simpo_pipeline.executor.output import json_document
from simpo_pipeline.executor.records.holder import parse_holder
from simpo_pipeline.executor.records.info import read_info
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseKeeper, LeaseWatch
from simpo_pipeline.executor.records.status import (
    CHECKPOINTS_FOLDER,
    LEASE_FILE,
    MANIFEST_FILE,
    OWN_FILES,
    STATUS_FILE,
    Status,
    is_of_checkpoint,
    manifest_bytes,
    read_manifest,
)
from simpo_pipeline.executor.running.attempt import REPLAY_FOLDER
from simpo_pipeline.executor.table import format_table
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.files import in_parallel, read_bytes, remove_tree
from simpo_pipeline.storage.paths import join

_PROBE = re.compile(re.escape(PROBE_PREFIX) + "[0-9a-f]+")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")
_SOME_CHECKSUM = "00000000"


class Kind(StrEnum):
    """Kind of a piece of litter."""

    SCRATCH = "scratch"
    PROBE = "probe"
    TEMPORARY = "temporary"
    ATTEMPT = "attempt"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Claim:
    """A folder that a job claims with a lease, in the state in which its litter was listed."""

    folder: str
    lease: str | None
    """Version of its lease file; None if there was none."""
    status: str | None
    """Version of its status file; None if there was none."""


@dataclass(frozen=True)
class Item:
    """One piece of litter. Paths are relative to the prefix."""

    kind: Kind
    path: str
    files: tuple[FileEntry, ...]
    claim: Claim | None = None
    """None for files in a folder that no job claims."""


@dataclass(frozen=True)
class Removal:
    """Result of the removal of an item."""

    item: Item
    removed: tuple[FileEntry, ...]
    why_left: str | None = None
    """Reason why the item, or part of it, still exists."""
    failed: bool = False
    """Whether it still exists because storage failed."""


def find_litter(survey: Survey, now: float | None = None) -> list[Item]:
    """Return all litter below a prefix, sorted by kind and path.

    Raises:
        StorageError: the prefix cannot be read.
    """
    now = time.time() if now is None else now
    scratch, loose = _split_scratch(survey.others)
    leases = in_parallel(lambda folder: _scratch_lease(survey.prefix, folder, scratch[folder]), scratch)
    items = [
        Item(Kind.SCRATCH, folder, tuple(scratch[folder]), _scratch_claim(folder, scratch[folder]))
        for folder, lease in zip(scratch, leases, strict=True)
        if _is_over(lease, scratch[folder], now)
    ]
    items += [
        Item(kind, entry.relative_path, (entry,))
        for entry in loose
        if (kind := _loose_kind(entry)) is not None and is_quiet(entry.modified, now)
    ]
    for found in in_parallel(lambda step: list(_litter_of_step(survey.prefix, step, now)), survey.steps):
        items += found
    return sorted(items, key=_sort_key)


def _sort_key(item: Item) -> tuple[int, str]:
    return list(Kind).index(item.kind), item.path


def _split_scratch(others: Sequence[FileEntry]) -> tuple[dict[str, list[FileEntry]], list[FileEntry]]:
    """Return the files of each run's scratch folder, and all other files."""
    scratch: dict[str, list[FileEntry]] = {}
    loose: list[FileEntry] = []
    for entry in others:
        parts = entry.relative_path.split("/")
        inside = parts[0] == REPLAY_FOLDER and len(parts) > 2
        (scratch.setdefault("/".join(parts[:2]), []) if inside else loose).append(entry)
    return scratch, loose


def _lease_file(folder: str, files: Sequence[FileEntry]) -> FileEntry | None:
    return next((entry for entry in files if entry.relative_path == join(folder, LEASE_FILE)), None)


def _scratch_lease(prefix: str, folder: str, files: Sequence[FileEntry]) -> SeenLease | None:
    entry = _lease_file(folder, files)
    if entry is None:
        return None
    try:
        return SeenLease(parse_holder(read_bytes(join(prefix, entry.relative_path))), entry.modified)
    except PathNotFoundError:
        return None  # released since it was listed


def _scratch_claim(folder: str, files: Sequence[FileEntry]) -> Claim:
    entry = _lease_file(folder, files)
    return Claim(folder, entry.version if entry is not None else None, None)


def _is_over(lease: SeenLease | None, files: Sequence[FileEntry], now: float) -> bool:
    """Return whether no job uses these files: the holder of their lease is known to be dead, or all are quiet."""
    if lease is not None and lease.is_gone:
        return True
    return all(is_quiet(entry.modified, now) for entry in files)


def _loose_kind(entry: FileEntry) -> Kind | None:
    if _PROBE.fullmatch(entry.relative_path):
        return Kind.PROBE
    return Kind.TEMPORARY if _temporary_for(entry) is not None else None


def _temporary_for(entry: FileEntry) -> str | None:
    """Return the name of the file that a temporary file was meant to become; None for other files."""
    found = _TEMPORARY.fullmatch(entry.relative_path.rpartition("/")[2])
    return found["name"] if found is not None else None


def _litter_of_step(prefix: str, step: SeenStep, now: float) -> Iterator[Item]:
    if step.may_be_in_use(now) or step.is_changing:
        return
    versions = step.record.versions
    claim = Claim(step.path, versions.get(LEASE_FILE), versions.get(STATUS_FILE))
    checkpoints = [entry for entry in step.files if is_of_checkpoint(step.name_of(entry))]
    for entry in step.files:
        name = _temporary_for(entry) if not is_of_checkpoint(step.name_of(entry)) else None
        # A job that takes over the lease of a dead job writes such a temporary file next to it. So temporary files for
        # the executor's own files are only removed when they are quiet.
        lease = step.lease if name not in OWN_FILES else None
        if name is not None and _is_over(lease, [entry], now):
            yield Item(Kind.TEMPORARY, entry.relative_path, (entry,), claim)
    strays, status = _strays(prefix, step), step.file(STATUS_FILE)
    recorded = [status] if status is not None else []
    # A step that just failed may be about to restart from the files it left, so its status file must be quiet too.
    if strays and _is_over(step.lease, [*strays, *recorded], now):
        yield Item(Kind.ATTEMPT, step.path, tuple(strays), claim)
    # A job that was killed may be about to resume from them, so they are kept as long as files of a running job.
    if checkpoints and all(is_quiet(entry.modified, now) for entry in [*checkpoints, *recorded]):
        yield Item(Kind.CHECKPOINT, join(step.path, CHECKPOINTS_FOLDER), tuple(checkpoints), claim)


def _strays(prefix: str, step: SeenStep) -> list[FileEntry]:
    """Return the outputs that must not be trusted, together with the manifest that once named them."""
    if step.record.status is Status.SUCCESS:
        unnamed = _unnamed(prefix, step) if step.record.done else []
        return unnamed if unnamed and _is_of_an_attempt(prefix, step) else []
    manifest = step.file(MANIFEST_FILE)
    strays = [*step.outputs, *([manifest] if manifest is not None else [])]
    return strays if strays and _is_of_an_attempt(prefix, step) else []


def _unnamed(prefix: str, step: SeenStep) -> list[FileEntry]:
    """Return the outputs that a valid manifest does not name.

    A valid manifest names only files that exist, with their sizes. So if it is as long as a manifest of all outputs, it
    names all of them.
    """
    manifest = step.file(MANIFEST_FILE)
    everything = [FileEntry(step.name_of(entry), entry.num_bytes, _SOME_CHECKSUM) for entry in step.outputs]
    if manifest is not None and manifest.num_bytes == len(manifest_bytes(everything)):
        return []
    try:
        named = {entry.relative_path for entry in read_manifest(join(prefix, step.path))}
    except PathNotFoundError:
        return []  # a job started since it was listed
    return [entry for entry in step.outputs if step.name_of(entry) not in named]


def _is_of_an_attempt(prefix: str, step: SeenStep) -> bool:
    """Return whether an attempt wrote the outputs in this folder.

    A step's info file is written before its function is called. An output path that the experiment chose itself may
    have contained other files before.
    """
    try:
        return read_info(join(prefix, step.path)).get("override_output_path", "") is None
    except PathNotFoundError:
        return False


def remove_litter(prefix: str, items: Sequence[Item]) -> list[Removal]:
    """Remove the items that are unchanged since they were listed. An error in one item does not affect the others.

    Raises:
        ConfigError: the storage of the prefix does not support conditional removal.
    """
    files, config = ConditionalFiles(), LeaseConfig()
    try:
        files.check(prefix)
    except StorageError as error:
        raise ConfigError(
            f"{prefix!r} does not support conditional writes, so nothing was removed. Remove the files by hand."
        ) from error
    with LeaseKeeper(f"gc-{uuid.uuid4().hex[:12]}", config, LeaseWatch(config), files) as leases:
        remover = _Remover(prefix, files, leases)
        groups: dict[Claim | str, list[Item]] = {}
        for item in items:
            groups.setdefault(item.claim or item.path, []).append(item)
        removals = [removal for group in groups.values() for removal in remover.remove(group)]
    return sorted(removals, key=lambda removal: _sort_key(removal.item))


class _Remover:
    """Remover of litter, for the items of one claim at a time."""

    def __init__(self, prefix: str, files: ConditionalFiles, leases: LeaseKeeper):
        self._prefix = prefix
        self._files = files
        self._leases = leases

    def remove(self, group: Sequence[Item]) -> list[Removal]:
        """Remove the items of one claim and return the results."""
        claim = group[0].claim
        try:
            if claim is None:
                return [self._remove_files(item, None) for item in group]
            if group[0].kind is Kind.SCRATCH:
                return [self._remove_scratch(item, claim) for item in group]
            return self._remove_of_step(group, claim)
        except StorageError as error:
            return [Removal(item, (), str(error), failed=True) for item in group]

    def _remove_scratch(self, item: Item, claim: Claim) -> Removal:
        if self._files.version_of(join(self._prefix, claim.folder, LEASE_FILE)) != claim.lease:
            return Removal(item, (), "its lease changed since it was listed")
        remove_tree(join(self._prefix, item.path))
        return Removal(item, item.files)

    def _remove_of_step(self, group: Sequence[Item], claim: Claim) -> list[Removal]:
        """Remove items under the step's lease, taken from a dead holder if necessary, if the status is unchanged."""
        lease, status = (join(self._prefix, claim.folder, name) for name in (LEASE_FILE, STATUS_FILE))
        changed = [Removal(item, (), "its lease or status changed since it was listed") for item in group]
        if claim.lease is not None and not self._files.remove(lease, claim.lease):
            return changed
        if not self._leases.acquire(lease):
            return changed
        try:
            if self._files.version_of(status) != claim.status:
                return changed
            return [self._remove_files(item, lease) for item in group]
        finally:
            self._leases.release(lease)

    def _remove_files(self, item: Item, lease: str | None) -> Removal:
        reasons = in_parallel(lambda entry: self._remove_file(entry, lease), item.files)
        removed = tuple(entry for entry, reason in zip(item.files, reasons, strict=True) if reason is None)
        left = [reason for reason in reasons if reason is not None]
        errors = [reason for reason in left if isinstance(reason, StorageError)]
        return Removal(item, removed, str((errors or left)[0]) if left else None, failed=bool(errors))

    def _remove_file(self, entry: FileEntry, lease: str | None) -> StorageError | str | None:
        """Remove one file. Return None if it is gone, otherwise the reason why it is not."""
        try:
            if lease is not None:
                self._leases.check(lease)
            if entry.version is not None and self._files.remove(join(self._prefix, entry.relative_path), entry.version):
                return None
            return f"{entry.relative_path} was written again since it was listed"
        except LeaseLostError:
            return "another job holds it now"
        except StorageError as error:
            return error


def litter_text(prefix: str, items: Sequence[Item], *, as_json: bool) -> str:
    """Return the output of `gc`."""
    found = [(item, item.files) for item in items]
    if as_json:
        return json_document({"prefix": prefix, "deleted": False, **_as_json(found), "left": []})
    if not items:
        return "Nothing to collect."
    return f"{_table(found)}\n{_sum(found)}. Add --delete to remove them."


def removals_text(prefix: str, removals: Sequence[Removal], *, as_json: bool) -> str:
    """Return the output of `gc --delete`. Storage errors go to standard error, so only the JSON object lists them."""
    gone = [(removal.item, removal.removed) for removal in removals if removal.removed]
    left = [removal for removal in removals if removal.why_left is not None]
    if as_json:
        reasons = [
            {
                "kind": removal.item.kind,
                "path": removal.item.path,
                "reason": removal.why_left,
                "storage_failed": removal.failed,
            }
            for removal in left
        ]
        return json_document({"prefix": prefix, "deleted": True, **_as_json(gone), "left": reasons})
    if not removals:
        return "Nothing to collect."
    lines = [_table(gone)] if gone else []
    lines += [f"skipped {removal.item.path}: {removal.why_left}" for removal in left if not removal.failed]
    return "\n".join([*lines, f"removed {_sum(gone)}."])


_Found = Sequence[tuple[Item, Sequence[FileEntry]]]
"""Items, each with its relevant files."""


def _table(found: _Found) -> str:
    sizes = aligned_right(["size", *(human_bytes(total_bytes(files)) for _, files in found)])
    rows = [
        [item.kind, item.path, f"{len(files):,}", size] for (item, files), size in zip(found, sizes[1:], strict=True)
    ]
    return format_table(["kind", "path", "files", sizes[0]], rows)


def _sum(found: _Found) -> str:
    size = human_bytes(sum(total_bytes(files) for _, files in found))
    return f"{len(found)} {'item' if len(found) == 1 else 'items'}, {size}"


def _as_json(found: _Found) -> dict[str, Any]:
    return {
        "items": [
            {"kind": item.kind, "path": item.path, "files": len(files), "bytes": total_bytes(files)}
            for item, files in found
        ],
        "files": sum(len(files) for _, files in found),
        "bytes": sum(total_bytes(files) for _, files in found),
    }
