"""The pages of the cache: which are free. It does not know what they hold, nor whose they are."""

from collections.abc import Iterable


class PageAllocator:
    """Hands out page numbers 0..num_pages-1, each to one holder at a time."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages; the caller has made sure that so many are free."""
        assert 0 <= count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        pages = [self._free.pop() for _ in range(count)]
        self._held.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back."""
        for page in pages:
            assert page in self._held, f"page {page} is freed but not held"
            self._held.remove(page)
            self._free.append(page)
