"""The pages of the cache: who holds which, and which hold tokens that other sequences may read.

A page that holds known tokens after a known prefix is registered under both, and stays so when nobody holds it any
more, until it is needed for something else: the longest unused goes first. Which tokens are on the devices, and what
a sequence writes where, is the scheduler's business. Plain Python.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

# The prefix of a sequence's first page.
ROOT = 0


class PagePool:
    """Page numbers 0..num_pages-1: each free, held by one or more sequences, or unheld but worth keeping."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._blank = list(reversed(range(num_pages)))  # hold nothing that anyone could ask for
        self._kept: OrderedDict[int, None] = OrderedDict()  # unheld, registered; the longest unused first
        self._holders = [0] * num_pages
        self._ready = [False] * num_pages
        self._keys: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in range(num_pages)]
        self._by_key: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._new_prefix = itertools.count(ROOT + 1)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._kept)

    def is_held(self, page: int) -> bool:
        """Whether anyone holds a page."""
        return self._holders[page] > 0

    def is_shared(self, page: int) -> bool:
        """Whether several sequences hold a page."""
        return self._holders[page] > 1

    def is_ready(self, page: int) -> bool:
        """Whether the tokens under which a page is registered are in it."""
        return self._ready[page]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages for one holder; the caller has made sure that so many are free."""
        assert 0 <= count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        pages = []
        for _ in range(count):
            page = self._blank.pop() if self._blank else self._evict()
            self._holders[page] = 1
            pages.append(page)
        return pages

    def hold(self, page: int) -> None:
        """Adds a holder to a page that was found."""
        if not self._holders[page]:
            del self._kept[page]
        self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Gives up one holder's pages, given in the order of its tokens."""
        # The end of a prefix is of use only with its beginning, so it is to be evicted first.
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
        """(page, prefix that ends with it) of the page with these tokens after that prefix."""
        return self._by_key.get((prefix, tuple(tokens)))

    def register(self, page: int, prefix: int, tokens: Sequence[int], *, ready: bool) -> int:
        """Says which tokens a page holds, or will hold before anyone reads them; returns the prefix that ends with it.

        If another page is registered for the same, that one stays, and its prefix is returned.
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
        """Says that the tokens under which a page is registered are in it now."""
        self._ready[page] = bool(self._keys[page])

    def forget_beyond(self, page: int, num_tokens: int) -> None:
        """Says that what a page holds past its first tokens is about to be written over."""
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
