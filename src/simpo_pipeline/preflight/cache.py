"""What a compiler said before, by the fingerprint of what it was asked and by its version: files, one an answer."""

import gzip
import json
import pathlib
from typing import Any

from simpo_pipeline.errors import PathNotFoundError
from simpo_pipeline.storage.files import read_bytes, write_bytes
from simpo_pipeline.storage.paths import user_cache_folder

# Raised when what is kept in the files changes.
_FORMAT = 1


def default_folder() -> pathlib.Path:
    """Where answers are kept on this machine."""
    return pathlib.Path(user_cache_folder("preflight"))


class ResultCache:
    """Answers of one compiler for one topology.

    A fingerprint covers program, versions, flags and device numbers; numbers mean other chips on another topology.
    """

    def __init__(self, folder: pathlib.Path, topology: str, compiler_version: str) -> None:
        self._folder = folder / f"{topology}-libtpu-{compiler_version}-format-{_FORMAT}"

    def read(self, fingerprint: str) -> dict[str, Any] | None:
        """What was kept for a fingerprint; None if nothing was, or if the file is not whole."""
        try:
            return json.loads(gzip.decompress(read_bytes(self._path(fingerprint))))
        except (PathNotFoundError, EOFError, ValueError, gzip.BadGzipFile):
            return None

    def write(self, fingerprint: str, answer: dict[str, Any]) -> None:
        """Keeps an answer that is JSON; another process that does so at the same time keeps the same."""
        write_bytes(self._path(fingerprint), gzip.compress(json.dumps(answer).encode()))

    def _path(self, fingerprint: str) -> str:
        return str(self._folder / f"{fingerprint}.json.gz")
