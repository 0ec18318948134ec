"""Many requests to storage at once."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_READERS = 32
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def in_parallel(work: Callable[[ItemT], ResultT], items: Collection[ItemT]) -> list[ResultT]:
    """`work` of every item, in order; the first error is raised."""
    if not items:
        return []
    with ThreadPoolExecutor(_READERS, thread_name_prefix="storage") as pool:
        return list(pool.map(work, items))
