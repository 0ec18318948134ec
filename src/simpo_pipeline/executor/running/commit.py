"""The executor's own files at the output path of a step that this job runs. Only the holder of the lease writes them.

A holder can lose its lease while it is frozen between a read and a write. So every write names the version that it
replaces. The next holder starts by writing RUNNING. From then on the store itself refuses the former holder's SUCCESS,
manifest and info, however late they arrive, because they name older versions.
"""

from collections.abc import Mapping
from typing import Any

from simpo_pipeline.executor.records.lease import LeaseKeeper
from simpo_pipeline.executor.records.status import (
    CODE_FILE,
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
    """Records of one attempt at one output path, whose lease this job holds."""

    def __init__(self, output_path: str, files: ConditionalFiles, leases: LeaseKeeper):
        self._output_path = output_path
        self._files = files
        self._leases = leases
        self._lease_path = join(output_path, LEASE_FILE)
        self._versions: dict[str, str | None] = {}
        self.has_checkpoints = False

    def adopt(self, record: StepRecord) -> None:
        """Start from the versions that were just read at the output path."""
        self._versions = {
            name: version if version is not None else self._files.version_of(join(self._output_path, name))
            for name, version in record.versions.items()
        }

    def try_status(self, token: Status) -> bool:
        """Record the token if the status is as it was last seen. Return False if another writer changed it."""
        return self._try(STATUS_FILE, token.value.encode())

    def put_status(self, token: Status) -> None:
        """Record the token.

        Raises:
            LeaseLostError: another job now holds the output path.
        """
        self._put(STATUS_FILE, token.value.encode())

    def put_info(self, info: Mapping[str, Any]) -> None:
        """Record what ran."""
        self._put(INFO_FILE, json_bytes(info))

    def put_code(self, fingerprints: Mapping[str, str]) -> None:
        """Record the fingerprints of the source that ran."""
        self._put(CODE_FILE, json_bytes(fingerprints))

    def put_manifest(self) -> None:
        """Write the size and checksum of every output file to the manifest, and set `has_checkpoints`."""
        entries = list_files(self._output_path)
        self.has_checkpoints = any(is_of_checkpoint(entry.relative_path) for entry in entries)
        self._put(MANIFEST_FILE, manifest_bytes(outputs_among(self._output_path, entries)))

    def put_error(self, error: Mapping[str, Any]) -> None:
        """Record which processes failed, and how."""
        self._put(ERROR_FILE, json_bytes(error))

    def remove_error(self) -> None:
        """Remove the error file of an earlier attempt."""
        version = self._versions.pop(ERROR_FILE, None)
        if version is not None:
            self._files.remove(join(self._output_path, ERROR_FILE), version)

    def _put(self, name: str, data: bytes) -> None:
        """Overwrite a file. While this job holds the lease, only a former holder's late write can come in between."""
        while not self._try(name, data):
            # Read the version before confirming the lease, so that the next holder's file is never overwritten.
            self._versions[name] = self._files.version_of(join(self._output_path, name))
            self._leases.confirm(self._lease_path)

    def _try(self, name: str, data: bytes) -> bool:
        version = self._files.replace(join(self._output_path, name), self._versions.get(name), data)
        if version is not None:
            self._versions[name] = version
        return version is not None
