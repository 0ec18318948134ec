"""A stop string is found at exactly the token that completes it, however the text is tokenized and pushed."""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from simpo_pipeline.data.byte_tokenizer import EOS, write_byte_tokenizer
from simpo_pipeline.data.chat import Tokenizer, load_tokenizer
from simpo_pipeline.inference.stop_strings import StopMatcher, text_before_stop

Decode = Callable[[Sequence[int]], str]
# Few letters, so that strings repeat: accents, CJK, an emoji of several code points, the text of a partial character.
LETTERS = "ab \né日本🎉👩‍👧\ufffd"


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = str(tmp_path_factory.mktemp("bytes"))
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


def decode_with(tokenizer: Tokenizer) -> Decode:
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)


# Token ids of a vocabulary like Llama 2's: 256 bytes, then pieces. Its decoder replaces every byte of a run of bytes
# that is not valid text by U+FFFD, and strips the leading space.
PIECES = ["▁", "a", "b", "▁a", "▁b", "ab", "\n", "é"]
VOCABULARY = [*(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]


def decode_with_byte_fallback() -> Decode:
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return lambda tokens: decoder.decode([VOCABULARY[token] for token in tokens])


def encode_with_byte_fallback(text: str) -> list[int]:
    tokens = []
    for letter in text.replace(" ", "▁"):
        tokens += [256 + PIECES.index(letter)] if letter in PIECES else letter.encode()
    return tokens


def first_by_definition(decode: Decode, tokens: Sequence[int], stop: tuple[str, ...]) -> int | None:
    for count in range(1, len(tokens) + 1):
        if any(string in decode(tokens[:count]) for string in stop):
            return count
    return None


def first_by_matcher(decode: Decode, tokens: Sequence[int], stop: tuple[str, ...], sizes: Sequence[int]) -> int | None:
    matcher, done = StopMatcher(decode, stop), 0
    while done < len(tokens):
        size = sizes[done % len(sizes)]
        found = matcher.push(tokens[done : done + size])
        if found is not None:
            return done + found
        done += size
    return None


class Case(NamedTuple):
    """Tokens, stop strings, and the numbers of tokens per push, which repeat."""

    tokens: list[int]
    stop: tuple[str, ...]
    sizes: list[int]


def make_case(rng: random.Random, decode: Decode, encode: Callable[[str], list[int]], vocabulary: int) -> Case:
    """Return a case long enough for many windows, whose first stop string comes late, early, or never.

    Random tokens are inserted between those of a text. Stop strings are suffixes of the text of some first tokens,
    either short or just long enough not to occur earlier.
    """
    letters = rng.choice((LETTERS, LETTERS, "ab", "日本🎉", "a\n"))
    tokens = encode("".join(rng.choices(letters, k=rng.randrange(1, 200))))
    for _ in range(rng.choice((0, 0, 3, 40))):
        tokens.insert(rng.randrange(len(tokens) + 1), rng.randrange(vocabulary))
    stop = []
    for _ in range(rng.randrange(1, 3)):
        said = decode(tokens[: rng.randrange(1, len(tokens) + 1)])
        lengths = range(1, min(12, len(said)) + 1)
        first_of_its_kind = (length for length in lengths if said.find(said[-length:]) == len(said) - length)
        length = next(first_of_its_kind, 1) + rng.choice((0, 0, 0, -1, 2))
        stop.append(said[-max(1, length) :])
    return Case(tokens, tuple(filter(None, stop)) or ("a",), [rng.randrange(1, 20) for _ in range(rng.randrange(1, 4))])


def check(case: Case, decode: Decode) -> None:
    assert first_by_matcher(decode, *case) == first_by_definition(decode, case.tokens, case.stop), case


@pytest.mark.parametrize("seed", range(8))
def test_the_matcher_equals_the_plain_definition_with_single_bytes(byte_tokenizer: Tokenizer, seed: int) -> None:
    rng, decode = random.Random(seed), decode_with(byte_tokenizer)
    for _ in range(40):
        check(make_case(rng, decode, lambda text: list(text.encode()), 261), decode)


@pytest.mark.parametrize("seed", range(8))
def test_the_matcher_equals_the_plain_definition_with_a_real_vocabulary(
    smollm2_tokenizer: Tokenizer, seed: int
) -> None:
    rng, decode = random.Random(seed), decode_with(smollm2_tokenizer)
    for _ in range(40):
        check(make_case(rng, decode, lambda text: list(smollm2_tokenizer.encode(text)), 49152), decode)


@pytest.mark.parametrize("seed", range(8))
def test_the_matcher_equals_the_plain_definition_with_a_byte_fallback_decoder(seed: int) -> None:
    rng, decode = random.Random(seed), decode_with_byte_fallback()
    for _ in range(40):
        case = make_case(rng, decode, encode_with_byte_fallback, len(VOCABULARY))
        # This decoder retracts complete characters when an incomplete one follows, so U+FFFD appears and disappears.
        stop = tuple(string for string in case.stop if "\ufffd" not in string) or ("ab",)
        check(case._replace(stop=stop), decode)


@given(data=st.data())
def test_the_matcher_equals_the_plain_definition_for_any_short_text_and_pushes(
    byte_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    tokens = data.draw(st.lists(st.sampled_from(["a", "b", "é", "日", "🎉", "\n"]).map(str.encode), max_size=30))
    stop = data.draw(st.lists(st.text("abé日🎉\n\ufffd", min_size=1, max_size=4), min_size=1, max_size=3))
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    check(Case(list(b"".join(tokens)), tuple(stop), sizes), decode_with(byte_tokenizer))


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("The answer is 42.\n\nNext question", ("\n\n",)),
        ("one two  three", ("  ",)),
        ("Fin 🎉👩‍👩‍👧 et après", ("👩‍👧",)),
        ("naïve café à la carte", ("é à",)),
        ("東京は日本の首都です。大阪は", ("。",)),
        ("stop here, not stopper", ("stopper", "op h")),
        ("aaaaaaaaab", ("aab",)),
    ],
)
@pytest.mark.parametrize("before", ["", "A long beginning, after which the window has been cut. " * 12])
def test_strings_of_real_text_are_found_at_their_end(
    smollm2_tokenizer: Tokenizer, text: str, stop: tuple[str, ...], before: str
) -> None:
    decode = decode_with(smollm2_tokenizer)
    tokens = list(smollm2_tokenizer.encode(before + text))
    expected = first_by_definition(decode, tokens, stop)
    assert expected is not None and expected > len(tokens) - len(smollm2_tokenizer.encode(text)) - 1
    for sizes in ([1], [16], [len(tokens)], [3, 1, 7]):
        assert first_by_matcher(decode, tokens, stop, sizes) == expected


EOS_ID = 257  # of the byte tokenizer
NUM_TOKENS = 6000
ENDLESS = {
    "a byte that is not text, then others": [255, *b"abc " * (NUM_TOKENS // 4)],
    "text": random.Random(0).choices(b"abc ", k=NUM_TOKENS),
    "characters of many bytes": list(("日本🎉" * (NUM_TOKENS // 10)).encode()),
    "no text at all": [255] * NUM_TOKENS,
    "special tokens": [EOS_ID] * NUM_TOKENS,
    "half a character": ["日".encode()[0], *[EOS_ID] * NUM_TOKENS],
}


@pytest.fixture(scope="module", params=["bytes", "byte_fallback"])
def cached_decode(request: pytest.FixtureRequest, byte_tokenizer: Tokenizer) -> Decode:
    """Return a decoder with a cache, because endless texts repeat themselves."""
    decode = decode_with(byte_tokenizer) if request.param == "bytes" else decode_with_byte_fallback()
    cached = lru_cache(maxsize=4096)(decode)
    return lambda tokens: cached(tuple(tokens))


@pytest.mark.parametrize("stop", [("zz",), ("a string of some length",), ("\ufffd!",)])
@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("size", [1, 16])
def test_the_cost_of_a_token_does_not_grow_with_the_text(
    cached_decode: Decode, stop: tuple[str, ...], kind: str, size: int
) -> None:
    num_decoded = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(tokens)
        return cached_decode(tokens)

    prompt = [*b"A prompt of many words. " * 50]
    matcher = StopMatcher(decode, stop, prompt)
    matcher.push([])
    assert num_decoded < 4 * len(prompt)
    costs = []
    for start in range(0, NUM_TOKENS, size):
        num_decoded = 0
        assert matcher.push(ENDLESS[kind][start : start + size]) is None
        costs.append(num_decoded)
    half = len(costs) // 2
    assert sum(costs[half:]) <= 1.1 * sum(costs[:half]) + 1000
    assert sum(costs) / NUM_TOKENS < 400


def test_a_string_that_begins_in_the_prompt_does_not_count_after_the_window_was_cut_inside_a_character() -> None:
    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    # The window is cut at its 50th token, "x", and then begins with the second byte of a character of the prompt.
    matcher = StopMatcher(decode, ("bxy",), [*("é" * 23 + "zab").encode()])
    assert matcher.push(list(b"x")) is None
    assert matcher.push(list(b"y")) is None
    assert matcher.push(list(b"bxy")) == 3


def test_a_string_found_in_an_earlier_push_is_not_found_again() -> None:
    matcher = StopMatcher(lambda tokens: bytes(tokens).decode(), ("ab",))
    assert matcher.push(list(b"xaby")) == 3
    assert matcher.push(list(b"z")) is None
    assert matcher.push(list(b"zab")) == 3


def test_tokens_after_the_returned_one_are_consumed_too() -> None:
    matcher = StopMatcher(lambda tokens: bytes(tokens).decode(), ("ab",))
    assert matcher.push(list(b"abca")) == 2
    assert matcher.push(list(b"b")) == 1


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_text_is_cut_where_the_first_of_the_stop_strings_begins(text: str, stop: list[str]) -> None:
    cut = text_before_stop(text, tuple(stop))
    assert text.startswith(cut)
    assert all(not text.startswith(string, start) for string in stop for start in range(len(cut)))
    assert cut == text or any(text.startswith(string, len(cut)) for string in stop)


def test_strings_in_the_text_already_seen_do_not_cut_it() -> None:
    assert text_before_stop("one. two.", (".",), seen="one. two") == "one. two"
    assert text_before_stop("one. two.", (".",)) == "one"


def test_leading_spaces_are_seen_although_the_first_is_stripped() -> None:
    blank = 256 + PIECES.index("▁")
    assert first_by_matcher(decode_with_byte_fallback(), [blank] * 4, ("  ",), [1]) == 3


def test_a_special_token_has_no_text(byte_tokenizer: Tokenizer) -> None:
    assert first_by_matcher(decode_with(byte_tokenizer), [*b"ab", EOS_ID], (EOS,), [1]) is None
