"""Incremental search for stop strings in the text of generated tokens. Plain Python; the caller passes the decoder.

The text of a completion is what its tokens add to the decoded prompt: the text of prompt and tokens together, from
where the prompt's own text ends (`known_length`). Tokens decoded alone would give another text: a decoder may strip the
blank that they begin with, and a character may have its first bytes in the prompt.

Decoding the text of all tokens for each new token is not necessary. The text that a token adds depends on only a few
tokens before it, so a window of the last tokens is decoded instead, which begins in the prompt. This is correct for
three reasons:

- If a window starts inside a character, its text starts with at most 3 wrong characters. A UTF-8 character has at most
  3 bytes after its first; a byte-level decoder turns each into U+FFFD and decodes correctly from there on. (A decoder
  that strips the leading spaces of its first token omits characters instead.)
- A new stop string ends in the part of the text that the last tokens changed. It starts less than its own length before
  that part, so the search is limited to that range. A window is only cut to one whose text has at least this length
  after the 3 wrong characters.
- The end of the decoded text may still change: a character is U+FFFD until all its bytes are there. The changed part is
  therefore found by comparing the texts before and after, and a window is not cut while its text ends in U+FFFD. After
  `_MANY_TOKENS` more tokens it is cut anyway. Otherwise a run of bytes that are not text would make it grow without
  bound, and no character has that many bytes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

_INCOMPLETE = "\ufffd"
_MAX_WRONG_CHARS = 3
_MANY_TOKENS = 256


class StopMatcher:
    """Matcher that finds the token after which the text of a completion contains a stop string."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...], prompt: Sequence[int] = ()
    ) -> None:
        """Create a matcher.

        Args:
            decode: Returns the text of token ids.
            stop: The stop strings, none of them empty.
            prompt: The tokens before the first pushed one. Stop strings do not begin in their text.
        """
        self._decode = decode
        self._stop = stop
        self._min_chars = max(map(len, stop)) + _MAX_WRONG_CHARS
        self._prompt = prompt
        self._window: list[int] = []
        self._text = ""
        # `texts_at_end` of the window's tokens that are the prompt's, and of those before which strings are ignored.
        self._prompt_texts: tuple[str, ...] = ("",)
        self._ignored_texts: tuple[str, ...] = ("",)
        self._next_cut = self._min_tokens_to_cut

    def push(self, tokens: Sequence[int]) -> int | None:
        """Add all tokens and return after how many of them, counted from 1, a new stop string is in the text.

        Returns None if there is none. A stop string that was in the text before these tokens does not count.
        """
        self._read_prompt()
        if not tokens:
            return None
        whole = self._decode([*self._window, *tokens])
        if self._shows_every_match(whole) and not self._is_new_in(whole):
            self._take(tokens, whole)
            return None
        first: int | None = None
        for count, token in enumerate(tokens, start=1):
            text = self._decode([*self._window, token])
            if first is None and self._is_new_in(text):
                first = count
            self._take([token], text)
        return first

    def ignore(self, tokens: Sequence[int]) -> None:
        """Add tokens before the first pushed ones; stop strings in the text up to their end do not count."""
        self._read_prompt()
        for token in tokens:
            text = self._decode([*self._window, token])
            self._ignored_texts = (text, *self._ignored_texts[:_MAX_WRONG_CHARS])
            self._take([token], text)

    def _read_prompt(self) -> None:
        """Decode the prompt when the first tokens are added: all requests are created long before most of them run."""
        if self._prompt:
            # The window is cut before an incomplete character, because only there its text shows what a cut changes.
            texts = enumerate(texts_at_end(self._decode, self._prompt))
            end = len(self._prompt) - next((num_last for num_last, text in texts if not text.endswith(_INCOMPLETE)), 0)
            self._window = list(self._prompt[:end])
            self._text = self._decode(self._window)
            self._cut_if_long()
            self._window.extend(self._prompt[end:])
            self._prompt_texts = self._ignored_texts = tuple(texts_at_end(self._decode, self._window))
            self._text = self._prompt_texts[0]
            self._prompt = ()

    def _shows_every_match(self, whole: str) -> bool:
        """Return whether `whole` has every match of the texts of fewer tokens: complete characters do not change."""
        seeks_incomplete = any(_INCOMPLETE in string for string in self._stop)
        return not seeks_incomplete and _INCOMPLETE not in whole[common_length(self._text, whole) :]

    @property
    def _min_tokens_to_cut(self) -> int:
        # Much longer than a cut window, so that few tokens are decoded twice because of cuts.
        return 32 + 3 * self._min_chars

    def _is_new_in(self, text: str) -> bool:
        start = known_length(self._prompt_texts, text)
        known = max(common_length(self._text, text), known_length(self._ignored_texts, text))
        return any(text.find(string, max(start, known - len(string) + 1)) >= 0 for string in self._stop)

    def _take(self, tokens: Sequence[int], text: str) -> None:
        """Add tokens to the window, whose text becomes `text`, and cut the window if it is long enough."""
        # Tokens without text (special tokens) are not added; they would make the window grow without bound. The check
        # decodes the tokens twice in a row because a decoder may strip a leading space, which is text nevertheless.
        if text != self._text or self._decode([*tokens, *tokens]):
            self._window.extend(tokens)
        self._text = text
        self._cut_if_long()

    def _cut_if_long(self) -> None:
        if len(self._window) < self._next_cut:
            return
        is_settled = not self._text.endswith(_INCOMPLETE)
        if not is_settled and len(self._window) <= self._min_tokens_to_cut + _MANY_TOKENS:
            return
        for kept in self._windows_to_try(is_settled):
            text = self._decode(kept)
            if len(text) >= self._min_chars and self._text.endswith(text[_MAX_WRONG_CHARS:]):
                self._prompt_texts = tuple(self._part_in(text, part) for part in self._prompt_texts)
                self._ignored_texts = tuple(self._part_in(text, part) for part in self._ignored_texts)
                self._window, self._text, self._next_cut = kept, text, self._min_tokens_to_cut
                return
        self._next_cut = 2 * len(self._window)

    def _part_in(self, text: str, part: str) -> str:
        """Return the text that `part`, a text of the window's first tokens, has in a window cut to `text`."""
        num_cut = len(self._text) - len(text)
        length = max(0, len(part) - num_cut)
        return text[: min(length, _MAX_WRONG_CHARS)] + part[_MAX_WRONG_CHARS + num_cut :]

    def _windows_to_try(self, is_settled: bool) -> Iterator[list[int]]:
        # Decoders with byte fallback decode a whole run of bytes to U+FFFD if one of them is not text: keep that one.
        bad = next((token for token in self._window if self._decode([token]) == _INCOMPLETE), None)
        num_kept = self._min_chars
        while 2 * num_kept <= len(self._window):
            # They decode a run that starts inside a character to nonsense. One of four neighbouring lengths starts at a
            # character.
            for length in range(num_kept, num_kept + 4):
                yield self._window[-length:]
            if bad is not None and not is_settled:
                yield [bad, *self._window[-num_kept:]]
            num_kept *= 2


def texts_at_end(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> Iterator[str]:
    """Yield the texts of the tokens, and of the tokens without the last one, two and three, for `known_length`."""
    for end in range(len(tokens), max(-1, len(tokens) - 1 - _MAX_WRONG_CHARS), -1):
        yield decode(tokens[:end])


def known_length(texts: Iterable[str], whole: str) -> int:
    """Return how much of `whole` is text of the first of its tokens, whose `texts_at_end` are given.

    If these tokens end inside a character, they decode to another text than `whole` begins with. Some decoders then
    retract complete characters too. That they belong to the first tokens shows in the text of one to three tokens less.
    """
    longest = 0
    for num_last, text in enumerate(texts):
        if not num_last and whole.startswith(text):
            return len(text)
        longest = max(longest, common_length(text, whole))
    return longest


def text_before_stop(text: str, stop: tuple[str, ...], seen: str = "") -> str:
    """Return the text before its first stop string, or all of it if it has none.

    `seen` is the text of the earlier tokens, in which stop strings did not count.
    """
    known = common_length(seen, text)
    starts = [text.find(string, max(0, known - len(string) + 1)) for string in stop]
    return text[: min((start for start in starts if start >= 0), default=len(text))]


def common_length(before: str, after: str) -> int:
    """Return the length of the common prefix of two texts; in most cases `before` is a prefix of `after`."""
    if after.startswith(before):
        return len(before)
    differences = (at for at, (old, new) in enumerate(zip(before, after, strict=False)) if old != new)
    return next(differences, min(len(before), len(after)))
