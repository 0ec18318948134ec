from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from simpo_pipeline.inference.config import EngineConfig, SamplingParams, pages_for
from simpo_pipeline.inference.pages import PageAllocator
from simpo_pipeline.inference.scheduler import DecodeRound, PrefillRound, Scheduler
from simpo_pipeline.inference.sequence import Request, Sequence

STOP = 99


def sequence(index: int, num_prompt: int, max_tokens: int) -> Sequence:
    sampling = SamplingParams(max_tokens, stop_token_ids=(STOP,))
    return Sequence(Request(tuple(range(num_prompt)), index, 0, sampling), index)


def serve(scheduler: Scheduler) -> Iterator[PrefillRound | DecodeRound]:
    """Runs every round to its end, drawing token 1 at each step."""
    while (current := scheduler.next_round()) is not None:
        yield current
        if isinstance(current, PrefillRound):
            scheduler.prefilled(current)
        else:
            scheduler.decoded(current, [[1] * min(4, seq.num_remaining) for seq in current.sequences])


def scheduler_of(**sizes: int) -> Scheduler:
    return Scheduler(
        EngineConfig(**{"max_seqs": 8, "max_seq_len": 64, "page_size": 4, "decode_steps_per_call": 4} | sizes)
    )


def test_pages_are_handed_out_once_and_come_back() -> None:
    allocator = PageAllocator(3)
    first, second = allocator.allocate(2), allocator.allocate(1)
    assert sorted(first + second) == [0, 1, 2]
    allocator.free(first)
    assert allocator.num_free == 2
    with pytest.raises(AssertionError, match="not held"):
        allocator.free(first)
    with pytest.raises(AssertionError, match="3 pages asked for, 2 free"):
        allocator.allocate(3)


def test_prompts_share_a_prefill_up_to_its_token_budget_and_the_last_token_is_left_to_decoding() -> None:
    scheduler = scheduler_of(prefill_chunk_tokens=20)
    for index, num_prompt in enumerate((5, 25, 1)):
        scheduler.add(sequence(index, num_prompt, 1))
    rounds = [
        [(chunk.sequence.index, chunk.start, chunk.num_tokens) for chunk in each.chunks]
        if isinstance(each, PrefillRound)
        else [seq.index for seq in each.sequences]
        for each in serve(scheduler)
    ]
    assert rounds == [[(0, 0, 4), (1, 0, 16)], [(1, 16, 8)], [0, 1, 2]]


def test_the_youngest_is_preempted_and_later_prefilled_with_what_it_had_generated() -> None:
    scheduler = scheduler_of(num_pages=5)  # each needs 4 pages in the end, 2 at first
    old, young = sequence(0, 5, 11), sequence(1, 5, 11)
    scheduler.add(old)
    scheduler.add(young)
    rounds = list(serve(scheduler))
    assert scheduler.num_preemptions > 0
    assert [len(seq.generated) for seq in (old, young)] == [11, 11]
    prefills = [chunk for each in rounds if isinstance(each, PrefillRound) for chunk in each.chunks]
    assert [chunk.sequence.index for chunk in prefills] == [0, 1, 1]
    assert prefills[2].start == 0
    assert prefills[2].num_tokens > prefills[1].num_tokens


def test_a_stop_token_ends_a_sequence_and_is_its_last_token() -> None:
    scheduler = scheduler_of()
    seq = sequence(0, 1, 9)
    scheduler.add(seq)
    current = scheduler.next_round()
    assert isinstance(current, DecodeRound)
    assert scheduler.decoded(current, [[1, STOP]]) == [seq]
    assert scheduler.next_round() is None
    assert (seq.completion().tokens, seq.completion().finish_reason) == ((1, STOP), "stop")


def test_a_stop_token_drawn_last_of_all_counts_as_stop() -> None:
    seq = sequence(0, 1, 2)
    seq.generated = [1, STOP]
    assert seq.completion().finish_reason == "stop"


def test_tokens_of_a_range_cross_from_prompt_to_generated() -> None:
    seq = sequence(0, 3, 9)
    seq.generated = [7, 8]
    assert seq.tokens(1, 5) == [1, 2, 7, 8]
    assert seq.tokens(3, 4) == [7]
    assert seq.tokens(0, 2) == [0, 1]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests arrive at any time; rounds draw any number of tokens that the engine may draw."""

    def __init__(self) -> None:
        super().__init__()
        self.config = EngineConfig(
            max_seqs=3, max_seq_len=24, page_size=4, num_pages=7, prefill_chunk_tokens=20, decode_steps_per_call=3
        )
        self.scheduler = Scheduler(self.config)
        self.sequences: list[Sequence] = []
        self.starts: list[int] = []

    @rule(num_prompt=st.integers(1, 12), max_tokens=st.integers(1, 12))
    def a_request_arrives(self, num_prompt: int, max_tokens: int) -> None:
        self.sequences.append(sequence(len(self.sequences), num_prompt, max_tokens))
        self.scheduler.add(self.sequences[-1])

    @precondition(lambda self: self.scheduler.waiting or self.scheduler.running)
    @rule(data=st.data())
    def a_round_runs(self, data: st.DataObject) -> None:
        before = {seq.index for seq in self.scheduler.running}
        current = self.scheduler.next_round()
        assert current is not None, "requests are left, but there is no round to run"
        self.starts += [seq.index for seq in self.scheduler.running if seq.index not in before]
        if isinstance(current, PrefillRound):
            self.run_prefill(current)
        else:
            self.run_decode(current, data)

    def run_prefill(self, current: PrefillRound) -> None:
        assert 0 < sum(chunk.num_tokens for chunk in current.chunks) <= self.config.prefill_chunk_tokens
        assert len(current.chunks) <= self.config.max_prefill_seqs
        for chunk in current.chunks:
            assert chunk.num_tokens > 0
            assert chunk.start == chunk.sequence.num_cached
            assert chunk.start + chunk.num_tokens < chunk.sequence.num_tokens
        self.scheduler.prefilled(current)

    def run_decode(self, current: DecodeRound, data: st.DataObject) -> None:
        drawn = []
        for seq in current.sequences:
            assert seq.num_uncached == 0
            most = min(self.config.decode_steps_per_call, seq.num_remaining)
            assert len(seq.pages) >= pages_for(seq.num_cached + most, self.config.page_size)
            if data.draw(st.booleans(), "stops early"):
                drawn.append([1] * data.draw(st.integers(0, most - 1)) + [STOP])
            else:
                drawn.append([1] * most)
        self.scheduler.decoded(current, drawn)

    @invariant()
    def every_page_is_free_or_held_by_one_running_sequence(self) -> None:
        held = [page for seq in self.sequences for page in seq.pages]
        assert len(held) == len(set(held))
        assert len(held) + self.scheduler.allocator.num_free == self.config.total_pages
        assert all(seq in self.scheduler.running for seq in self.sequences if seq.pages)

    @invariant()
    def cached_tokens_lie_in_held_pages(self) -> None:
        for seq in self.sequences:
            assert seq.num_cached <= len(seq.pages) * self.config.page_size

    @invariant()
    def the_older_go_first(self) -> None:
        running = [seq.index for seq in self.scheduler.running]
        waiting = [seq.index for seq in self.scheduler.waiting]
        assert running + waiting == sorted(running + waiting)
        assert len(running) <= self.config.max_seqs

    def teardown(self) -> None:
        for _ in range(10_000):
            current = self.scheduler.next_round()
            if current is None:
                break
            if isinstance(current, PrefillRound):
                self.scheduler.prefilled(current)
            else:
                steps = self.config.decode_steps_per_call
                self.scheduler.decoded(current, [[1] * min(steps, seq.num_remaining) for seq in current.sequences])
        assert all(seq.finish_reason is not None for seq in self.sequences)
        assert self.scheduler.allocator.num_free == self.config.total_pages


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
