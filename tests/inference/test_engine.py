import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from exact_sampling import exact_probabilities, require_draws_from

from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.errors import CapacityError, ConfigError
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine, GenerationStats, check_requests
from simpo_pipeline.inference.scheduler import Scheduler
from simpo_pipeline.inference.sequence import Completion, Request, SequenceState
from simpo_pipeline.model.transformer import Llama

VOCAB = 300
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
# Two sizes of each program, and a cache far larger than anything else on the device.
ROOMY = {"max_seqs": 256, "prefill_chunk_tokens": 256, "num_pages": 20_000, "decode_steps_per_call": 5}
# Pages of one token each, for only a few sequences at a time, and prompts split into several chunks.
TIGHT = {"max_seqs": 9, "page_size": 1, "num_pages": 160, "prefill_chunk_tokens": 10, "decode_steps_per_call": 3}
DRAWING = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=5)
PENALISED = SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.6)
WITH_LOGPROBS = SamplingParams(max_tokens=12, top_k=9, min_p=0.01, logprobs=2, stop_token_ids=(7,), min_tokens=3)
# Every field of a sampler row, in one batch.
KINDS = (GREEDY, DRAWING, PENALISED, WITH_LOGPROBS)


def requests_of(count: int, sampling: SamplingParams = GREEDY, seed: int = 0) -> list[Request]:
    """Return requests with prompts of 1 to 40 random tokens."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(0, VOCAB, size=rng.integers(1, 41)).tolist()) for _ in range(count)]
    return [Request(prompt, index, 0, sampling) for index, prompt in enumerate(prompts)]


def tokens_of(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


@pytest.fixture(scope="module")
def expected(greedy_tokens: Callable) -> list[tuple[int, ...]]:
    return [tuple(greedy_tokens(request.prompt_tokens, 12)) for request in requests_of(9)]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        pytest.param(ROOMY, marks=pytest.mark.slow),
        TIGHT,
        pytest.param({"page_size": 64, "decode_steps_per_call": 50}, marks=pytest.mark.slow),
        pytest.param({"max_seqs": 1, "decode_steps_per_call": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_greedy_tokens_equal_a_loop_over_whole_sequences(
    sizes: dict, weights: Llama, engine_of: Callable[..., Engine], expected: list[tuple[int, ...]]
) -> None:
    completions, stats = engine_of(**sizes).generate(weights, requests_of(9), step=0)
    assert tokens_of(completions) == expected
    assert [completion.request for completion in completions] == requests_of(9)
    assert stats.generated_tokens == 9 * 12
    assert stats.prompt_tokens == sum(len(request.prompt_tokens) for request in requests_of(9))
    assert (stats.num_preemptions > 0) == (sizes is TIGHT)


@pytest.mark.slow
def test_a_request_gives_the_same_tokens_alone_and_in_any_batch(
    weights: Llama, engine_of: Callable[..., Engine]
) -> None:
    requests = [
        dataclasses.replace(request, sampling=KINDS[index % 4]) for index, request in enumerate(requests_of(200))
    ]
    roomy = engine_of(**ROOMY)
    together = tokens_of(roomy.generate(weights, requests, step=3)[0])
    backwards = tokens_of(roomy.generate(weights, requests[::-1], step=3)[0])[::-1]
    assert backwards == together
    tight, stats = engine_of(**TIGHT).generate(weights, requests, step=3)
    assert stats.num_preemptions > 0
    assert tokens_of(tight) == together
    for index in (0, 77, 199):
        assert tokens_of(roomy.generate(weights, requests[index : index + 1], step=3)[0]) == [together[index]]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5, "temperature": 1.5},
        {"repetition_penalty": 2.0, "top_k": 9},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({"temperature": 0.6}, {"top_p": 0.4}, {"min_p": 0.5})),
    ],
    ids=str,
)
def test_draws_follow_the_requested_distribution(
    settings: dict, weights: Llama, engine_of: Callable[..., Engine], next_logits: Callable
) -> None:
    prompt = requests_of(1)[0].prompt_tokens
    sampling = SamplingParams(max_tokens=1, seed=11, **settings)
    requests = [Request(prompt, 0, sample, sampling) for sample in range(2000)]
    drawn = tokens_of(engine_of(**ROOMY).generate(weights, requests, step=0)[0])
    counts = np.bincount([token for (token,) in drawn], minlength=VOCAB)
    seen = prompt if "repetition_penalty" in settings else ()
    require_draws_from(counts, exact_probabilities(next_logits(prompt), seen=seen, **settings))
    others = [
        dataclasses.replace(request, sampling=dataclasses.replace(sampling, seed=12)) for request in requests[:50]
    ]
    assert tokens_of(engine_of(**ROOMY).generate(weights, others, step=0)[0]) != drawn[:50]


@pytest.mark.parametrize("sizes", [{}, TIGHT], ids=["pages enough", "pages too few"])
def test_repeated_tokens_are_penalised_as_by_the_plain_definition(
    sizes: dict, weights: Llama, engine_of: Callable[..., Engine], next_logits: Callable
) -> None:
    requests = requests_of(9, PENALISED)
    completions, stats = engine_of(**sizes).generate(weights, requests, step=0)
    assert (stats.num_preemptions > 0) == (sizes is TIGHT)
    for request, tokens in zip(requests, tokens_of(completions), strict=True):
        so_far = list(request.prompt_tokens)
        for token in tokens:
            chances = exact_probabilities(next_logits(so_far), seen=tuple(so_far), repetition_penalty=1.6)
            assert token == np.argmax(chances)
            so_far.append(token)


def test_no_stop_token_is_drawn_before_min_tokens(
    weights: Llama, engine_of: Callable[..., Engine], greedy_tokens: Callable
) -> None:
    prompt = requests_of(1)[0].prompt_tokens
    first, second, *_ = greedy_tokens(prompt, 2)
    sampling = SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=(first, second))
    at_once, later = (
        engine_of().generate(weights, [Request(prompt, 0, 0, dataclasses.replace(sampling, min_tokens=least))], step=0)
        for least in (0, 4)
    )
    assert at_once[0][0].tokens == (first,)
    assert len(later[0][0].tokens) >= 4
    assert not {first, second} & {*later[0][0].tokens[:4]}


def test_requests_that_finished_before_a_failing_round_are_reported(
    weights: Llama, engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reported, finished = engine_of(), [], []
    run, ran = engine._programs.run, Scheduler.ran

    def note(scheduler: Scheduler, *round_and_rows: Any) -> list[SequenceState]:
        found = ran(scheduler, *round_and_rows)
        finished.extend(found)
        return found

    def fail_once_some_have_finished(*arguments: Any) -> Any:
        if finished:
            raise RuntimeError("the device is gone")
        return run(*arguments)

    monkeypatch.setattr(Scheduler, "ran", note)
    monkeypatch.setattr(engine._programs, "run", fail_once_some_have_finished)
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.generate(weights, requests_of(15), step=0, on_finished=reported.extend)
    assert reported == [sequence.completion() for sequence in finished]
    assert 0 < len(reported) < 15


def test_samples_of_one_prompt_differ_and_are_reproducible_by_seed(
    weights: Llama, engine_of: Callable[..., Engine]
) -> None:
    prompt = requests_of(1)[0].prompt_tokens
    samples = [Request(prompt, 0, sample, DRAWING) for sample in range(6)]
    engine = engine_of()
    first = tokens_of(engine.generate(weights, samples, step=0)[0])
    assert len(set(first)) == 6
    assert tokens_of(engine.generate(weights, samples, step=0)[0]) == first
    assert tokens_of(engine.generate(weights, samples, step=1)[0]) != first


def test_requests_of_all_kinds_share_a_batch(
    weights: Llama, engine_of: Callable[..., Engine], greedy_tokens: Callable
) -> None:
    prompt = requests_of(1)[0].prompt_tokens
    free = greedy_tokens(prompt, 12)
    stop = free[4]
    kinds = [
        SamplingParams(3, temperature=0.0),
        SamplingParams(12, temperature=0.0, stop_token_ids=(VOCAB - 1, stop)),
        DRAWING,
        SamplingParams(1, temperature=0.0),
    ]
    requests = [Request(prompt, index, 0, sampling) for index, sampling in enumerate(kinds)]
    completions, _ = engine_of().generate(weights, requests, step=0)
    assert completions[0].tokens == tuple(free[:3])
    assert completions[1].tokens == tuple(free[: free.index(stop) + 1])
    assert len(completions[2].tokens) == 12
    assert completions[3].tokens == tuple(free[:1])
    assert [completion.finish_reason for completion in completions] == ["length", "stop", "length", "length"]


def test_progress_is_reported_each_round_until_completion(weights: Llama, engine_of: Callable[..., Engine]) -> None:
    calls = []
    engine_of().generate(weights, requests_of(20), step=0, on_progress=lambda *call: calls.append(call))
    generated, finished, total, elapsed = zip(*calls, strict=True)
    assert list(generated) == sorted(generated)
    assert (generated[-1], finished[-1], set(total)) == (240, 20, {20})
    assert len(calls) >= 4
    assert list(elapsed) == sorted(elapsed)


def test_an_empty_list_of_requests_launches_nothing(
    weights: Llama, engine_of: Callable[..., Engine], programs: Programs
) -> None:
    num_launches = len(programs.ledger.launches)
    assert engine_of().generate(weights, [], step=0) == ([], GenerationStats())
    assert len(programs.ledger.launches) == num_launches


def test_nothing_compiles_while_serving(weights: Llama, engine_of: Callable[..., Engine]) -> None:
    engine, tight = engine_of(**ROOMY), engine_of(**TIGHT)
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **facts: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(f"{facts}, {duration_secs} s")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for sampling in (GREEDY, DRAWING, SamplingParams(20, stop_token_ids=(1, 2, 3)), PENALISED, WITH_LOGPROBS):
            for count in (1, 7, 200):
                engine.generate(weights, requests_of(count, sampling), step=1)
        prompt = tuple(range(40))
        samples = [Request(prompt[:length], length, sample, DRAWING) for length in (29, 40) for sample in range(9)]
        _, shared = engine.generate(weights, samples, step=1)
        assert shared.shared_tokens > 0
        _, stats = tight.generate(weights, [*samples, *requests_of(20)], step=1)
        assert stats.num_preemptions > 0
        assert compiled == []
        jax.jit(lambda: np.float32(1) * 3)()
        assert len(compiled) == 1, "the listener must observe a compilation"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_cache_is_updated_in_place(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(**ROOMY)
    for program in engine._programs.all:
        memory = program.memory_bytes
        cache_bytes = 2 * 20_000 * 2 * 2 * 16 * 8 * 4  # layers, pages, keys and values, heads, head size, slots, bytes
        assert memory.aliased == cache_bytes
        assert memory.temporary < cache_bytes / 10


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ((), 1, "request 1 .*empty prompt"),
        ((5, 300), 1, "request 1 .*token id 300.*0 to 299"),
        ((5, -1), 1, "request 1 .*token id -1"),
        ((1,) * 30, 3, r"request 1 \(prompt 7, sample 2\).*30 prompt tokens.*max_tokens 3, 33.*max_seq_len is 32"),
        ((1,) * 20, 12, "request 1 .*needs 4 pages of 8 tokens for 20 prompt.*max_tokens 12.*num_pages is 3"),
    ],
)
def test_requests_that_can_never_be_served_are_refused_with_index_and_sizes(
    prompt: tuple[int, ...], max_tokens: int, message: str
) -> None:
    config = EngineSizes(max_seqs=4, max_seq_len=32, page_size=8, num_pages=3)
    fine = Request((1,), 0, 0, SamplingParams(2))
    with pytest.raises(CapacityError, match=message):
        check_requests([fine, Request(prompt, 7, 2, SamplingParams(max_tokens))], config, VOCAB)


def test_a_page_size_that_would_change_tokens_is_refused(engine_of: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigError, match=r"page_size is 24; on these devices it must divide 64"):
        engine_of(page_size=24)


def test_a_max_seq_len_beyond_the_positions_of_the_model_is_refused(
    engine_of: Callable[..., Engine],
) -> None:
    with pytest.raises(ConfigError, match=r"max_seq_len is 257, .*only 256 positions"):
        engine_of(max_seq_len=257)


def test_requests_are_refused_before_any_launch(
    weights: Llama, engine_of: Callable[..., Engine], programs: Programs
) -> None:
    num_launches = len(programs.ledger.launches)
    with pytest.raises(CapacityError):
        engine_of().generate(weights, [*requests_of(2), Request((), 2, 0, GREEDY)], step=0)
    assert len(programs.ledger.launches) == num_launches
