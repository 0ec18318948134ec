"""Fences around folders that only the holder of a lease may write: a write behind a fence is checked first.

The executor puts a fence around the output path of each step it runs. Every writer of this room asks `check_fences`
before it changes anything, so a step whose job lost the lease cannot write over what the next holder makes.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from simpo_pipeline.storage.paths import is_local, strip_file_scheme

_fences: dict[str, Callable[[], None]] = {}


@contextmanager
def fenced(folder: str, check: Callable[[], None]) -> Generator[None]:
    """While the block runs, writes of this process below `folder` call `check` first; what it raises, they raise."""
    _fences[folder] = check
    try:
        yield
    finally:
        del _fences[folder]


def check_fences(path: str) -> None:
    """Called by everything that writes at `path`, before it does."""
    if not _fences:
        return
    place = strip_file_scheme(path) if is_local(path) else path
    for folder, check in list(_fences.items()):
        if place == folder or place.startswith(f"{folder}/"):
            check()
