"""What no manifest names and nobody uses any more: what `gc` finds, removes and prints.

    scratch     .replay/<run id>/ of a run that is over
    probe       .shared-<run id>, by which a run that is over made sure that all its hosts see one prefix
    temporary   .NAME.<32 hex digits>.tmp, left by a writer that was killed
    attempt     outputs in a step's folder that its manifest does not name, or all of them if the step did not succeed
    checkpoint  .checkpoints/ in a step's folder: of a job that will not go on, or did not come to removing them

Left alone: the executor's own records, whatever a living job may be using, and every folder that is no step's. Only
what was listed is removed: of a step under its lease, so that no job begins meanwhile, and each file only in the
version that was seen.
"""

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from simpo_pipeline.errors import ConfigError, LeaseLostError, PathNotFoundError, StorageError
from simpo_pipeline.executor.commands.output import json_document
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
    """What a piece of litter is."""

    SCRATCH = "scratch"
    PROBE = "probe"
    TEMPORARY = "temporary"
    ATTEMPT = "attempt"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Claim:
    """A folder that a job claims by a lease, as it was when its litter was listed."""

    folder: str
    lease: str | None
    """The version of its lease file; None where there was none."""
    status: str | None
    """The version of its status file; None where there was none."""


@dataclass(frozen=True)
class Item:
    """One piece of litter; paths are relative to the prefix."""

    kind: Kind
    path: str
    files: tuple[FileEntry, ...]
    claim: Claim | None = None
    """None for what lies in nobody's folder."""


@dataclass(frozen=True)
class Removal:
    """What became of an item."""

    item: Item
    removed: tuple[FileEntry, ...]
    why_left: str | None = None
    """Why the item, or a part of it, is still there."""
    failed: bool = False
    """Whether it is still there because storage failed."""


def find_litter(survey: Survey, now: float | None = None) -> list[Item]:
    """All litter below a prefix, by kind and path.

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
    return sorted(items, key=_place_in_list)


def _place_in_list(item: Item) -> tuple[int, str]:
    return list(Kind).index(item.kind), item.path


def _split_scratch(others: Sequence[FileEntry]) -> tuple[dict[str, list[FileEntry]], list[FileEntry]]:
    """The files of each run's scratch folder, and all others."""
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
        return None  # given up since it was listed


def _scratch_claim(folder: str, files: Sequence[FileEntry]) -> Claim:
    entry = _lease_file(folder, files)
    return Claim(folder, entry.version if entry is not None else None, None)


def _is_over(lease: SeenLease | None, files: Sequence[FileEntry], now: float) -> bool:
    """Whether nobody works on these files: their lease's holder is known to have died, or all were left alone."""
    if lease is not None and lease.is_gone:
        return True
    return all(is_quiet(entry.modified, now) for entry in files)


def _loose_kind(entry: FileEntry) -> Kind | None:
    if _PROBE.fullmatch(entry.relative_path):
        return Kind.PROBE
    return Kind.TEMPORARY if _temporary_for(entry) is not None else None


def _temporary_for(entry: FileEntry) -> str | None:
    """The name of the file that a temporary file was to become; None for other files."""
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
        # Who wants the lease of a dead job writes such a file beside it, so the executor's own are never urgent.
        lease = step.lease if name not in OWN_FILES else None
        if name is not None and _is_over(lease, [entry], now):
            yield Item(Kind.TEMPORARY, entry.relative_path, (entry,), claim)
    strays, status = _strays(prefix, step), step.file(STATUS_FILE)
    recorded = [status] if status is not None else []
    # A step that just failed is about to be started again, perhaps from what it left: its status counts too.
    if strays and _is_over(step.lease, [*strays, *recorded], now):
        yield Item(Kind.ATTEMPT, step.path, tuple(strays), claim)
    # A job that was killed is about to go on from them: so they are left alone for as long as any file of a living job.
    if checkpoints and all(is_quiet(entry.modified, now) for entry in [*checkpoints, *recorded]):
        yield Item(Kind.CHECKPOINT, join(step.path, CHECKPOINTS_FOLDER), tuple(checkpoints), claim)


def _strays(prefix: str, step: SeenStep) -> list[FileEntry]:
    """The outputs that nobody may believe, with the manifest that named them once."""
    if step.record.status is Status.SUCCESS:
        unnamed = _unnamed(prefix, step) if step.record.done else []
        return unnamed if unnamed and _is_of_an_attempt(prefix, step) else []
    manifest = step.file(MANIFEST_FILE)
    strays = [*step.outputs, *([manifest] if manifest is not None else [])]
    return strays if strays and _is_of_an_attempt(prefix, step) else []


def _unnamed(prefix: str, step: SeenStep) -> list[FileEntry]:
    """The outputs that a manifest which holds does not name.

    Such a manifest names only files that are there, in their sizes: if it is as long as one of all of them, it is one.
    """
    manifest = step.file(MANIFEST_FILE)
    everything = [FileEntry(step.name_of(entry), entry.num_bytes, _SOME_CHECKSUM) for entry in step.outputs]
    if manifest is not None and manifest.num_bytes == len(manifest_bytes(everything)):
        return []
    try:
        named = {entry.relative_path for entry in read_manifest(join(prefix, step.path))}
    except PathNotFoundError:
        return []  # a job began since it was listed
    return [entry for entry in step.outputs if step.name_of(entry) not in named]


def _is_of_an_attempt(prefix: str, step: SeenStep) -> bool:
    """Whether an attempt wrote what lies here.

    Before a step's function is called, its info is written. An output path that the experiment chose itself may have
    held somebody's files before.
    """
    try:
        return read_info(join(prefix, step.path)).get("override_output_path", "") is None
    except PathNotFoundError:
        return False


def remove_litter(prefix: str, items: Sequence[Item]) -> list[Removal]:
    """Remove what is still as it was listed; what goes wrong with one item does not keep the others from removal.

    Raises:
        ConfigError: the prefix lies where files cannot be removed conditionally.
    """
    files, config = ConditionalFiles(), LeaseConfig()
    try:
        files.check(prefix)
    except StorageError as error:
        raise ConfigError(f"{prefix!r} has no conditional writes, so nothing is removed. Remove it by hand.") from error
    with LeaseKeeper(f"gc-{uuid.uuid4().hex[:12]}", config, LeaseWatch(config), files) as leases:
        remover = _Remover(prefix, files, leases)
        groups: dict[Claim | str, list[Item]] = {}
        for item in items:
            groups.setdefault(item.claim or item.path, []).append(item)
        removals = [removal for group in groups.values() for removal in remover.remove(group)]
    return sorted(removals, key=lambda removal: _place_in_list(removal.item))


class _Remover:
    """Removes items of one claim at a time."""

    def __init__(self, prefix: str, files: ConditionalFiles, leases: LeaseKeeper):
        self._prefix = prefix
        self._files = files
        self._leases = leases

    def remove(self, group: Sequence[Item]) -> list[Removal]:
        """Remove the items of one claim."""
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
        """Under the step's lease, taken from a dead holder if need be, and only if its status is what it was."""
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
        whys = in_parallel(lambda entry: self._remove_file(entry, lease), item.files)
        removed = tuple(entry for entry, why in zip(item.files, whys, strict=True) if why is None)
        left = [why for why in whys if why is not None]
        errors = [why for why in left if isinstance(why, StorageError)]
        return Removal(item, removed, str((errors or left)[0]) if left else None, failed=bool(errors))

    def _remove_file(self, entry: FileEntry, lease: str | None) -> StorageError | str | None:
        """None when the file is gone, else why it is not."""
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
    """What `gc` prints."""
    found = [(item, item.files) for item in items]
    if as_json:
        return json_document({"prefix": prefix, "deleted": False, **_as_json(found), "left": []})
    if not items:
        return "Nothing to collect."
    return f"{_table(found)}\n{_sum(found)}. Add --delete to remove them."


def removals_text(prefix: str, removals: Sequence[Removal], *, as_json: bool) -> str:
    """What `gc --delete` prints; failures of storage are for standard error, and so only in the JSON object."""
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
"""Items with those of their files that matter."""


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
