"""The executor's own files at the output path of a step that this job runs: written by the lease's holder alone.

A lease can be lost while its holder is frozen between looking and writing. So every write names the version it goes
over. The next holder begins by writing RUNNING; from then on the former one's SUCCESS, manifest and info, which name
older versions, are refused by the store itself, however late they come.
"""

from collections.abc import Mapping
from typing import Any

from simpo_pipeline.executor.records.lease import LeaseKeeper
from simpo_pipeline.executor.records.status import (
    ERROR_FILE,
    INFO_FILE,
    LEASE_FILE,
    MANIFEST_FILE,
    STATUS_FILE,
    Status,
    StepRecord,
    is_of_checkpoint,
    manifest_bytes,
    outputs_among,
)
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.files import json_bytes, list_files
from simpo_pipeline.storage.paths import join


class StepFiles:
    """The records of one attempt at one output path, whose lease this job holds."""

    def __init__(self, output_path: str, files: ConditionalFiles, leases: LeaseKeeper):
        self._output_path = output_path
        self._files = files
        self._leases = leases
        self._lease_path = join(output_path, LEASE_FILE)
        self._versions: dict[str, str | None] = {}
        self.has_checkpoints = False

    def adopt(self, record: StepRecord) -> None:
        """Start from what was just seen at the output path."""
        self._versions = {
            name: version if version is not None else self._files.version_of(join(self._output_path, name))
            for name, version in record.versions.items()
        }

    def try_status(self, token: Status) -> bool:
        """Record the token if the status is as it was last seen; False when someone else wrote it meanwhile."""
        return self._try(STATUS_FILE, token.value.encode())

    def put_status(self, token: Status) -> None:
        """Record the token.

        Raises:
            LeaseLostError: another job holds the output path now.
        """
        self._put(STATUS_FILE, token.value.encode())

    def put_info(self, info: Mapping[str, Any]) -> None:
        """Record what ran."""
        self._put(INFO_FILE, json_bytes(info))

    def put_manifest(self) -> None:
        """List every output file with its size and checksum; from then on it is known whether there are checkpoints."""
        entries = list_files(self._output_path)
        self.has_checkpoints = any(is_of_checkpoint(entry.relative_path) for entry in entries)
        self._put(MANIFEST_FILE, manifest_bytes(outputs_among(self._output_path, entries)))

    def put_error(self, error: Mapping[str, Any]) -> None:
        """Record who failed, and how."""
        self._put(ERROR_FILE, json_bytes(error))

    def remove_error(self) -> None:
        """Remove the error of an earlier attempt."""
        version = self._versions.pop(ERROR_FILE, None)
        if version is not None:
            self._files.remove(join(self._output_path, ERROR_FILE), version)

    def _put(self, name: str, data: bytes) -> None:
        """Write over what is there; as long as the lease is ours, what came between is a former holder's last word."""
        while not self._try(name, data):
            # Looked up before the lease is confirmed: what the next holder writes must never be gone over.
            self._versions[name] = self._files.version_of(join(self._output_path, name))
            self._leases.confirm(self._lease_path)

    def _try(self, name: str, data: bytes) -> bool:
        version = self._files.replace(join(self._output_path, name), self._versions.get(name), data)
        if version is not None:
            self._versions[name] = version
        return version is not None
