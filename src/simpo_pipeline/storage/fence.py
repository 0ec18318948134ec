"""Fences around folders that only the holder of a lease may write.

The executor puts a fence around the output path of each step that it runs. Every function of this package that writes
calls `check_fences` before it begins, and makes its change visible inside `held_fences`. Thus a step whose job lost the
lease cannot overwrite the files of the next holder.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, runtime_checkable

from simpo_pipeline.storage.paths import strip_file_scheme


@runtime_checkable
class Fence(Protocol):
    """Decides whether this process may write."""

    def check(self) -> None:
        """Raise if this process may not write, or may no longer write."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """Raise if this process may not write. During the block, no other process gets the right to write.

        The latter cannot be guaranteed between machines: a write that is already under way there may arrive late.
        """
        ...


_fences: list[tuple[str, Fence]] = []
"""The fences of this process, with their folders. Global because writers get only a path, in any thread of a step."""


@contextmanager
def fenced(folder: str, fence: Fence) -> Generator[None]:
    """During the block, make every write of this process below `folder` ask the fence, and raise what it raises."""
    entry = (folder, fence)
    _fences.append(entry)
    try:
        yield
    finally:
        _fences.remove(entry)


def check_fences(path: str) -> None:
    """Raise if a fence forbids writing at `path`. Every writer calls this before it begins."""
    for fence in _around(path):
        fence.check()


@contextmanager
def held_fences(path: str) -> Generator[None]:
    """Hold the fences around `path` while a change there becomes visible to others."""
    with ExitStack() as held:
        for fence in _around(path):
            held.enter_context(fence.hold())
        yield


def _around(path: str) -> list[Fence]:
    if not _fences:
        return []
    path = strip_file_scheme(path)
    return [fence for folder, fence in list(_fences) if path == folder or path.startswith(f"{folder}/")]
