"""One generation: what is asked for, how far it is, and what came of it. Plain Python; token ids only, no text."""

import dataclasses
from collections import deque
from collections.abc import Sequence as Sized
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from simpo_pipeline.inference.config import SamplingParams

FinishReason = Literal["stop", "length", "stop_string"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample of one prompt.

    Attributes:
        prompt_tokens: Token ids, at least one.
        global_prompt_index: The prompt's index among all prompts of the job, whichever host serves it.
        sample_index: Which sample of that prompt this is.
        sampling: How its tokens are drawn.
    """

    prompt_tokens: tuple[int, ...]
    global_prompt_index: int
    sample_index: int
    sampling: SamplingParams


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities under the model, before penalty, temperature and filters."""

    chosen: float
    """Of the token that was drawn."""
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities of the likeliest tokens, likeliest first; as many as were asked for."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        request: What was asked for.
        tokens: Every generated token id; with finish reason "stop" the last one is the stop token, with "stop_string"
            the one that completed the string.
        finish_reason: "stop" when a stop token was drawn, "stop_string" when the text came to contain a stop string,
            "length" when `max_tokens` was reached first.
        logprobs: One entry a token; None where none were asked for.
    """

    request: Request
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


@runtime_checkable
class Matcher(Protocol):
    """Looks for stop strings in the text of tokens as they come (`stop_strings.StopMatcher`)."""

    def push(self, tokens: Sized[int]) -> int | None:
        """After how many of these tokens, counted from 1, a stop string is in the text; None if it is in none."""
        ...


class Sequence:
    """A request on its way: its tokens so far, and which pages hold their keys and values.

    The last token is never cached: it is the next one to be fed.
    """

    def __init__(self, request: Request, index: int, matcher: Matcher | None = None) -> None:
        self.request = request
        self.index = index
        self.generated: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self._matcher = matcher
        # The scheduler's.
        self.num_cached = 0
        self.pages: list[int] = []
        self.prefixes: list[int] = []  # as the page pool names them, one for each page that is full of known tokens
        self.announced: deque[tuple[int, int]] = deque()  # (position after its last token, page) of pages to be filled
        self.awaited: list[int] = []  # pages of others that are to be filled before this one can go on
        self.copied_from: int | None = None  # another's page, whose beginning is to be copied before the first chunk
        self.borrowed_tail = False  # its last page is another's, and it has not yet written to it

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far."""
        return len(self.request.prompt_tokens) + len(self.generated)

    @property
    def num_uncached(self) -> int:
        """Tokens to compute before the last one can be fed."""
        return self.num_tokens - 1 - self.num_cached

    @property
    def last_token(self) -> int:
        """The token to feed next."""
        return self.generated[-1] if self.generated else self.request.prompt_tokens[-1]

    @property
    def num_remaining(self) -> int:
        """Tokens it may still draw."""
        return self.request.sampling.max_tokens - len(self.generated)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Prompt and generated tokens at positions start..end-1."""
        num_prompt = len(self.request.prompt_tokens)
        if end <= num_prompt:
            return self.request.prompt_tokens[start:end]
        generated = self.generated[max(start - num_prompt, 0) : end - num_prompt]
        return (*self.request.prompt_tokens[start:num_prompt], *generated)

    def append(self, tokens: Sized[int], logprobs: Sized[TokenLogprobs] = ()) -> None:
        """Takes drawn tokens, up to the one that ends the sequence; those after it are dropped.

        Only the last of `tokens` can be a stop token that ends it: the device draws none after that.
        """
        sampling = self.request.sampling
        num_before = len(self.generated)
        stops = (
            bool(tokens) and tokens[-1] in sampling.stop_token_ids and num_before + len(tokens) > sampling.min_tokens
        )
        text_tokens = tokens[:-1] if stops else tokens
        num_kept = self._first_stop_string(text_tokens, num_before)
        if num_kept is not None:
            self.finish_reason = "stop_string"
            tokens = tokens[:num_kept]
        elif stops:
            self.finish_reason = "stop"
        self.generated.extend(tokens)
        self.logprobs.extend(logprobs[: len(tokens)])
        if self.finish_reason is None and self.num_remaining == 0:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        """The outcome of a sequence that has ended."""
        reason = self.finish_reason
        assert reason is not None, f"sequence {self.index} has not ended"
        wanted = self.request.sampling.logprobs is not None
        return Completion(self.request, tuple(self.generated), reason, tuple(self.logprobs) if wanted else None)

    def _first_stop_string(self, tokens: Sized[int], num_before: int) -> int | None:
        """After how many of the tokens a stop string ends the sequence; one that comes before `min_tokens` does not."""
        if self._matcher is None:
            return None
        num_early = min(max(0, self.request.sampling.min_tokens - 1 - num_before), len(tokens))
        num_pushed = num_early
        self._matcher.push(tokens[:num_early])
        found = self._matcher.push(tokens[num_early:])
        return None if found is None else num_pushed + found
