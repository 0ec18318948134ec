from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from simpo_pipeline.inference.config import EngineSizes, SamplingParams, pages_for
from simpo_pipeline.inference.scheduler import Round, Scheduler
from simpo_pipeline.inference.sequence import Request, SequenceState

STOP = 99


def sequence(index: int, prompt: int | tuple[int, ...], max_tokens: int) -> SequenceState:
    """Return a sequence for a given prompt, or for a unique prompt of that many tokens."""
    tokens = tuple(range(1000 * index, 1000 * index + prompt)) if isinstance(prompt, int) else prompt
    return SequenceState(Request(tokens, index, 0, SamplingParams(max_tokens, stop_token_ids=(STOP,))), index)


def scheduler_of(**sizes: int) -> Scheduler:
    defaults = {"max_seqs": 8, "max_seq_len": 64, "page_size": 4, "num_pages": 128, "decode_steps_per_call": 4}
    config = EngineSizes(**defaults | sizes)
    return Scheduler(config, (config.prefill_chunk_tokens,))


def draws(current: Round) -> list[tuple[list[int], list]]:
    return [([1] * min(current.num_steps, seq.num_remaining), []) for seq in current.decoding]


def serve(scheduler: Scheduler) -> Iterator[Round]:
    """Yield each round, then complete it, drawing token 1 at each step."""
    while (current := scheduler.next_round()) is not None:
        yield current
        scheduler.ran(current, draws(current))


def shape_of(current: Round) -> tuple[list[tuple[int, int, int]], list[int]]:
    chunks = [(chunk.sequence.index, chunk.start, chunk.num_tokens) for chunk in current.chunks]
    return chunks, [seq.index for seq in current.decoding]


def test_prompts_share_a_round_up_to_its_token_budget_beside_sequences_that_draw() -> None:
    scheduler = scheduler_of(prefill_chunk_tokens=20)
    for index, num_prompt in enumerate((5, 25, 1)):
        scheduler.add(sequence(index, num_prompt, 2))
    rounds = list(serve(scheduler))
    # The last token of a prompt is left to decoding, so the prompt of one token draws immediately.
    assert list(map(shape_of, rounds)) == [
        ([(0, 0, 4), (1, 0, 16)], [2]),
        ([(1, 16, 8)], [0, 2]),
        ([], [0, 1]),
    ]
    assert [current.num_steps for current in rounds] == [1, 1, 4]


def test_the_youngest_is_preempted_and_later_recomputed_with_its_generated_tokens() -> None:
    scheduler = scheduler_of(num_pages=5)  # each needs 4 pages in the end, 2 at first
    old, young = sequence(0, 5, 11), sequence(1, 5, 11)
    scheduler.add(old)
    scheduler.add(young)
    rounds = list(serve(scheduler))
    assert scheduler.num_preemptions > 0
    assert [len(seq.generated) for seq in (old, young)] == [11, 11]
    prefills = [chunk for current in rounds for chunk in current.chunks]
    assert [chunk.sequence.index for chunk in prefills] == [0, 1, 1]


def test_samples_of_one_prompt_compute_it_once_and_copy_its_last_page_before_they_write_to_it() -> None:
    scheduler = scheduler_of()
    prompt = tuple(range(11))  # two full pages, and two tokens that are cached in a third
    samples = [sequence(index, prompt, 4) for index in range(3)]
    for each in samples:
        scheduler.add(each)
    rounds = list(serve(scheduler))
    assert shape_of(rounds[0]) == ([(0, 0, 10)], [])
    assert not rounds[1].chunks and len(rounds[1].decoding) == 3
    assert rounds[0].copies == ()
    sources = {source for source, _ in rounds[1].copies}
    targets = {target for _, target in rounds[1].copies}
    assert (len(sources), len(targets)) == (1, 2) and not sources & targets
    assert scheduler.num_shared_tokens == 20


def test_a_page_with_a_common_prefix_is_copied_and_only_the_rest_is_computed() -> None:
    scheduler = scheduler_of(page_size=16)
    template = tuple(range(10))
    for index, own in enumerate(((20, 21), (30, 31, 32), (40,))):
        scheduler.add(sequence(index, (*template, *own), 2))
    rounds = list(serve(scheduler))
    assert [shape_of(current)[0] for current in rounds] == [[(0, 0, 11)], [(1, 10, 2)], []]
    # The last prompt has nothing to prefill: the token after the template is its next input to decoding.
    sources, targets = zip(*rounds[1].copies, strict=True)
    assert len(set(sources)) == 1 and len({*sources, *targets}) == 3
    assert scheduler.num_shared_tokens == 20


def test_a_page_is_not_copied_without_room_for_the_copy() -> None:
    scheduler = scheduler_of(num_pages=4, max_seqs=1)
    scheduler.add(sequence(0, (1, 2, 3, 4, 5), 2))
    scheduler.add(sequence(1, (1, 2, *range(20, 33)), 2))  # needs all four pages
    assert [shape_of(current)[0] for current in serve(scheduler) if current.chunks] == [[(0, 0, 4)], [(1, 0, 14)]]


def test_a_round_prefills_as_much_as_fills_at_least_half_of_a_program() -> None:
    scheduler = Scheduler(EngineSizes(8, 600, 4, 300, prefill_chunk_tokens=512), (32, 128, 512))
    scheduler.add(sequence(0, 151, 1))
    assert [shape_of(current)[0] for current in serve(scheduler) if current.chunks] == [[(0, 0, 128)], [(0, 128, 22)]]
    scheduler.add(sequence(1, 301, 1))
    assert [shape_of(current)[0] for current in serve(scheduler) if current.chunks] == [[(1, 0, 300)]]


def test_pages_of_a_prefix_are_found_after_its_sequence_has_finished() -> None:
    scheduler = scheduler_of(max_seqs=1)
    prefix = tuple(range(8))
    scheduler.add(sequence(0, (*prefix, 20, 21), 2))
    scheduler.add(sequence(1, (*prefix, 30, 31, 32), 2))
    rounds = list(serve(scheduler))
    chunks = [shape_of(current)[0] for current in rounds if current.chunks]
    assert chunks == [[(0, 0, 9)], [(1, 8, 2)]]


def test_a_stop_token_finishes_a_sequence_and_is_its_last_token() -> None:
    scheduler = scheduler_of()
    seq = sequence(0, 1, 9)
    scheduler.add(seq)
    current = scheduler.next_round()
    assert current is not None
    assert scheduler.ran(current, [([1, STOP], [])]) == [seq]
    assert scheduler.next_round() is None
    assert (seq.completion().tokens, seq.completion().finish_reason) == ((1, STOP), "stop")


def test_a_round_ends_early_when_sequences_finish_while_others_wait() -> None:
    scheduler = scheduler_of(max_seqs=4)
    for index in range(5):
        scheduler.add(sequence(index, 1, 9))
    current = scheduler.next_round()
    assert current is not None and (len(current.decoding), current.num_ended) == (4, 1)
    scheduler.waiting.clear()
    current = scheduler.next_round()
    assert current is not None and current.num_ended == 4


class SchedulerMachine(RuleBasedStateMachine):
    """State machine in which requests arrive at any time and rounds draw any number of tokens the engine may draw.

    Chunks of up to three prompts share a round, some of them partial; there are too few pages for all running
    sequences. `memory` simulates the devices: each slot of each page contains the tokens up to the one that was stored
    there, on which its keys and values depend.
    """

    most_chunks = 0

    def __init__(self) -> None:
        super().__init__()
        self.sizes = EngineSizes(
            max_seqs=6, max_seq_len=24, page_size=4, num_pages=12, prefill_chunk_tokens=40, decode_steps_per_call=3
        )
        self.scheduler = Scheduler(self.sizes, (4, 14, 40))
        self.sequences: list[SequenceState] = []
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}

    # Few prompts of few distinct tokens: many share a prefix, and many are the same.
    @rule(
        first=st.integers(0, 3),
        num_prompt=st.integers(1, 12),
        last=st.integers(0, 1),
        max_tokens=st.integers(1, 12),
        samples=st.integers(1, 3),
    )
    def requests_arrive(self, first: int, num_prompt: int, last: int, max_tokens: int, samples: int) -> None:
        for _ in range(samples):
            prompt = (*[first] * (num_prompt - 1), last)
            self.sequences.append(sequence(len(self.sequences), prompt, max_tokens))
            self.scheduler.add(self.sequences[-1])

    @precondition(lambda self: self.scheduler.waiting or self.scheduler.running)
    @rule(data=st.data())
    def a_round_runs(self, data: st.DataObject) -> None:
        current = self.scheduler.next_round()
        assert current is not None, "requests are left, but there is no round to run"
        self.check_round(current)
        drawn = []
        for seq in current.decoding:
            most = min(current.num_steps, seq.num_remaining)
            assert len(seq.pages) >= pages_for(seq.num_cached + most, self.sizes.page_size)
            if data.draw(st.booleans(), "stops early"):
                drawn.append(([1] * data.draw(st.integers(0, most - 1)) + [STOP], []))
            else:
                drawn.append((data.draw(st.lists(st.integers(0, 1), min_size=most, max_size=most)), []))
        self.run_on_devices(current, drawn)
        self.scheduler.ran(current, drawn)

    def check_round(self, current: Round) -> None:
        SchedulerMachine.most_chunks = max(SchedulerMachine.most_chunks, len(current.chunks))
        assert sum(chunk.num_tokens for chunk in current.chunks) <= self.sizes.prefill_chunk_tokens
        assert len(current.chunks) <= self.sizes.max_prefill_seqs
        assert current.num_steps == 1 or not current.chunks
        for chunk in current.chunks:
            assert chunk.num_tokens > 0
            assert chunk.start == chunk.sequence.num_cached
            assert chunk.start + chunk.num_tokens < chunk.sequence.num_tokens
        for seq in current.decoding:
            assert seq.num_uncached == 0

    def run_on_devices(self, current: Round, drawn: list[tuple[list[int], list]]) -> None:
        size = self.sizes.page_size
        before = dict(self.memory)
        for source, target in current.copies:
            for slot in range(size):
                self.memory[target, slot] = before.get((source, slot), ())
        for seq in {id(seq): seq for seq in self.scheduler.running}.values():
            if seq in current.decoding or any(chunk.sequence is seq for chunk in current.chunks):
                for position in range(seq.num_cached):
                    held = self.memory.get((seq.pages[position // size], position % size))
                    assert held == seq.tokens(0, position + 1), f"position {position} contains another sequence's token"
        fed = [
            (chunk.sequence, chunk.start, chunk.sequence.tokens(0, chunk.start + chunk.num_tokens))
            for chunk in current.chunks
        ]
        fed += [
            (seq, seq.num_cached, (*seq.tokens(0, seq.num_tokens), *tokens[:-1]))
            for seq, (tokens, _) in zip(current.decoding, drawn, strict=True)
        ]
        written = set()
        for seq, start, tokens in fed:
            for position in range(start, len(tokens)):
                slot = seq.pages[position // size], position % size
                assert slot not in written, "two sequences write to one slot"
                written.add(slot)
                self.memory[slot] = tokens[: position + 1]

    @invariant()
    def every_page_is_free_or_held_as_often_as_it_is_listed(self) -> None:
        held = [page for seq in self.sequences for page in set(seq.pages)]
        assert len(held) == sum(len(seq.pages) for seq in self.sequences)
        held += [seq.copied_from for seq in self.sequences if seq.copied_from is not None]
        for page in range(self.sizes.num_pages):
            assert self.scheduler.pool._holders[page] == held.count(page)
        assert len(set(held)) + self.scheduler.pool.num_free == self.sizes.num_pages
        assert all(seq in self.scheduler.running for seq in self.sequences if seq.pages)

    @invariant()
    def cached_tokens_fit_in_held_pages(self) -> None:
        for seq in self.sequences:
            assert seq.num_cached <= len(seq.pages) * self.sizes.page_size

    @invariant()
    def older_sequences_run_first(self) -> None:
        running = [seq.index for seq in self.scheduler.running]
        waiting = [seq.index for seq in self.scheduler.waiting]
        assert running + waiting == sorted(running + waiting)
        assert len(running) <= self.sizes.max_seqs

    def teardown(self) -> None:
        for _ in range(10_000):
            current = self.scheduler.next_round()
            if current is None:
                break
            drawn = draws(current)
            self.run_on_devices(current, drawn)
            self.scheduler.ran(current, drawn)
        assert all(seq.finish_reason is not None for seq in self.sequences)
        assert self.scheduler.pool.num_free == self.sizes.num_pages


def test_no_page_is_lost_or_shared_by_mistake_and_every_request_finishes():
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
    assert SchedulerMachine.most_chunks >= 3, "no round computed several prompts together"
