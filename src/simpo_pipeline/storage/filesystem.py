"""The only module that imports fsspec: it finds the file system of a path and translates failures.

Code outside this package sees no exception of fsspec or gcsfs and no raw OSError, only `StorageError`.
"""

import io
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import fsspec.core  # pyright: ignore[reportMissingTypeStubs]

from simpo_pipeline.errors import PathNotFoundError, SimpoPipelineError, StorageError


@runtime_checkable
class FileSystem(Protocol):
    """The methods of an fsspec file system that this package uses (fsspec has no type annotations)."""

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
    """Turn any failure in the block into a StorageError that names the action and the path.

    Raises:
        PathNotFoundError: Nothing is stored there.
        StorageError: Any other failure.
    """
    try:
        yield
    except SimpoPipelineError:
        raise
    except FileNotFoundError as error:
        raise PathNotFoundError(f"Cannot {action} {path!r}: nothing is stored there.") from error
    except Exception as error:  # fsspec back ends raise their own types, which all mean that storage failed
        detail = f"{type(error).__name__}: {error}"
        raise StorageError(f"Cannot {action} {path!r}: {detail}. Check the path and your permissions.") from error


def filesystem_of(path: str, **options: Any) -> tuple[FileSystem, str]:
    """Return the fsspec file system of `path`, and the path in the form that this file system uses.

    Listings are not cached, because other hosts write to the same folders. `options` are those of the file system.

    Raises:
        StorageError: No file system for the scheme is installed.
    """
    with storage_border("reach", path):
        url_to_fs = cast(Any, fsspec.core).url_to_fs
        filesystem, inner_path = url_to_fs(path, use_listings_cache=False, **options)
        return cast(FileSystem, filesystem), cast(str, inner_path)
