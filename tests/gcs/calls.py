"""Parsing of a request: the kind of operation, the object, the conditions and the parts of the body."""

import json
import re
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_ROUTE = re.compile(
    r"(?P<api>/storage/v1|/upload/storage/v1|/download/storage/v1)/b/(?P<bucket>[^/]+)/o"
    r"(/(?P<name>.+?)(/compose|/(copyTo|rewriteTo)/b/(?P<to_bucket>[^/]+)/o/(?P<to_name>.+))?)?"
)
_CHANGES = {"DELETE": "delete", "PATCH": "patch", "POST": "insert"}


@dataclass
class Call:
    """One request, completely read."""

    method: str
    url: str
    headers: Message
    body: bytes
    query: dict[str, str]
    kind: str
    """"list", "get", "media", "insert", "delete", "patch" or "other"; copies count as "insert"."""
    bucket: str
    name: str
    """Name of the object that is read or written, or the prefix of a listing."""
    parts: dict[str, Any] | None
    """Parts of a multipart upload, in the form that the handlers of the emulator take."""

    @property
    def upload_id(self) -> str | None:
        return self.query.get("upload_id")


def parse_call(method: str, url: str, headers: Message, body: bytes) -> Call:
    path = urlsplit(url).path
    query = {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()}
    match = _ROUTE.fullmatch(path)
    parts = None
    if query.get("uploadType") == "multipart":
        parts = _multipart(str(headers.get("Content-Type", "")), body)
    if match is None:
        return Call(method, url, headers, body, query, "other", "", unquote(path), parts)
    kind = _kind(method, match["api"], match["name"], query)
    bucket = unquote(match["to_bucket"] or match["bucket"])
    return Call(method, url, headers, body, query, kind, bucket, _name(match, query, body, parts), parts)


def _kind(method: str, api: str, name: str | None, query: dict[str, str]) -> str:
    if api.startswith("/upload"):
        return "insert" if method in ("POST", "PUT") else "other"
    if method == "GET" and name is None:
        return "list"
    if method == "GET":
        return "media" if api.startswith("/download") or query.get("alt") == "media" else "get"
    return _CHANGES.get(method, "other") if name is not None else "other"


def _name(match: re.Match[str], query: dict[str, str], body: bytes, parts: dict[str, Any] | None) -> str:
    in_path = match["to_name"] or match["name"]
    if in_path is not None:
        return unquote(in_path)
    if match["api"] == "/storage/v1":
        return query.get("prefix", "")
    if "name" in query:
        return query["name"]
    if parts is not None:
        return parts["meta"].get("name", "")
    starts_session = query.get("uploadType") == "resumable" and "upload_id" not in query
    return json.loads(body).get("name", "") if starts_session and body else ""


def _multipart(content_type: str, body: bytes) -> dict[str, Any]:
    """Parse a multipart body.

    The parser of the emulator drops a final carriage return of the data when lines end as those of gcsfs.
    """
    header = Message()
    header["Content-Type"] = content_type
    mark = b"--" + str(header.get_param("boundary")).encode()
    newline = b"\r\n" if body.startswith(mark + b"\r\n") else b"\n"
    _, resource, media, *_ = (newline + body).split(newline + mark)
    media_head, _, content = media.partition(2 * newline)
    return {
        "meta": json.loads(resource.partition(2 * newline)[2]),
        "content": content,
        "content-type": message_from_bytes(media_head.removeprefix(newline)).get_content_type(),
    }
