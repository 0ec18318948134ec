"""The record `.executor_info` beside the outputs of a step.

Flags, commands and configs are redacted, best effort (see secrets.py). Versioned values are stored as they are, because
a later plan compares them: never version a secret.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from simpo_pipeline.errors import StorageError
from simpo_pipeline.executor.records.holder import utc_now
from simpo_pipeline.executor.records.provenance import Provenance
from simpo_pipeline.executor.records.status import INFO_FILE
from simpo_pipeline.storage.files import read_bytes
from simpo_pipeline.storage.paths import join


@dataclass(frozen=True)
class Ended:
    """Result of a run of a step that succeeded."""

    seconds: float
    live_digest: str | None


def info_record(
    info: Mapping[str, Any], run_id: str, provenance: Provenance, started: str, ended: Ended | None
) -> dict[str, Any]:
    """Return the content of `.executor_info` for a running step or, with `ended`, for a step that succeeded."""
    record: dict[str, Any] = {**info, "run_id": run_id, **provenance.as_json(), "created_date": started}
    if ended is not None:
        record |= {"finished_date": utc_now(), "seconds": ended.seconds, "live_digest": ended.live_digest}
    return record


def read_info(output_path: str) -> dict[str, Any]:
    """Read the record next to the outputs.

    Raises:
        PathNotFoundError: No step ran there.
        StorageError: The record is damaged.
    """
    path = join(output_path, INFO_FILE)
    data = read_bytes(path)
    try:
        info = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{path!r} is not valid JSON ({error}). Remove the step's status to run it again."
        ) from error
    if not isinstance(info, dict):
        raise StorageError(f"{path!r} is not a JSON object. Remove the step's status to run it again.")
    return cast(dict[str, Any], info)
