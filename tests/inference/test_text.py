"""The text of a completion, for tokenizers of five kinds; the oracle decodes whole sequences with `tokenizers`."""

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import tokenizers
from tokenizer_kinds import KINDS, TEXTS, byte_fallback, single_bytes, write_tokenizer

from simpo_pipeline.data.chat import load_tokenizer
from simpo_pipeline.inference.config import SamplingParams
from simpo_pipeline.inference.sequence import Completion, Request, SequenceState
from simpo_pipeline.inference.stop_strings import StopMatcher
from simpo_pipeline.inference.text import Decode, make_decoder, text_of

NUM_CASES = 60
INCOMPLETE = "\ufffd"


class Kind(NamedTuple):
    """A tokenizer of the library, and this project's decoder of the same tokenizer.json."""

    oracle: tokenizers.Tokenizer
    decode: Decode

    def whole(self, tokens: list[int]) -> str:
        return self.oracle.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module", params=[*KINDS, "single_bytes"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "single_bytes":
        oracle = single_bytes(folder)
    else:
        oracle = KINDS[request.param]()
        write_tokenizer(oracle, folder)
    return Kind(oracle, make_decoder(load_tokenizer(str(folder))))


def random_tokens(rng: random.Random, kind: Kind) -> list[int]:
    """Return tokens of a text, random tokens, or tokens of a text with random tokens between them."""
    text = rng.choice(TEXTS)
    start = rng.randrange(len(text))
    tokens = kind.oracle.encode(text[start : start + rng.randrange(1, 80)], add_special_tokens=False).ids
    vocabulary = kind.oracle.get_vocab_size()
    match rng.randrange(3):
        case 0:
            return [rng.randrange(vocabulary) for _ in range(rng.randrange(2, 60))]
        case 1:
            for _ in range(rng.randrange(1, 6)):
                tokens.insert(rng.randrange(len(tokens) + 1), rng.randrange(vocabulary))
    return tokens


def completion_of(prompt: list[int], tokens: list[int]) -> Completion:
    return Completion(Request(tuple(prompt), 0, 0, SamplingParams()), tuple(tokens), "length")


def num_common(first: str, second: str) -> int:
    """Return the number of characters at the beginning that two texts have in common."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def num_known(kind: Kind, first: list[int], whole: str) -> int:
    """Return how much of a text is that of its first tokens, which may end inside a character."""
    if whole.startswith(kind.whole(first)):
        return len(kind.whole(first))
    return max(num_common(kind.whole(first[: max(0, len(first) - cut)]), whole) for cut in range(4))


def expected_text(kind: Kind, prompt: list[int], tokens: list[int]) -> str:
    """Return what the whole sequence decodes to after what it has in common with the prompt."""
    whole = kind.whole(prompt + tokens)
    return whole[num_known(kind, prompt, whole) :]


def test_prompt_and_completion_text_are_the_text_of_the_whole_sequence(kind: Kind) -> None:
    rng = random.Random(0)
    num_prefixes = 0
    for _ in range(10 * NUM_CASES):
        tokens = random_tokens(rng, kind)
        split = rng.randrange(len(tokens) + 1)
        prompt, generated = tokens[:split], tokens[split:]
        text, whole = text_of(completion_of(prompt, generated), kind.decode), kind.whole(tokens)
        if whole.startswith(kind.whole(prompt)):
            assert kind.whole(prompt) + text == whole, (prompt, generated)
            num_prefixes += 1
        assert text == expected_text(kind, prompt, generated), (prompt, generated)
    assert num_prefixes > 5 * NUM_CASES


def test_a_text_continued_at_any_token_is_the_text(kind: Kind) -> None:
    for text in TEXTS:
        tokens = kind.oracle.encode(text, add_special_tokens=False).ids
        whole = kind.whole(tokens)
        for split in range(len(tokens) + 1):
            shown = text_of(completion_of(tokens[:split], tokens[split:]), kind.decode)
            # The border may be inside a character of up to four bytes, which then belongs to the completion.
            before = [kind.whole(tokens[: max(0, split - cut)]).rstrip(INCOMPLETE) for cut in range(4)]
            assert max((text for text in before if whole.startswith(text)), key=len) + shown == whole, split


class Expected(NamedTuple):
    num_tokens: int
    reason: str
    text: str


def by_definition(kind: Kind, prompt: list[int], tokens: list[int], stop: tuple[str, ...], min_tokens: int) -> Expected:
    """Return how the sample ends: at the first token after which its text has a stop string that counts.

    A stop string counts unless it is text of the first `min_tokens` - 1 tokens.
    """
    num_early = max(0, min_tokens - 1)
    for count in range(num_early + 1, len(tokens) + 1):
        whole = kind.whole(prompt + tokens[:count])
        start, known = (num_known(kind, prompt + tokens[:at], whole) for at in (0, num_early))
        starts = [
            at
            for string in stop
            for at in range(start, len(whole) - len(string) + 1)
            if whole.startswith(string, at) and at + len(string) > known
        ]
        if starts:
            return Expected(count, "stop_string", whole[start : min(starts)])
    return Expected(len(tokens), "length", expected_text(kind, prompt, tokens))


def served(
    kind: Kind,
    prompt: list[int],
    tokens: list[int],
    stop: tuple[str, ...],
    min_tokens: int,
    sizes: list[int],
    end: int = 0,
) -> Expected:
    """Return how the sample ends when the engine samples `sizes` tokens at a time; `end` is a stop token."""
    sampling = SamplingParams(
        max_tokens=len(tokens), stop=stop, min_tokens=min_tokens, stop_token_ids=(end,) * (end > 0)
    )
    request = Request(tuple(prompt), 0, 0, sampling)
    sequence = SequenceState(request, 0, StopMatcher(kind.decode, sampling.stop_strings, request.prompt_tokens))
    done = 0
    while sequence.finish_reason is None:
        size = sizes[done % len(sizes)]
        sequence.append(tokens[done : done + size])
        done += size
    completion = sequence.completion()
    return Expected(len(completion.tokens), completion.finish_reason, text_of(completion, kind.decode))


def test_a_stop_string_is_found_after_a_long_prompt_that_ends_inside_a_character(kind: Kind) -> None:
    text = TEXTS[3] * 6 + "界。"
    tokens = kind.oracle.encode(text, add_special_tokens=False).ids
    whole = kind.whole(tokens)
    inside = [at for at in range(len(tokens) // 2, len(tokens)) if kind.whole(tokens[:at]).endswith(INCOMPLETE)]
    # The unigram tokenizer has no bytes, so that its tokens end where characters end.
    for split in inside[-16:] or [len(tokens) // 2]:
        prompt, generated = tokens[:split], tokens[split : split + 12]
        text = expected_text(kind, prompt, generated)
        for stop in (text[:1], text[1:3], whole[-3:]):
            stops = (stop,) if stop and INCOMPLETE not in stop else ("zzz",)
            expected = by_definition(kind, prompt, generated, stops, 0)
            assert served(kind, prompt, generated, stops, 0, [1]) == expected, (split, stops)


def random_stops(rng: random.Random, kind: Kind, prompt: list[int], tokens: list[int]) -> tuple[str, ...]:
    """Return parts of the text, of which some begin with the completion, before it, or at a blank."""
    whole, text = kind.whole(prompt + tokens), expected_text(kind, prompt, tokens)
    border = len(whole) - len(text)
    starts = [
        border,
        border,
        max(0, border - 1),
        rng.randrange(max(1, len(whole))),
        border + rng.randrange(len(text) + 1),
    ]
    drawn = [whole[at : at + rng.randrange(1, 7)] for at in rng.sample(starts, k=rng.randrange(1, 4))]
    # A stop string with the mark of an incomplete character would match text that later changes.
    return tuple(string for string in drawn if string and INCOMPLETE not in string) or ("zzz",)


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_end_a_sample_where_its_text_first_has_them(kind: Kind, seed: int) -> None:
    rng = random.Random(seed)
    reasons = []
    for _ in range(NUM_CASES):
        tokens = random_tokens(rng, kind) + random_tokens(rng, kind)
        split = rng.randrange(len(tokens))
        prompt, generated = tokens[:split], tokens[split:]
        stop = random_stops(rng, kind, prompt, generated)
        min_tokens = rng.choice((0, 0, 0, rng.randrange(len(generated) + 1)))
        sizes = [rng.randrange(1, 20) for _ in range(rng.randrange(1, 4))]
        expected = by_definition(kind, prompt, generated, stop, min_tokens)
        assert served(kind, prompt, generated, stop, min_tokens, sizes) == expected, (
            prompt,
            generated,
            stop,
            min_tokens,
        )
        reasons.append(expected.reason)
    assert reasons.count("stop_string") > NUM_CASES // 3 and reasons.count("length") > 3


@pytest.fixture(scope="module")
def like_llama_2(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    folder, oracle = tmp_path_factory.mktemp("llama2"), byte_fallback()
    write_tokenizer(oracle, folder)
    return Kind(oracle, make_decoder(load_tokenizer(str(folder))))


def ids_of(kind: Kind) -> Callable[..., list[int]]:
    vocabulary = kind.oracle.get_vocab()
    return lambda *tokens: [vocabulary[token] for token in tokens]


def test_the_blank_before_the_first_word_of_a_completion_is_text_and_may_stop_it(like_llama_2: Kind) -> None:
    ids = ids_of(like_llama_2)
    prompt, tokens = ids("<s>", "▁", "is"), ids("▁Paris", "▁and", ".")
    assert text_of(completion_of(prompt, tokens), like_llama_2.decode) == " Paris and."
    for size in (1, 3):
        assert served(like_llama_2, prompt, tokens, (" Paris",), 0, [size]) == Expected(1, "stop_string", "")
        assert served(like_llama_2, prompt, tokens, ("s Paris", "Pari"), 0, [size]) == Expected(1, "stop_string", " ")
    # The same words as a whole text have no blank before them.
    assert text_of(completion_of(ids("<s>"), tokens), like_llama_2.decode) == "Paris and."
    assert served(like_llama_2, ids("<s>"), tokens, (" Paris",), 0, [1]).reason == "length"


def test_a_stop_string_never_begins_in_the_prompt(like_llama_2: Kind) -> None:
    ids = ids_of(like_llama_2)
    assert served(like_llama_2, ids("▁the"), ids("▁of", "▁is"), ("e of", "the"), 0, [1]).reason == "length"
    assert served(like_llama_2, ids("▁the"), ids("▁of", "▁is"), ("of",), 0, [1]) == Expected(1, "stop_string", " ")


def test_a_character_that_begins_in_the_prompt_belongs_to_the_completion(like_llama_2: Kind) -> None:
    ids = ids_of(like_llama_2)
    prompt, tokens = ids("a", "<0xE2>", "<0x82>"), ids("<0xAC>", "b")
    assert text_of(completion_of(prompt, tokens), like_llama_2.decode) == "€b"
    assert served(like_llama_2, prompt, tokens, ("€",), 0, [1]) == Expected(1, "stop_string", "")


def test_the_text_of_a_stop_token_is_not_text_of_the_sample_and_completes_no_stop_string(like_llama_2: Kind) -> None:
    ids = ids_of(like_llama_2)
    prompt, tokens = ids("▁the"), ids("▁of", "▁and", "▁is")
    (end,) = ids("▁is")
    for size in (1, 3):
        assert served(like_llama_2, prompt, tokens, (" is", "nd is"), 0, [size], end) == Expected(3, "stop", " of and")
        assert served(like_llama_2, prompt, tokens, ("nd",), 0, [size], end) == Expected(2, "stop_string", " of a")


def test_a_stop_string_before_min_tokens_does_not_count_when_the_decoder_retracts_it(like_llama_2: Kind) -> None:
    ids = ids_of(like_llama_2)
    first, second = ids("<0xE6>", "<0x97>", "<0xA5>"), ids("<0xE6>", "<0x9C>", "<0xAC>")
    # After one more byte, this decoder shows no character of the run, and then both.
    assert like_llama_2.whole(first + second[:1]) == INCOMPLETE * 4
    ended = served(like_llama_2, ids("a"), first + second, ("日",), 5, [1])
    assert ended == Expected(6, "length", "日本")
