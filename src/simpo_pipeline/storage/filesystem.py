"""The one border to fsspec: which file system serves a path, and what its failures become.

Beyond this file nobody sees fsspec, gcsfs or a raw OSError from them; they see `StorageError`.
"""

import io
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import fsspec.core  # pyright: ignore[reportMissingTypeStubs]

from simpo_pipeline.errors import PathNotFoundError, SimpoPipelineError, StorageError


@runtime_checkable
class FileSystem(Protocol):
    """What this room asks of an fsspec file system (fsspec ships no types)."""

    def cat_file(self, path: str) -> bytes: ...
    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None: ...
    def put_file(self, lpath: str, rpath: str) -> None: ...
    def get_file(self, rpath: str, lpath: str) -> None: ...
    def open(self, path: str, mode: str) -> io.RawIOBase: ...
    def exists(self, path: str) -> bool: ...
    def isfile(self, path: str) -> bool: ...
    def find(self, path: str, *, detail: bool) -> dict[str, dict[str, Any]]: ...
    def ls(self, path: str, *, detail: bool) -> list[str]: ...
    def rm(self, path: str, recursive: bool = False) -> None: ...


@contextmanager
def storage_border(action: str, path: str) -> Generator[None]:
    """Turn any failure inside into a StorageError that says what was done to which path.

    Raises:
        PathNotFoundError: nothing is stored there.
        StorageError: everything else.
    """
    try:
        yield
    except SimpoPipelineError:
        raise
    except FileNotFoundError as error:
        raise PathNotFoundError(f"Cannot {action} {path!r}: nothing is stored there.") from error
    except Exception as error:  # fsspec back ends raise their own types; all of them mean that storage failed
        detail = f"{type(error).__name__}: {error}"
        raise StorageError(f"Cannot {action} {path!r}: {detail}. Check the path and your permissions.") from error


def filesystem_of(path: str, **options: Any) -> tuple[FileSystem, str]:
    """The file system that serves `path`, and the path as that file system spells it.

    Listings are never cached: other hosts write to the same place. `options` are the file system's own.

    Raises:
        StorageError: no file system of that scheme is installed.
    """
    with storage_border("reach", path):
        url_to_fs = cast(Any, fsspec.core).url_to_fs
        filesystem, inner_path = url_to_fs(path, use_listings_cache=False, **options)
        return cast(FileSystem, filesystem), cast(str, inner_path)
