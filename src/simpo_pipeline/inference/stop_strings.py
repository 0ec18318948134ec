"""Stop strings in the text of tokens as they come. Plain Python; how tokens become text is the caller's to say.

The text of all tokens need not be decoded for each new one. What a token adds depends on few tokens before it, so a
window of the last ones is decoded instead. Three things make that right:

- A window that begins inside a character begins with at most 3 wrong characters: UTF-8 has at most 3 bytes of a
  character after its first, a byte-level decoder makes U+FFFD of each and is in step from there on. (A decoder that
  strips the blank of its first token has one wrong character.)
- A stop string that was not in the text before ends in what the last tokens changed, so it begins less than its own
  length before that, and is looked for nowhere else. A window is cut only to one that holds so much behind those 3.
- What a decoder says of the end of the text may change (a character whose bytes are not all there is U+FFFD), so what
  changed is found by comparing the texts before and after, and a window is not cut there. After `_MANY_TOKENS` it is:
  a run of bytes that are no text would else make it grow for ever, and no character has so many bytes.
"""

from collections.abc import Callable, Iterator, Sequence

_INCOMPLETE = "\ufffd"
_MOST_WRONG = 3
_MANY_TOKENS = 256


class StopMatcher:
    """Says after which token a stop string comes to be in the text of all tokens pushed so far."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...]) -> None:
        """`decode` gives the text of token ids; none of the `stop` strings is empty."""
        self._decode = decode
        self._stop = stop
        self._min_chars = max(map(len, stop)) + _MOST_WRONG
        self._window: list[int] = []
        self._text = ""
        self._next_cut = self._soonest_cut

    def push(self, tokens: Sequence[int]) -> int | None:
        """Takes all of the tokens; returns after how many of them, counted from 1, a stop string comes to be there.

        None if none does. One that was there before these tokens does not count.
        """
        if not tokens:
            return None
        whole = self._decode([*self._window, *tokens])
        if self._tells_of_every_token(whole) and not self._is_new_in(whole):
            self._take(tokens, whole)
            return None
        first: int | None = None
        for count, token in enumerate(tokens, start=1):
            text = self._decode([*self._window, token])
            if first is None and self._is_new_in(text):
                first = count
            self._take([token], text)
        return first

    def _tells_of_every_token(self, whole: str) -> bool:
        """Whether what is not in the text of several tokens was not in that of fewer: complete characters stay."""
        seeks_incomplete = any(_INCOMPLETE in string for string in self._stop)
        return not seeks_incomplete and _INCOMPLETE not in whole[_num_same(self._text, whole) :]

    @property
    def _soonest_cut(self) -> int:
        # Well beyond what a cut keeps, so that few tokens are decoded twice for it.
        return 32 + 3 * self._min_chars

    def _is_new_in(self, text: str) -> bool:
        num_same = _num_same(self._text, text)
        return any(text.find(string, max(0, num_same - len(string) + 1)) >= 0 for string in self._stop)

    def _take(self, tokens: Sequence[int], text: str) -> None:
        """Adds tokens to the window, whose text becomes `text`, and cuts it where that is due."""
        # Tokens without any text (special ones) would make it grow for ever. Twice, for a blank that begins a text may
        # be stripped and yet be one.
        if text != self._text or self._decode([*tokens, *tokens]):
            self._window.extend(tokens)
        self._text = text
        is_settled = not text.endswith(_INCOMPLETE) or len(self._window) > self._soonest_cut + _MANY_TOKENS
        if len(self._window) >= self._next_cut and is_settled:
            self._cut()

    def _cut(self) -> None:
        for num_kept in self._lengths_to_try():
            kept = self._window[-num_kept:]
            text = self._decode(kept)
            if len(text) >= self._min_chars and self._text.endswith(text[_MOST_WRONG:]):
                self._window, self._text, self._next_cut = kept, text, self._soonest_cut
                return
        self._next_cut = 2 * len(self._window)

    def _lengths_to_try(self) -> Iterator[int]:
        num_kept = self._min_chars
        while 2 * num_kept <= len(self._window):
            # Decoders that fall back to bytes make nonsense of a run of them that begins inside a character, so one of
            # four neighbours it is.
            yield from range(num_kept, num_kept + 4)
            num_kept *= 2


def text_before_stop(text: str, stop: tuple[str, ...], seen: str = "") -> str:
    """The text up to where its first stop string begins; all of it if it has none.

    `seen` is the text of the tokens before, in which stop strings did not count.
    """
    num_same = _num_same(seen, text)
    starts = [text.find(string, max(0, num_same - len(string) + 1)) for string in stop]
    return text[: min((start for start in starts if start >= 0), default=len(text))]


def _num_same(before: str, after: str) -> int:
    """How many characters two texts begin with alike; mostly the first is the whole beginning of the second."""
    if after.startswith(before):
        return len(before)
    differences = (at for at, (old, new) in enumerate(zip(before, after, strict=False)) if old != new)
    return next(differences, min(len(before), len(after)))
