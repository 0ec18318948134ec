"""Execution of requests, by the routes of the emulator or here where the emulator differs from the real service."""

import base64
import io
import re
import threading
from bisect import bisect_right
from http import HTTPStatus
from typing import Any

from calls import Call
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.storage import Storage
from preconditions import Answer, ExactStorage, Refused, error_answer, json_answer, require

PAGE = 1000


class _Connection:
    """A request and its answer in memory, with the interface that the router of the emulator expects."""

    def __init__(self, call: Call, storage: Storage, server: object):
        self.call = call
        self.path, self.headers, self.storage, self.server = call.url, call.headers, storage, server
        self.rfile, self.wfile = io.BytesIO(call.body), io.BytesIO()
        self.answer = Answer(0)

    def send_response(self, code: int, phrase: str) -> None:
        self.answer.status = code

    def send_header(self, key: str, value: str) -> None:
        if key != "Content-Length":
            self.answer.headers[key] = value

    def end_headers(self) -> None:
        pass


_read_data_of_emulator = emulator._read_data


def _read_data(connection: _Connection, query: dict[str, list[str]]) -> Any:
    """Return the body for the handlers of the emulator, which otherwise misread an object that is JSON or empty."""
    call = connection.call
    if call.parts is not None:
        return call.parts
    if call.query.get("uploadType") == "media" or call.upload_id is not None:
        return call.body
    return _read_data_of_emulator(connection, query)


emulator._read_data = _read_data


class Service:
    """Service that executes one request at a time, so that a check and the change that depends on it are atomic."""

    def __init__(self, bucket: str):
        self.storage = ExactStorage(bucket)
        self.lock = threading.Lock()

    def name_of_upload(self, upload_id: str | None) -> str:
        """Return the name of the object of a resumable upload, or an empty string if the upload is unknown."""
        with self.lock:
            found = self.storage.resumable.get(upload_id) or self.storage.finished.get(upload_id or "") or {}
        return found.get("name", "")

    def objects(self, bucket: str, prefix: str) -> list[dict[str, Any]]:
        with self.lock:
            return self.storage.get_file_list(bucket, prefix)[0]

    def content(self, bucket: str, name: str) -> bytes | None:
        with self.lock:
            return self.storage.get_file(bucket, name) if self.storage.live(bucket, name) else None

    def perform(self, call: Call, server: object) -> Answer:
        with self.lock:
            try:
                return self._perform(call, server)
            except Refused as refused:
                return refused.answer
            except Exception as error:
                # Not 500, because clients retry that for half a minute before they show it.
                return error_answer(400, f"The test server failed at {call.method} {call.url}: {error!r}")

    def _perform(self, call: Call, server: object) -> Answer:
        if call.upload_id is not None:
            return self._continue_upload(call, call.upload_id, server)
        if call.kind == "list":
            return self._list(call)
        if call.kind not in ("get", "media", "delete", "patch"):
            return self._emulate(call, server)
        current = self.storage.live(call.bucket, call.name)
        if current is None or call.query.get("generation", current["generation"]) != current["generation"]:
            raise Refused(error_answer(404, f"No such object: {call.bucket}/{call.name}"))
        require(call.query, current)
        if call.kind == "media":
            return self._read(call, current, server)
        answer = self._emulate(call, server)
        return Answer(204) if call.kind == "delete" else answer

    def _emulate(self, call: Call, server: object) -> Answer:
        self.storage.conditions = call.query
        connection = _Connection(call, self.storage, server)
        emulator.Router(connection).handle(call.method)
        answer = connection.answer
        answer.body = connection.wfile.getvalue()
        if answer.status == HTTPStatus.NOT_IMPLEMENTED:
            raise Refused(error_answer(400, f"The test server does not know {call.method} {call.url}."))
        if answer.status == HTTPStatus.NOT_FOUND and not answer.body:
            raise Refused(error_answer(404, "The specified bucket, object or upload does not exist."))
        return answer

    def _continue_upload(self, call: Call, upload_id: str, server: object) -> Answer:
        if call.method == "DELETE":
            found = self.storage.cancel_resumable_upload(upload_id)
            return Answer(499) if found else error_answer(404, "No such upload.")
        if upload_id in self.storage.finished:
            return json_answer(self.storage.finished[upload_id])
        return self._emulate(call, server)

    def _read(self, call: Call, current: dict[str, Any], server: object) -> Answer:
        size = int(current["size"])
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", str(call.headers.get("Range", "")).strip())
        if wanted and not wanted[1]:
            # The emulator does not support a range of the last N bytes.
            call.headers.replace_header("Range", f"bytes={max(size - int(wanted[2]), 0)}-")
        elif wanted and int(wanted[1]) >= size:
            raise Refused(error_answer(416, "Request range not satisfiable"))
        answer = self._emulate(call, server)
        answer.headers |= {
            "X-Goog-Generation": current["generation"],
            "X-Goog-Metageneration": current["metageneration"],
            "X-Goog-Stored-Content-Length": current["size"],
            "X-Goog-Hash": f"crc32c={current['crc32c']},md5={current['md5Hash']}",
        }
        return answer

    def _list(self, call: Call) -> Answer:
        query = call.query
        wanted = (query.get("prefix"), query.get("delimiter"), query.get("matchGlob"))
        try:
            objects, prefixes = self.storage.get_file_list(call.bucket, *wanted)
        except NotFound:
            raise Refused(error_answer(404, "The specified bucket does not exist.")) from None
        entries: dict[str, dict[str, Any] | None] = {item["name"]: item for item in objects}
        entries |= dict.fromkeys(prefixes)
        names = sorted(entries)
        start = bisect_right(names, base64.urlsafe_b64decode(query.get("pageToken", "")).decode())
        page = names[start : start + min(int(query.get("maxResults", PAGE)), PAGE)]
        answer: dict[str, Any] = {
            "kind": "storage#objects",
            "prefixes": [name for name in page if entries[name] is None],
            "items": [entries[name] for name in page if entries[name] is not None],
        }
        # The service omits an empty list.
        answer = {key: value for key, value in answer.items() if value}
        if page and page[-1] != names[-1]:
            answer["nextPageToken"] = base64.urlsafe_b64encode(page[-1].encode()).decode()
        return json_answer(answer)
