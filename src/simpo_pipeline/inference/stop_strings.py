"""Incremental search for stop strings in the text of generated tokens. Plain Python; the caller passes the decoder.

Decoding the text of all tokens for each new token is not necessary. The text that a token adds depends on only a few
tokens before it, so a window of the last tokens is decoded instead. This is correct for three reasons:

- If a window starts inside a character, its text starts with at most 3 wrong characters. A UTF-8 character has at most
  3 bytes after its first; a byte-level decoder turns each into U+FFFD and decodes correctly from there on. (A decoder
  that strips the leading space of its first token makes one wrong character.)
- A new stop string ends in the part of the text that the last tokens changed. It starts less than its own length before
  that part, so the search is limited to that range. A window is only cut to one whose text has at least this length
  after the 3 wrong characters.
- The end of the decoded text may still change: a character is U+FFFD until all its bytes are there. The changed part is
  therefore found by comparing the texts before and after, and a window is not cut while its text ends in U+FFFD. After
  `_MANY_TOKENS` more tokens it is cut anyway. Otherwise a run of bytes that are not text would make it grow without
  bound, and no character has that many bytes.
"""

from collections.abc import Callable, Iterator, Sequence

_INCOMPLETE = "\ufffd"
_MAX_WRONG_CHARS = 3
_MANY_TOKENS = 256


class StopMatcher:
    """Matcher that finds the token after which the text of all tokens pushed so far contains a stop string."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...]) -> None:
        """Create a matcher; `decode` returns the text of token ids, and the `stop` strings are not empty."""
        self._decode = decode
        self._stop = stop
        self._min_chars = max(map(len, stop)) + _MAX_WRONG_CHARS
        self._window: list[int] = []
        self._text = ""
        self._next_cut = self._min_tokens_to_cut

    def push(self, tokens: Sequence[int]) -> int | None:
        """Add all tokens and return after how many of them, counted from 1, a new stop string is in the text.

        Returns None if there is none. A stop string that was in the text before these tokens does not count.
        """
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

    def _shows_every_match(self, whole: str) -> bool:
        """Return whether `whole` has every match of the texts of fewer tokens: complete characters do not change."""
        seeks_incomplete = any(_INCOMPLETE in string for string in self._stop)
        return not seeks_incomplete and _INCOMPLETE not in whole[_num_same(self._text, whole) :]

    @property
    def _min_tokens_to_cut(self) -> int:
        # Much longer than a cut window, so that few tokens are decoded twice because of cuts.
        return 32 + 3 * self._min_chars

    def _is_new_in(self, text: str) -> bool:
        num_same = _num_same(self._text, text)
        return any(text.find(string, max(0, num_same - len(string) + 1)) >= 0 for string in self._stop)

    def _take(self, tokens: Sequence[int], text: str) -> None:
        """Add tokens to the window, whose text becomes `text`, and cut the window if it is long enough."""
        # Tokens without text (special tokens) are not added; they would make the window grow without bound. The check
        # decodes the tokens twice in a row because a decoder may strip a leading space, which is text nevertheless.
        if text != self._text or self._decode([*tokens, *tokens]):
            self._window.extend(tokens)
        self._text = text
        is_settled = not text.endswith(_INCOMPLETE) or len(self._window) > self._min_tokens_to_cut + _MANY_TOKENS
        if len(self._window) >= self._next_cut and is_settled:
            self._cut()

    def _cut(self) -> None:
        for num_kept in self._lengths_to_try():
            kept = self._window[-num_kept:]
            text = self._decode(kept)
            if len(text) >= self._min_chars and self._text.endswith(text[_MAX_WRONG_CHARS:]):
                self._window, self._text, self._next_cut = kept, text, self._min_tokens_to_cut
                return
        self._next_cut = 2 * len(self._window)

    def _lengths_to_try(self) -> Iterator[int]:
        num_kept = self._min_chars
        while 2 * num_kept <= len(self._window):
            # Decoders with byte fallback decode a run of bytes that starts inside a character to nonsense. One of four
            # neighbouring lengths starts at a character.
            yield from range(num_kept, num_kept + 4)
            num_kept *= 2


def text_before_stop(text: str, stop: tuple[str, ...], seen: str = "") -> str:
    """Return the text before its first stop string, or all of it if it has none.

    `seen` is the text of the earlier tokens, in which stop strings did not count.
    """
    num_same = _num_same(seen, text)
    starts = [text.find(string, max(0, num_same - len(string) + 1)) for string in stop]
    return text[: min((start for start in starts if start >= 0), default=len(text))]


def _num_same(before: str, after: str) -> int:
    """Return the length of the common prefix of two texts; in most cases `before` is a prefix of `after`."""
    if after.startswith(before):
        return len(before)
    differences = (at for at, (old, new) in enumerate(zip(before, after, strict=False)) if old != new)
    return next(differences, min(len(before), len(after)))
