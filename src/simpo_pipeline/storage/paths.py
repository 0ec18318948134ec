"""Paths as strings: a local path or any fsspec URL (`gs://bucket/folder`). Nothing here accesses storage.

`pathlib` must not be used for paths that may be URLs: `Path("gs://b")` is the local folder `gs:/b`.
"""

import os
import re

from simpo_pipeline.errors import ConfigError, StorageError

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_FILE_SCHEMES = ("file://", "local://")
_COLLAPSED_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def is_local(path: str) -> bool:
    """Return whether the path is on a file system of this machine."""
    return path.startswith(_FILE_SCHEMES) or not _URL.match(path)


def strip_file_scheme(path: str) -> str:
    """Return the path without `file://` or `local://`. Any other path is returned unchanged."""
    for scheme in _FILE_SCHEMES:
        if path.startswith(scheme):
            return path[len(scheme) :]
    return path


def join(base: str, *parts: str) -> str:
    """Return the path of `parts` under `base`, with one slash between parts. Empty parts are skipped.

    Raises:
        StorageError: A part is absolute, so the result would not be under `base`.
    """
    joined = base
    for part in parts:
        if part.startswith("/") or _URL.match(part):
            raise StorageError(f"Cannot join {part!r} to {joined!r}: a part must be relative. Remove its leading part.")
        if part:
            joined = f"{joined}{part}" if joined.endswith("/") or not joined else f"{joined}/{part}"
    return joined


def is_relative(path: str) -> bool:
    """Return whether the path is local and depends on the working directory."""
    return is_local(path) and not strip_file_scheme(path).startswith("/")


def absolute(path: str) -> str:
    """Return the path in a form that does not depend on the working directory, without a trailing slash.

    Raises:
        ConfigError: The path is a URL that lost a slash (`gs:/bucket`) and would become a local folder of that name, or
            a `gs://` URL without a bucket.
    """
    if _COLLAPSED_URL.match(path):
        fixed = path.replace(":/", "://", 1)
        raise ConfigError(f"{path!r} is a URL that lost a slash. Write {fixed!r} (do not pass URLs through pathlib).")
    if is_local(path):
        return os.path.abspath(strip_file_scheme(path))
    rest = path.split("://", 1)[1]
    if path.startswith(("gs://", "gcs://")) and (not rest or rest.startswith("/")):
        raise ConfigError(f"{path!r} names no bucket. Write gs://bucket/path.")
    return path.rstrip("/") if rest.strip("/") else path


def parent(path: str) -> str:
    """Return the folder that contains the path."""
    return path.rstrip("/").rsplit("/", 1)[0]


def base_name(path: str) -> str:
    """Return the last part of the path."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def user_cache_folder(name: str = "") -> str:
    """Return the folder `name` of the per-user cache of this project on this machine. It can be deleted at any time."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(caches, "simpo_pipeline", name)
