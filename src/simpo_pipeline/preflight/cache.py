"""A disk cache of compiler results, keyed by program fingerprint and compiler version, with one file per result."""

import gzip
import json
import pathlib
from typing import Any

from simpo_pipeline.errors import PathNotFoundError
from simpo_pipeline.storage.files import read_bytes, write_bytes
from simpo_pipeline.storage.paths import user_cache_folder

# Incremented when the content of the files changes.
_FORMAT = 1


def default_folder() -> pathlib.Path:
    """Return the folder where results are kept on this machine."""
    return pathlib.Path(user_cache_folder("preflight"))


class ResultCache:
    """Results of one compiler for one topology.

    A fingerprint covers program, versions, flags and device ids. The same ids mean other chips on another topology.
    """

    def __init__(self, folder: pathlib.Path, topology: str, compiler_version: str) -> None:
        self._folder = folder / f"{topology}-libtpu-{compiler_version}-format-{_FORMAT}"

    def read(self, fingerprint: str) -> dict[str, Any] | None:
        """Return the result for a fingerprint, or None if there is none or its file is incomplete."""
        try:
            return json.loads(gzip.decompress(read_bytes(self._path(fingerprint))))
        except (PathNotFoundError, EOFError, ValueError, gzip.BadGzipFile):
            return None

    def write(self, fingerprint: str, answer: dict[str, Any]) -> None:
        """Store a result, which must be JSON. A process that does so at the same time stores the same result."""
        write_bytes(self._path(fingerprint), gzip.compress(json.dumps(answer).encode()))

    def _path(self, fingerprint: str) -> str:
        return str(self._folder / f"{fingerprint}.json.gz")
