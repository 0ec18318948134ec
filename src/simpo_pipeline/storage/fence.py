"""Fences around folders that only the holder of a lease may write: a write behind a fence is checked first.

The executor puts a fence around the output path of each step it runs. Every writer of this room asks `check_fences`
before it begins, and makes its change visible inside `held_fences`. So a step whose job lost the lease cannot write
over what the next holder makes.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, runtime_checkable

from simpo_pipeline.storage.paths import is_local, strip_file_scheme


@runtime_checkable
class Fence(Protocol):
    """What decides whether this process may write."""

    def check(self) -> None:
        """Raises if this process may not write (any more)."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """Raises if this process may not write; while the block runs, the right to write passes to nobody else.

        Between machines nobody can promise the latter, and a write that is already on its way there may come late.
        """
        ...


_fences: list[tuple[str, Fence]] = []
"""Of this process; writers are called with a path alone, from any thread of a step."""


@contextmanager
def fenced(folder: str, fence: Fence) -> Generator[None]:
    """While the block runs, writes of this process below `folder` ask the fence first; what it raises, they raise."""
    entry = (folder, fence)
    _fences.append(entry)
    try:
        yield
    finally:
        _fences.remove(entry)


def check_fences(path: str) -> None:
    """Called by everything that writes at `path`, before it begins."""
    for fence in _around(path):
        fence.check()


@contextmanager
def held_fences(path: str) -> Generator[None]:
    """Around the moment at which a change at `path` becomes visible to others."""
    with ExitStack() as held:
        for fence in _around(path):
            held.enter_context(fence.hold())
        yield


def _around(path: str) -> list[Fence]:
    if not _fences:
        return []
    place = strip_file_scheme(path) if is_local(path) else path
    return [fence for folder, fence in list(_fences) if place == folder or place.startswith(f"{folder}/")]
