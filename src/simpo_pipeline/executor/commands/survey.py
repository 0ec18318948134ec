"""Survey of a prefix: every step with its record, its lease and its files, and the output of `status`.

One recursive listing finds the steps. Their records are then read in parallel. Nothing is written.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.output import json_document
from simpo_pipeline.executor.records.holder import Holder
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseWatch
from simpo_pipeline.executor.records.status import (
    INFO_FILE,
    LEASE_FILE,
    STATUS_FILE,
    Status,
    StepRecord,
    is_output,
    read_record,
)
from simpo_pipeline.executor.running.attempt import REPLAY_FOLDER
from simpo_pipeline.executor.table import format_table
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.files import exists, in_parallel, list_files
from simpo_pipeline.storage.paths import absolute, join

QUIET_SECONDS = 3600.0
"""A file that was not written for this long is not in use by a running job.

By default a holder renews its lease four times a minute. The clocks of different machines may differ by minutes but not
by an hour."""
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_KIB = 1024


def is_quiet(modified: float | None, now: float) -> bool:
    """Return whether a file was last written more than an hour ago. An unknown time counts as recent."""
    return modified is not None and now - modified > QUIET_SECONDS


@dataclass(frozen=True)
class SeenLease:
    """A lease file that was found."""

    holder: Holder | None
    """None if the content of the file is not a lease."""
    modified: float | None
    """Time of its last renewal, by the store's clock."""

    @property
    def is_gone(self) -> bool:
        """Whether the holder is known to be dead."""
        return self.holder is not None and self.holder.is_gone()

    def may_be_alive(self, now: float) -> bool:
        """Return whether the holder must be assumed to be running."""
        return not self.is_gone and not is_quiet(self.modified, now)


@dataclass(frozen=True)
class SeenStep:
    """A folder with the records of a step."""

    path: str
    """Relative to the prefix, as are the paths of its files."""
    record: StepRecord
    lease: SeenLease | None
    files: tuple[FileEntry, ...]

    def name_of(self, entry: FileEntry) -> str:
        """Return the path of one of the step's files, relative to the step."""
        return entry.relative_path[len(self.path) + 1 :]

    def file(self, name: str) -> FileEntry | None:
        """Return the file with this path relative to the step; None if there is none."""
        return next((entry for entry in self.files if self.name_of(entry) == name), None)

    @property
    def outputs(self) -> list[FileEntry]:
        """Files that the step, or an attempt at it, wrote."""
        return [entry for entry in self.files if is_output(self.name_of(entry))]

    def may_be_in_use(self, now: float) -> bool:
        """Return whether a job may be working on the step."""
        return self.lease is not None and self.lease.may_be_alive(now)

    @property
    def is_changing(self) -> bool:
        """Whether a job wrote here after the listing and before the record was read, so that the two do not match."""
        found = {name: self.file(name) for name in (STATUS_FILE, LEASE_FILE)}
        versions = {name: entry.version if entry is not None else None for name, entry in found.items()}
        return any(self.record.versions.get(name) != version for name, version in versions.items())

    def shown_status(self, now: float) -> str | None:
        """Return the status as it is displayed; None if none is recorded."""
        record = self.record
        if record.unreadable_status is not None:
            return "UNKNOWN"
        if record.status is Status.RUNNING and not self.may_be_in_use(now):
            return f"{record.status} (abandoned)"
        if record.status is Status.SUCCESS and not record.done:
            return f"{record.status} (damaged)"
        return record.status

    def age_seconds(self, now: float) -> float | None:
        """Return the time since the status changed; None if it is unknown."""
        status = self.file(STATUS_FILE)
        return _since(status.modified, now) if status is not None else None


@dataclass(frozen=True)
class Survey:
    """Everything below a prefix."""

    prefix: str
    steps: tuple[SeenStep, ...]
    """Sorted by path."""
    others: tuple[FileEntry, ...]
    """Files that are not in a step's folder, relative to the prefix."""


def read_survey(prefix: str) -> Survey:
    """List everything below a prefix and read the record of each step.

    Raises:
        ConfigError: the prefix is empty, or is not a prefix.
        StorageError: the prefix cannot be read.
    """
    prefix = absolute(prefix)
    entries = list_files(prefix)
    if not entries:
        raise ConfigError(_empty_prefix_message(prefix))
    folders = {folder for entry in entries if (folder := _step_folder(entry.relative_path)) is not None}
    if "" in folders:
        raise ConfigError(f"{prefix!r} is the output path of one step. Pass its prefix, which is a folder above it.")
    files_of: dict[str, list[FileEntry]] = {folder: [] for folder in sorted(folders)}
    others: list[FileEntry] = []
    for entry in entries:
        files_of.get(_owner(entry.relative_path, folders), others).append(entry)
    watch = LeaseWatch(LeaseConfig())
    steps = in_parallel(lambda folder: _read_step(prefix, folder, files_of[folder], watch), files_of)
    return Survey(prefix, tuple(steps), tuple(others))


def _empty_prefix_message(prefix: str) -> str:
    what = "is a file or an empty folder" if exists(prefix) else "does not exist"
    return f"{prefix!r} {what}. Pass the folder or URL that an experiment used as its --prefix."


def _step_folder(relative_path: str) -> str | None:
    """Return the folder of the file if the file shows that it is a step's folder, otherwise None."""
    folder, _, name = relative_path.rpartition("/")
    return folder if name in (STATUS_FILE, INFO_FILE) and REPLAY_FOLDER not in folder.split("/") else None


def _owner(relative_path: str, folders: set[str]) -> str:
    """Return the nearest step's folder that contains a file; empty if there is none."""
    folder = relative_path.rpartition("/")[0]
    while folder and folder not in folders:
        folder = folder.rpartition("/")[0]
    return folder


def _read_step(prefix: str, folder: str, files: Sequence[FileEntry], watch: LeaseWatch) -> SeenStep:
    record = read_record(join(prefix, folder), watch)
    renewed = next((entry.modified for entry in files if entry.relative_path == join(folder, LEASE_FILE)), None)
    lease = SeenLease(record.lease.holder, renewed) if record.lease is not None else None
    return SeenStep(folder, record, lease, tuple(files))


def status_text(survey: Survey, now: float | None = None, *, as_json: bool) -> str:
    """Return the output of `status`."""
    now = time.time() if now is None else now
    if as_json:
        return json_document({"prefix": survey.prefix, "steps": [_step_json(step, now) for step in survey.steps]})
    if not survey.steps:
        return "No steps."
    sizes = aligned_right(["size", *(human_bytes(total_bytes(step.outputs)) for step in survey.steps)])
    header = ["step", "status", "age", "holder", "files", sizes[0]]
    rows = zip(survey.steps, sizes[1:], strict=True)
    return format_table(header, [_step_row(step, size, now) for step, size in rows])


def _step_row(step: SeenStep, size: str, now: float) -> list[str]:
    age = step.age_seconds(now)
    return [
        step.path,
        step.shown_status(now) or "-",
        human_age(age) if age is not None else "",
        _holder_text(step.lease, now) if step.lease is not None else "",
        f"{len(step.outputs):,}",
        size,
    ]


def _holder_text(lease: SeenLease, now: float) -> str:
    holder, beat = lease.holder, _since(lease.modified, now)
    who = f"pid {holder.pid} on host {holder.host_name}" if holder is not None else "an unreadable lease"
    return f"{who}, beat {human_age(beat)} ago" if beat is not None else who


def _step_json(step: SeenStep, now: float) -> Mapping[str, Any]:
    return {
        "step": step.path,
        "status": step.shown_status(now),
        "damage": step.record.manifest_problem if step.record.status is Status.SUCCESS else None,
        "age_seconds": step.age_seconds(now),
        "holder": _holder_json(step.lease, now) if step.lease is not None else None,
        "files": len(step.outputs),
        "bytes": total_bytes(step.outputs),
    }


def _holder_json(lease: SeenLease, now: float) -> Mapping[str, Any]:
    holder = lease.holder
    return {
        "run_id": holder.run_id if holder is not None else None,
        "host_name": holder.host_name if holder is not None else None,
        "pid": holder.pid if holder is not None else None,
        "is_gone": lease.is_gone,
        "beat_seconds": _since(lease.modified, now),
    }


def total_bytes(entries: Sequence[FileEntry]) -> int:
    """Return the total size of the files."""
    return sum(entry.num_bytes for entry in entries)


def _since(modified: float | None, now: float) -> float | None:
    """Return the seconds since `modified`. They are never negative: the store's clock may be ahead of ours."""
    return max(0.0, now - modified) if modified is not None else None


def human_age(seconds: float) -> str:
    """Return a time span in its largest unit: 14s, 3m, 2h, 5d."""
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "m")):
        if seconds >= unit:
            return f"{int(seconds // unit)}{name}"
    return f"{int(seconds)}s"


def human_bytes(num_bytes: int) -> str:
    """Return a size in its largest binary unit: 12 B, 1.5 KiB, 2.0 GiB."""
    if num_bytes < _KIB:
        return f"{num_bytes} B"
    size = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= _KIB
        if size < _KIB:
            return f"{size:.1f} {unit}"
    return f"{size / _KIB:.1f} TiB"


def aligned_right(cells: Sequence[str]) -> list[str]:
    """Return the cells of one column, padded to align right: tables do that only for bare numbers."""
    width = max(map(len, cells))
    return [cell.rjust(width) for cell in cells]
