"""Google Cloud Storage's JSON API, through the session, credentials and retries of gcsfs.

gcsfs itself offers neither conditional replacement nor conditional removal, and asks twice for some listings.
Reference: https://cloud.google.com/storage/docs/json_api/v1/objects and .../docs/request-preconditions
"""

import base64
import json
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple, cast
from urllib.parse import quote

from simpo_pipeline.errors import StorageError
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.filesystem import filesystem_of, storage_border

_SCHEMES = ("gs", "gcs")
_LISTED = "nextPageToken,prefixes,items(name,size,crc32c,generation,updated)"
_WRITE_ID = "write-id"
_ABSENT = "0"
_REQUEST_SECONDS = 30.0
"""These requests are small. Without a limit, a connection that is half open would keep a heartbeat waiting for ever."""


class _Place(NamedTuple):
    filesystem: Any
    bucket: str
    key: str


def is_gcs(path: str) -> bool:
    """Whether the path lies in a bucket of Google Cloud Storage."""
    return path.split("://", 1)[0] in _SCHEMES and "://" in path


def _place(path: str) -> _Place:
    filesystem, inner_path = filesystem_of(path, requests_timeout=_REQUEST_SECONDS)
    bucket, key, _ = cast(Any, filesystem).split_path(inner_path)
    return _Place(cast(Any, filesystem), bucket, key)


def list_objects(path: str) -> list[FileEntry]:
    """All objects below a folder, at any depth; one request for each 1,000."""
    place = _place(path)
    start = f"{place.key.rstrip('/')}/" if place.key else ""
    with storage_border("list", path):
        return [
            _entry(item, item["name"][len(start) :])
            for page in _pages(place, start, None)
            for item in page.get("items", [])
            if item["name"] != start
        ]


def list_object_names(path: str) -> list[str]:
    """The names directly inside a folder, objects and folders alike."""
    place = _place(path)
    start = f"{place.key.rstrip('/')}/" if place.key else ""
    names: set[str] = set()
    with storage_border("list", path):
        for page in _pages(place, start, "/"):
            names.update(item["name"] for item in page.get("items", []))
            names.update(page.get("prefixes", []))
    return [name[len(start) :].rstrip("/") for name in names if name != start]


def _pages(place: _Place, prefix: str, delimiter: str | None) -> Iterator[dict[str, Any]]:
    token: str | None = None
    while True:
        page = place.filesystem.call(
            "GET",
            "b/{}/o",
            place.bucket,
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


def read_object(path: str) -> tuple[bytes, str]:
    """The content of an object and its generation.

    Raises:
        PathNotFoundError: there is no such object.
    """
    place = _place(path)
    with storage_border("read", path):
        headers, content = place.filesystem.call("GET", "b/{}/o/{}", place.bucket, place.key, alt="media")
        generation = headers.get("x-goog-generation")
    if generation is None:
        raise StorageError(f"The answer for {path!r} names no generation; is a proxy between here and the bucket?")
    return content, generation


def write_object(path: str, data: bytes, expected: str | None) -> str | None:
    """Put `data` at `path` if its generation is `expected` (None: if nothing is there).

    Returns:
        The new generation; None if the object is not as expected. A write whose answer was lost, and which gcsfs
        therefore repeated, is recognised by the id it left in the object's metadata.
    """
    place = _place(path)
    write_id = uuid.uuid4().hex
    # Of publicly readable objects caches may else show an old version for an hour.
    resource = json.dumps({"name": place.key, "metadata": {_WRITE_ID: write_id}, "cacheControl": "no-store"})
    body = (
        f"--{write_id}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{resource}\r\n"
        f"--{write_id}\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode()
    url = place.filesystem.base.replace("/storage/v1/", "/upload/storage/v1/")
    with storage_border("write", path):
        try:
            written = place.filesystem.call(
                "POST",
                f"{url}b/{quote(place.bucket, safe='')}/o",
                uploadType="multipart",
                ifGenerationMatch=expected or _ABSENT,
                headers={"Content-Type": f'multipart/related; boundary="{write_id}"'},
                data=body + data + f"\r\n--{write_id}--".encode(),
                json_out=True,
            )
        except FileExistsError:  # gcsfs's word for 412, precondition failed
            return _generation_if_ours(place, write_id)
        except FileNotFoundError:
            if expected is None:
                raise  # there is no such bucket
            return None
    return str(written["generation"])


def _generation_if_ours(place: _Place, write_id: str) -> str | None:
    try:
        there = place.filesystem.call("GET", "b/{}/o/{}", place.bucket, place.key, json_out=True)
    except FileNotFoundError:
        return None
    return str(there["generation"]) if there.get("metadata", {}).get(_WRITE_ID) == write_id else None


def remove_object(path: str, expected: str) -> bool:
    """Remove the object if its generation is `expected`; False when another one is there.

    An object that is gone counts as removed: a repeated request cannot tell who removed it.
    """
    place = _place(path)
    with storage_border("remove", path):
        try:
            place.filesystem.call("DELETE", "b/{}/o/{}", place.bucket, place.key, ifGenerationMatch=expected)
        except FileExistsError:
            return False
        except FileNotFoundError:
            return True
    return True
