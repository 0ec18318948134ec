"""Google Cloud Storage: its JSON API, through the session, credentials and retries of gcsfs.

gcsfs itself has neither conditional replacement nor conditional removal, and sends two requests for some listings.
Reference: https://cloud.google.com/storage/docs/json_api/v1/objects and .../docs/request-preconditions
"""

import base64
import json
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple, cast, final
from urllib.parse import quote

from simpo_pipeline.errors import StorageError
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.filesystem import filesystem_of
from simpo_pipeline.storage.remote_store import RemoteStore

_LISTED = "nextPageToken,prefixes,items(name,size,crc32c,generation,updated)"
_WRITE_ID = "write-id"
_ABSENT = "0"
_REQUEST_SECONDS = 30.0
"""Timeout of the requests of this module, which are small. Without it, a half-open connection would block a heartbeat
indefinitely."""


class _Location(NamedTuple):
    filesystem: Any
    bucket: str
    key: str

    @property
    def folder_prefix(self) -> str:
        """The prefix of the names of all objects below this folder."""
        return f"{self.key.rstrip('/')}/" if self.key else ""


def _locate(path: str) -> _Location:
    filesystem, inner_path = filesystem_of(path, requests_timeout=_REQUEST_SECONDS)
    bucket, key, _ = cast(Any, filesystem).split_path(inner_path)
    return _Location(cast(Any, filesystem), bucket, key)


@final
class GcsStore(RemoteStore):
    """See Store. A version is the generation of an object."""

    has_conditional_writes = True

    def list_files(self, path: str) -> list[FileEntry]:
        """See Store.list_files. One request returns up to 1,000 objects."""
        location = _locate(path)
        start = location.folder_prefix
        return [
            _entry(item, item["name"][len(start) :])
            for page in _pages(location, start, None)
            for item in page.get("items", [])
            if item["name"] != start
        ]

    def list_names(self, path: str) -> list[str]:
        location = _locate(path)
        start = location.folder_prefix
        names: set[str] = set()
        for page in _pages(location, start, "/"):
            names.update(item["name"] for item in page.get("items", []))
            names.update(page.get("prefixes", []))
        return [name[len(start) :].rstrip("/") for name in names if name != start]

    def read_version(self, path: str) -> tuple[bytes, str]:
        location = _locate(path)
        headers, content = location.filesystem.call("GET", "b/{}/o/{}", location.bucket, location.key, alt="media")
        generation = headers.get("x-goog-generation")
        if generation is None:
            raise StorageError(f"The response for {path!r} has no generation. Is there a proxy in front of the bucket?")
        return content, generation

    def write_version(self, path: str, data: bytes, expected: str | None) -> str | None:
        """See Store.write_version.

        If the response to a write is lost, gcsfs repeats the request, which then fails its precondition. The write is
        recognized by the id that it left in the metadata of the object.
        """
        location = _locate(path)
        write_id = uuid.uuid4().hex
        # Without "no-store", caches may serve an old version of a publicly readable object for an hour.
        resource = json.dumps({"name": location.key, "metadata": {_WRITE_ID: write_id}, "cacheControl": "no-store"})
        body = (
            f"--{write_id}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{resource}\r\n"
            f"--{write_id}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode()
        url = location.filesystem.base.replace("/storage/v1/", "/upload/storage/v1/")
        try:
            written = location.filesystem.call(
                "POST",
                f"{url}b/{quote(location.bucket, safe='')}/o",
                uploadType="multipart",
                ifGenerationMatch=expected or _ABSENT,
                headers={"Content-Type": f'multipart/related; boundary="{write_id}"'},
                data=body + data + f"\r\n--{write_id}--".encode(),
                json_out=True,
            )
        except FileExistsError:  # how gcsfs reports 412, precondition failed
            return _generation_if_ours(location, write_id)
        except FileNotFoundError:
            if expected is None:
                raise  # the bucket does not exist
            return None
        return str(written["generation"])

    def remove_version(self, path: str, expected: str) -> bool:
        """See Store.remove_version. A missing object counts as removed: a repeated request may have removed it."""
        location = _locate(path)
        try:
            location.filesystem.call("DELETE", "b/{}/o/{}", location.bucket, location.key, ifGenerationMatch=expected)
        except FileExistsError:
            return False
        except FileNotFoundError:
            return True
        return True


def _pages(location: _Location, prefix: str, delimiter: str | None) -> Iterator[dict[str, Any]]:
    token: str | None = None
    while True:
        page = location.filesystem.call(
            "GET",
            "b/{}/o",
            location.bucket,
            prefix=prefix,
            delimiter=delimiter,
            pageToken=token,
            fields=_LISTED,
            json_out=True,
        )
        yield page
        token = page.get("nextPageToken")
        if token is None:
            return


def _entry(item: dict[str, Any], relative_path: str) -> FileEntry:
    return FileEntry(
        relative_path,
        int(item["size"]),
        base64.b64decode(item["crc32c"]).hex(),
        str(item["generation"]),
        datetime.fromisoformat(item["updated"]).timestamp(),
    )


def _generation_if_ours(location: _Location, write_id: str) -> str | None:
    try:
        found = location.filesystem.call("GET", "b/{}/o/{}", location.bucket, location.key, json_out=True)
    except FileNotFoundError:
        return None
    return str(found["generation"]) if found.get("metadata", {}).get(_WRITE_ID) == write_id else None
