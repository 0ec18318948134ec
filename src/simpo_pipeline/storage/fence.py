"""Fences: the right to write, as an object that can be taken away while its holder is writing.

The executor gives the output folder of a running step a fence that depends on the step's lease. Each function that
writes asks `check` before it begins, and makes its change visible inside `hold`. Thus a step whose job lost the lease
cannot overwrite the files of the next holder.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, final, runtime_checkable


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


@final
class _Open(Fence):
    """Lets everything pass."""

    def check(self) -> None:
        pass

    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()


OPEN: Fence = _Open()
"""The fence of paths that no lease protects."""
