"""What the engine runs next: a prefill of waiting prompts, or some decode steps of every running sequence.

First come, first served: sequences start in the order in which they were added, and when pages run out the youngest
running one gives its pages back and waits, to be prefilled again, prompt and generated tokens together. Nothing here
knows of arrays or devices; the engine reports back what it has run.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence as Sized

from simpo_pipeline.inference.config import EngineConfig, pages_for
from simpo_pipeline.inference.pages import PageAllocator
from simpo_pipeline.inference.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """`num_tokens` tokens of one sequence from position `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class PrefillRound:
    """Chunks to compute together: at most `prefill_chunk_tokens` tokens of at most `max_prefill_seqs` sequences."""

    chunks: tuple[PrefillChunk, ...]


@dataclasses.dataclass(frozen=True)
class DecodeRound:
    """Sequences that each draw up to `decode_steps_per_call` tokens; they hold the pages for them."""

    sequences: tuple[Sequence, ...]


class Scheduler:
    """Sequences waiting and running, and the pages they hold."""

    def __init__(self, config: EngineConfig) -> None:
        self.allocator = PageAllocator(config.total_pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self._config = config

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue; the caller has made sure that it fits an empty cache."""
        self.waiting.append(sequence)

    def next_round(self) -> PrefillRound | DecodeRound | None:
        """What to run next; None when every sequence has ended."""
        self._admit()
        chunks = self._prefill_chunks()
        if chunks:
            return PrefillRound(chunks)
        self._grow_or_preempt()
        return DecodeRound(tuple(self.running)) if self.running else None

    def prefilled(self, prefill: PrefillRound) -> None:
        """Records that the chunks of a round are in the cache."""
        for chunk in prefill.chunks:
            chunk.sequence.num_cached += chunk.num_tokens

    def decoded(self, decode: DecodeRound, drawn: Sized[Sized[int]]) -> list[Sequence]:
        """Records the tokens that each sequence of a round drew, at least one each; returns those that have ended."""
        for sequence, tokens in zip(decode.sequences, drawn, strict=True):
            sequence.generated.extend(tokens)
            sequence.num_cached += len(tokens)
        ended = [sequence for sequence in decode.sequences if sequence.finish_reason is not None]
        for sequence in ended:
            self.running.remove(sequence)
            self._release(sequence)
        return ended

    def _admit(self) -> None:
        # What the running ones need for their next tokens is not given away: the newcomer would be preempted at once.
        reserved = sum(self._missing_pages(sequence) for sequence in self.running)
        while self.waiting and len(self.running) < self._config.max_seqs:
            sequence = self.waiting[0]
            if self._missing_pages(sequence) + reserved > self.allocator.num_free:
                return
            self._grow(sequence)
            self.running.append(self.waiting.popleft())

    def _prefill_chunks(self) -> tuple[PrefillChunk, ...]:
        chunks = []
        budget = self._config.prefill_chunk_tokens
        for sequence in self.running:
            num_tokens = min(sequence.num_uncached, budget)
            if num_tokens:
                chunks.append(PrefillChunk(sequence, sequence.num_cached, num_tokens))
                budget -= num_tokens
            if not budget or len(chunks) == self._config.max_prefill_seqs:
                break
        return tuple(chunks)

    def _grow_or_preempt(self) -> None:
        """Gives every running sequence the pages of its next tokens, taking them from the youngest if need be."""
        num_grown = 0
        while num_grown < len(self.running):
            if self._missing_pages(self.running[num_grown]) <= self.allocator.num_free:
                self._grow(self.running[num_grown])
                num_grown += 1
            else:
                self._preempt_youngest()

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _missing_pages(self, sequence: Sequence) -> int:
        """Pages it lacks for all its tokens and those of its next decode round (the last one drawn is not cached)."""
        num_steps = min(self._config.decode_steps_per_call, sequence.num_remaining)
        needed = pages_for(sequence.num_tokens - 1 + num_steps, self._config.page_size)
        return max(0, needed - len(sequence.pages))

    def _grow(self, sequence: Sequence) -> None:
        sequence.pages.extend(self.allocator.allocate(self._missing_pages(sequence)))

    def _release(self, sequence: Sequence) -> None:
        self.allocator.free(sequence.pages)
        sequence.pages = []
        sequence.num_cached = 0
