"""The page pool of the cache: reference counts of pages, and the prefix index for pages that sequences can share.

A page with known tokens after a known prefix is registered under both. It stays registered after its last holder
releases it, until the pool evicts it for another use; the least recently used page is evicted first. The scheduler
decides which tokens are on the devices and where a sequence writes. Plain Python.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

# The prefix of a sequence's first page.
ROOT = 0


class PagePool:
    """Pages 0..num_pages-1; each is blank, held by one or more sequences, or cached without a holder."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._blank = list(reversed(range(num_pages)))  # without registered tokens
        self._kept: OrderedDict[int, None] = OrderedDict()  # without a holder but registered; least recently used first
        self._holders = [0] * num_pages
        self._ready = [False] * num_pages
        self._keys: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in range(num_pages)]
        self._by_key: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._new_prefix = itertools.count(ROOT + 1)

    @property
    def num_free(self) -> int:
        """Number of pages without a holder."""
        return len(self._blank) + len(self._kept)

    def is_held(self, page: int) -> bool:
        """Return whether a page has a holder."""
        return self._holders[page] > 0

    def is_shared(self, page: int) -> bool:
        """Return whether a page has several holders."""
        return self._holders[page] > 1

    def is_ready(self, page: int) -> bool:
        """Return whether the tokens that a page is registered for have been written to it."""
        return self._ready[page]

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` pages for one holder; the caller ensures that enough pages are free."""
        assert 0 <= count <= self.num_free, f"{count} pages requested, {self.num_free} free"
        pages = []
        for _ in range(count):
            page = self._blank.pop() if self._blank else self._evict()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def hold(self, page: int) -> None:
        """Add a holder to a page returned by `find`."""
        if not self._holders[page]:
            del self._kept[page]
        self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Release the pages of one holder, passed in the order of its tokens."""
        # The end of a prefix is useless without its beginning, so it must be evicted first.
        for page in reversed(list(pages)):
            assert self._holders[page], f"page {page} is released but not held"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._ready[page]:
                self._kept[page] = None
            else:
                self._forget(page)
                self._blank.append(page)

    def find(self, prefix: int, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Return (page, prefix that ends with it) for the page with `tokens` after `prefix`; None if there is none."""
        return self._by_key.get((prefix, tuple(tokens)))

    def register(self, page: int, prefix: int, tokens: Sequence[int], *, ready: bool) -> int:
        """Register the tokens that a page has, or will have before it is read; return the prefix that ends with it.

        If a page is already registered for the same tokens and prefix, it stays registered and its prefix is returned.
        """
        key = (prefix, tuple(tokens))
        known = self._by_key.get(key)
        if known is not None:
            return known[1]
        self._by_key[key] = page, next(self._new_prefix)
        self._keys[page].append(key)
        self._ready[page] = ready
        return self._by_key[key][1]

    def set_ready(self, page: int) -> None:
        """Record that the tokens that a page is registered for have been written to it."""
        self._ready[page] = bool(self._keys[page])

    def forget_beyond(self, page: int, num_tokens: int) -> None:
        """Unregister what will be overwritten: everything in a page beyond its first `num_tokens` tokens."""
        for key in [key for key in self._keys[page] if len(key[1]) > num_tokens]:
            self._keys[page].remove(key)
            del self._by_key[key]

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        for key in self._keys[page]:
            del self._by_key[key]
        self._keys[page] = []
        self._ready[page] = False
