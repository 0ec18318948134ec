"""Folders that are filled on a local disk and then uploaded."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from simpo_pipeline.storage.files import make_parent, upload
from simpo_pipeline.storage.paths import is_local, join, strip_file_scheme


@contextmanager
def staged_folder(path: str) -> Generator[Path]:
    """Yield a local folder to fill: `path` itself if it is local, otherwise a temporary folder.

    The temporary folder is uploaded after the block. If the block raises, nothing is uploaded.

    Raises:
        StorageError: A file could not be written to `path`.
    """
    if is_local(path):
        folder = Path(strip_file_scheme(path))
        make_parent(path)
        folder.mkdir(exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="simpo_pipeline_") as name:
        folder = Path(name)
        yield folder
        for file in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
            upload(file, join(path, file.relative_to(folder).as_posix()))
