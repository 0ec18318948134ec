"""Comparison of the source of step functions with what the records of finished steps say about it."""

from typing import Any, cast

from simpo_pipeline.errors import StorageError
from simpo_pipeline.executor.records.code import SourceFingerprints
from simpo_pipeline.executor.records.status import CODE_FILE
from simpo_pipeline.storage.checksum import crc32c_of_bytes
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.files import json_bytes, read_json
from simpo_pipeline.storage.paths import join


class CodeComparison:
    """Compares the source of step functions with their records.

    Where listings have checksums, as on Google Cloud Storage, a record is read only if it differs from what the source
    now would give, and equal records are read once.
    """

    def __init__(self) -> None:
        self._fingerprints = SourceFingerprints()
        self._records: dict[FileEntry, Any] = {}

    def changed_modules(self, output_path: str, listed: FileEntry | None, function: Any) -> tuple[str, ...]:
        """Return the modules of a step function whose source changed since the step ran.

        None changed if the record or the source is unknown.

        Args:
            output_path: Where the step's record is.
            listed: The record, as a listing of the output path shows it. None if there is none.
            function: The step function.
        """
        now = self._fingerprints.of(function)
        if listed is None or not now:
            return ()
        expected = json_bytes(now)
        if (listed.num_bytes, listed.crc32c) == (len(expected), crc32c_of_bytes(expected)):
            return ()
        then = self._read(output_path, listed)
        return tuple(sorted(name for name in {*then, *now} if then.get(name) != now.get(name))) if then else ()

    def _read(self, output_path: str, listed: FileEntry) -> dict[str, Any]:
        if listed.crc32c is not None and listed in self._records:
            return self._records[listed]
        try:
            recorded = read_json(join(output_path, CODE_FILE))
        except StorageError:
            recorded = None  # the comparison is only shown, so no plan depends on it
        found = cast(dict[str, Any], recorded) if isinstance(recorded, dict) else {}
        self._records[listed] = found
        return found


def with_changed_code(reason: str, step_name: str, modules: tuple[str, ...]) -> str:
    """Return the reason why a step does not run, with the modules that changed, if any."""
    if not modules:
        return reason
    return f"{reason}; code changed since it ran ({', '.join(modules)}): --force {step_name} runs it again"
