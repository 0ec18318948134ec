"""The scheduler of the engine: each round combines prefill chunks with the next tokens of the running sequences.

Scheduling is first come, first served: sequences start in the order in which they were added. When pages run out, the
youngest running sequence is preempted: its pages are released, it waits, and its prompt and generated tokens are
recomputed later. Sequences with a common prefix share pages. The scheduler does not use arrays or devices; the engine
reports what it has run.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

from simpo_pipeline.inference.config import EngineSizes, pages_for
from simpo_pipeline.inference.pages import ROOT, PagePool
from simpo_pipeline.inference.sequence import SequenceState, TokenLogprobs

# While sequences wait, a round ends early when one in `_ENDED_SHARE` of its sequences has finished. An idle row costs
# as much as an active row, but each round also costs host time.
_ENDED_SHARE = 16
# A page whose first tokens match is copied if at least 1 / `_COPIED_SHARE` of the page matches, in multiples of that
# length. Waiting for another sequence's tokens and copying them must cost less than computing them.
_COPIED_SHARE = 8


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """`num_tokens` tokens of one sequence, starting at position `start`."""

    sequence: SequenceState
    start: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Round:
    """The work of one round.

    Attributes:
        chunks: Tokens to prefill: at most `prefill_chunk_tokens` tokens of at most `max_prefill_seqs` sequences.
        decoding: Sequences that sample tokens in the same round; their pages are already allocated.
        num_steps: Maximum number of tokens per decoding sequence: 1 if any sequence can prefill, otherwise
            `decode_steps_per_call`.
        num_ended: The round ends when this number of decoding sequences has finished.
        copies: (source, target) pairs of pages to copy before the round.
    """

    chunks: tuple[PrefillChunk, ...]
    decoding: tuple[SequenceState, ...]
    num_steps: int
    num_ended: int
    copies: tuple[tuple[int, int], ...]


class Scheduler:
    """Waiting and running sequences, and the pages they hold."""

    def __init__(self, config: EngineSizes, chunk_sizes: Sequence[int]) -> None:
        """Create a scheduler; `chunk_sizes` are the prefill sizes that programs are compiled for, smallest first."""
        self.pool = PagePool(config.num_pages)
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []  # oldest first
        self.num_preemptions = 0
        self.num_shared_tokens = 0
        self._config = config
        self._chunk_sizes = chunk_sizes
        self._copies: list[tuple[int, int]] = []

    def add(self, sequence: SequenceState) -> None:
        """Append a sequence to the queue; the caller ensures that it fits in an empty cache."""
        self.waiting.append(sequence)

    def next_round(self) -> Round | None:
        """Return the next round; None if every sequence has finished."""
        self._copies = []
        self._admit()
        num_steps = 1 if any(map(self._can_prefill, self.running)) else self._config.decode_steps_per_call
        decoding = self._grow_or_preempt(num_steps)
        chunks = self._prefill_chunks()
        if not chunks and not decoding:
            assert not self.running and not self.waiting, "there are sequences that can neither prefill nor decode"
            return None
        num_ended = max(1, len(decoding) // _ENDED_SHARE) if self.waiting else max(1, len(decoding))
        return Round(chunks, tuple(decoding), num_steps, num_ended, tuple(self._copies))

    def ran(self, done: Round, drawn: Sequence[tuple[Sequence[int], Sequence[TokenLogprobs]]]) -> list[SequenceState]:
        """Record a round that has run and return the sequences that finished in it.

        Args:
            done: The round; its chunks are in the cache now.
            drawn: The sampled tokens of each decoding sequence, and their log-probabilities if requested.
        """
        for chunk in done.chunks:
            chunk.sequence.num_cached += chunk.num_tokens
            self._register_filled(chunk.sequence)
        finished = []
        for sequence, (tokens, logprobs) in zip(done.decoding, drawn, strict=True):
            sequence.append(tokens, logprobs)
            sequence.num_cached += len(tokens)
            if sequence.finish_reason is None:
                self._register_filled(sequence)
            else:
                finished.append(sequence)
        for sequence in finished:
            self._release(sequence)
        if finished:
            finished_ids = set(map(id, finished))
            self.running = [sequence for sequence in self.running if id(sequence) not in finished_ids]
        return finished

    def _admit(self) -> None:
        if not self.waiting or len(self.running) == self._config.max_seqs:
            return
        # Reserve pages for the running sequences' next tokens. Otherwise the new sequence would be preempted at once.
        reserved = sum(self._missing_pages(sequence) + self._must_copy(sequence) for sequence in self.running)
        while self.waiting and len(self.running) < self._config.max_seqs:
            sequence = self.waiting[0]
            found = self._find_shared(sequence)
            if found.source is not None and not self._has_room(sequence, found, reserved):
                found = found.without_source()  # without the source, one more page may be free
            if not self._has_room(sequence, found, reserved):
                return
            self._start(sequence, found)
            self.running.append(self.waiting.popleft())

    def _has_room(self, sequence: SequenceState, found: "_Shared", reserved: int) -> bool:
        kept = found.pages if found.source is None else [*found.pages, found.source[0]]
        unheld = sum(not self.pool.is_held(page) for page in kept)
        copies = found.has_tail and self.pool.is_held(found.pages[-1])
        missing = self._missing_pages(sequence) - len(found.pages) + copies
        return missing + unheld + reserved <= self.pool.num_free

    def _find_shared(self, sequence: SequenceState) -> "_Shared":
        """Find pages with the sequence's first tokens, except its last token; the last page may match partially."""
        size, end = self._config.page_size, sequence.num_tokens - 1
        found = _Shared([], [], 0)
        prefix = ROOT
        for start in range(0, end, size):
            tokens = sequence.tokens(start, min(start + size, end))
            known = self.pool.find(prefix, tokens)
            if known is None:
                found.source = self._find_partial(prefix, tokens)
                break
            page, prefix = known
            found.pages.append(page)
            found.num_tokens = min(start + size, end)
            found.has_tail = found.num_tokens % size != 0
            if not found.has_tail:
                found.prefixes.append(prefix)
        return found

    def _find_partial(self, prefix: int, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Return (page, number of tokens) of the page with most of the first `tokens` after `prefix`; None if none."""
        for num_tokens in reversed(self._partial_lengths(len(tokens))):
            known = self.pool.find(prefix, tokens[:num_tokens])
            if known is not None:
                return known[0], num_tokens
        return None

    def _partial_lengths(self, num_tokens: int) -> range:
        """Return the lengths below `num_tokens` at which the first tokens of a page can be shared."""
        least = max(1, self._config.page_size // _COPIED_SHARE)
        return range(least, num_tokens, least)

    def _start(self, sequence: SequenceState, found: "_Shared") -> None:
        for page in found.pages:
            self.pool.hold(page)
        sequence.pages = list(found.pages)
        sequence.prefixes = list(found.prefixes)
        sequence.num_cached = found.num_tokens
        sequence.awaited = [page for page in found.pages if not self.pool.is_ready(page)]
        sequence.borrowed_tail = found.has_tail
        if found.source is not None:
            page, num_tokens = found.source
            self.pool.hold(page)
            sequence.copied_from = page
            sequence.num_cached += num_tokens
            sequence.awaited += [] if self.pool.is_ready(page) else [page]
        self.num_shared_tokens += sequence.num_cached
        sequence.pages.extend(self.pool.allocate(self._missing_pages(sequence)))
        self._announce(sequence)

    def _announce(self, sequence: SequenceState) -> None:
        """Register the pages that the sequence is about to fill, so that later sequences can share them."""
        size, end = self._config.page_size, sequence.num_tokens - 1
        prefix = sequence.prefixes[-1] if sequence.prefixes else ROOT
        if sequence.borrowed_tail:
            return
        for start in range(sequence.num_cached // size * size, end, size):
            tokens = sequence.tokens(start, min(start + size, end))
            page = sequence.pages[start // size]
            for num_tokens in self._partial_lengths(len(tokens)):
                self.pool.register(page, prefix, tokens[:num_tokens], ready=False)
            prefix = self.pool.register(page, prefix, tokens, ready=False)
            sequence.announced.append((start + len(tokens), page))
            if len(tokens) == size:
                sequence.prefixes.append(prefix)

    def _can_prefill(self, sequence: SequenceState) -> bool:
        return bool(sequence.num_uncached) and self._has_its_prefix(sequence)

    def _has_its_prefix(self, sequence: SequenceState) -> bool:
        if sequence.awaited:
            sequence.awaited = [page for page in sequence.awaited if not self.pool.is_ready(page)]
        return not sequence.awaited

    def _prefill_chunks(self) -> tuple[PrefillChunk, ...]:
        chunks = []
        ready = [sequence for sequence in self.running if self._can_prefill(sequence)]
        budget = self._chunk_budget(sum(sequence.num_uncached for sequence in ready))
        for sequence in ready:
            self._copy_partial(sequence)
            num_tokens = min(sequence.num_uncached, budget)
            chunks.append(PrefillChunk(sequence, sequence.num_cached, num_tokens))
            budget -= num_tokens
            if not budget or len(chunks) == self._config.max_prefill_seqs:
                break
        return tuple(chunks)

    def _chunk_budget(self, num_tokens: int) -> int:
        """Return how many of `num_tokens` to compute now: the largest program size filled by more than half, or all."""
        filled = [size for size in self._chunk_sizes if 2 * num_tokens > size]
        return min(filled[-1] if filled else num_tokens, self._config.prefill_chunk_tokens)

    def _copy_partial(self, sequence: SequenceState) -> None:
        """Copy the partially shared page before the sequence's first chunk."""
        if sequence.copied_from is None:
            return
        self._copies.append((sequence.copied_from, sequence.pages[sequence.num_cached // self._config.page_size]))
        self.pool.release([sequence.copied_from])
        sequence.copied_from = None

    def _grow_or_preempt(self, num_steps: int) -> list[SequenceState]:
        """Allocate pages for the sequences that decode now and return these; preempt the youngest if pages run out."""
        decoding = []
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.num_uncached or not self._has_its_prefix(sequence):
                index += 1
            elif self._missing_pages(sequence, num_steps) + self._must_copy(sequence) <= self.pool.num_free:
                self._grow(sequence, num_steps)
                decoding.append(sequence)
                index += 1
            else:
                self._preempt_youngest()
        return decoding

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _missing_pages(self, sequence: SequenceState, num_steps: int | None = None) -> int:
        """Return the number of missing pages for all tokens and the next steps (the last sampled one is not cached)."""
        most = self._config.decode_steps_per_call if num_steps is None else num_steps
        num_tokens = sequence.num_tokens - 1 + min(most, sequence.num_remaining)
        return max(0, pages_for(num_tokens, self._config.page_size) - len(sequence.pages))

    def _must_copy(self, sequence: SequenceState) -> bool:
        """Return whether the next token would be written to a shared page."""
        if not sequence.borrowed_tail:
            return False
        return self.pool.is_shared(sequence.pages[sequence.num_cached // self._config.page_size])

    def _grow(self, sequence: SequenceState, num_steps: int) -> None:
        if sequence.borrowed_tail:
            at, num_held = divmod(sequence.num_cached, self._config.page_size)
            if self._must_copy(sequence):
                source, (target,) = sequence.pages[at], self.pool.allocate(1)
                self._copies.append((source, target))
                self.pool.release([source])
                sequence.pages[at] = target
            else:
                self.pool.forget_beyond(sequence.pages[at], num_held)
        sequence.borrowed_tail = False
        sequence.pages.extend(self.pool.allocate(self._missing_pages(sequence, num_steps)))

    def _register_filled(self, sequence: SequenceState) -> None:
        """Mark as readable the sequence's pages that are now full, or filled as far as they were announced."""
        size = self._config.page_size
        for index in range(len(sequence.prefixes), sequence.num_cached // size):
            prefix = sequence.prefixes[-1] if sequence.prefixes else ROOT
            tokens = sequence.tokens(index * size, (index + 1) * size)
            sequence.prefixes.append(self.pool.register(sequence.pages[index], prefix, tokens, ready=True))
        while sequence.announced and sequence.announced[0][0] <= sequence.num_cached:
            _, page = sequence.announced.popleft()
            self.pool.set_ready(page)

    def _release(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.pages)
        if sequence.copied_from is not None:
            self.pool.release([sequence.copied_from])
            sequence.copied_from = None
        sequence.pages = []
        sequence.prefixes = []
        sequence.num_cached = 0
        sequence.borrowed_tail = False
        sequence.awaited = []
        sequence.announced.clear()


@dataclasses.dataclass
class _Shared:
    """Cached pages that match the first tokens of a sequence."""

    pages: list[int]
    prefixes: list[int]  # one per full page: the prefix that ends with it
    num_tokens: int  # tokens in these pages
    has_tail: bool = False  # whether the last page is not full, and has all remaining tokens
    source: tuple[int, int] | None = None  # (page to copy, number of its tokens that match)

    def without_source(self) -> "_Shared":
        """Return the same without the page to copy from."""
        return dataclasses.replace(self, source=None)
