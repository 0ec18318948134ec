"""Storage of the emulator with preconditions, exact generations and repeatable uploads.

References: https://cloud.google.com/storage/docs/request-preconditions, .../docs/json_api/v1/objects and, for details
that these pages do not specify, the test bench of Google, https://github.com/googleapis/storage-testbench.
"""

import dataclasses
import datetime
import json
import time
import uuid
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import RESUMABLE_DIR, Storage

_CONDITIONS = {
    "ifGenerationMatch": ("generation", True),
    "ifGenerationNotMatch": ("generation", False),
    "ifMetagenerationMatch": ("metageneration", True),
    "ifMetagenerationNotMatch": ("metageneration", False),
}
_REASONS = {400: "invalid", 404: "notFound", 412: "conditionNotMet", 416: "requestedRangeNotSatisfiable"}
_REASONS |= {429: "rateLimitExceeded", 500: "backendError", 503: "backendError"}


@dataclasses.dataclass
class Answer:
    status: int
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""


def json_answer(value: object, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(value).encode())


def error_answer(status: int, message: str) -> Answer:
    """Return an error with the JSON body that Google Cloud Storage sends."""
    error: dict[str, str] = {"message": message, "domain": "global", "reason": _REASONS[status]}
    if status == 412:
        error |= {"locationType": "header", "location": "If-Match"}
    return json_answer({"error": {"code": status, "message": message, "errors": [error]}}, status)


class Refused(Exception):
    """The request is refused, with this answer."""

    def __init__(self, answer: Answer):
        super().__init__(answer.status)
        self.answer = answer


def require(query: dict[str, str], current: dict[str, Any] | None) -> None:
    """Raise Refused unless all conditions of a request hold for the live object.

    If `current` is None, there is no live object, and its generation counts as 0.
    """
    for condition, (field, wants_equal) in _CONDITIONS.items():
        if condition not in query:
            continue
        equal = int(query[condition]) == (int(current[field]) if current else 0)
        if wants_equal and not equal:
            message = "At least one of the pre-conditions you specified did not hold."
            raise Refused(error_answer(412, message))
        if not wants_equal and (equal or current is None):
            raise Refused(Answer(304))


class ExactStorage(Storage):
    """Storage that checks conditions when it creates objects, numbers generations, and keeps no deleted objects."""

    def __init__(self, bucket: str):
        super().__init__(use_memory_fs=True)
        self.conditions: dict[str, str] = {}
        """Conditions of the request that is being executed."""
        self.sessions: dict[str, dict[str, str]] = {}
        """The conditions of each resumable upload, from the request that started it."""
        self.finished: dict[str, dict[str, Any]] = {}
        """The object that each finished resumable upload created."""
        self._last_generation = 0
        buckets.create_bucket(bucket, self)

    def live(self, bucket: str, name: str) -> dict[str, Any] | None:
        return self.objects.get(bucket, {}).get(name)

    def _write_config_to_file(self):
        """Do nothing: no data outlives this process, and writing all metadata at each change takes longer each time."""

    def create_file(self, bucket_name, file_name, content, file_obj, file_id=None):
        require(self.sessions[file_id] if file_id else self.conditions, self.live(bucket_name, file_name))
        self._last_generation = max(time.time_ns() // 1000, self._last_generation + 1)
        now = _now()
        file_obj |= {
            "id": f"{bucket_name}/{file_name}/{self._last_generation}",
            "generation": str(self._last_generation),
            "metageneration": "1",
            "size": str(len(content)),
            "timeCreated": now,
            "updated": now,
            "mediaLink": f"{file_obj['mediaLink'].partition('?')[0]}?generation={self._last_generation}&alt=media",
        }
        super().create_file(bucket_name, file_name, content, file_obj, file_id)
        if file_id:
            self.finished[file_id] = dict(file_obj)

    def patch_object(self, bucket_name, file_name, file_obj):
        file_obj["updated"] = _now()
        super().patch_object(bucket_name, file_name, file_obj)

    def delete_file(self, bucket_name, file_name):
        self._hard_delete_file(bucket_name, file_name)

    def create_resumable_upload(self, bucket_name, file_name, file_obj):
        if bucket_name not in self.buckets:
            raise NotFound
        # The ids of the emulator are times, but two uploads of one object may start at the same time.
        upload_id = uuid.uuid4().hex
        self.resumable[upload_id] = file_obj
        self.sessions[upload_id] = self.conditions
        return upload_id

    def add_to_resumable_upload(self, file_id, content, total_size=None, expected_start=None):
        received = self.get_resumable_byte_count(file_id)
        if expected_start is not None and expected_start < received:
            # For a repeated chunk, the service ignores the bytes that it already has.
            content, expected_start = content[received - expected_start :], received
        return super().add_to_resumable_upload(file_id, content, total_size, expected_start)

    def cancel_resumable_upload(self, upload_id: str) -> bool:
        self._delete_file(RESUMABLE_DIR, self.safe_id(upload_id))
        return self.resumable.pop(upload_id, None) is not None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
