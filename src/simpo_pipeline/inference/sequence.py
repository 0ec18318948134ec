"""Requests, their state during generation, and completions. Plain Python; token ids only, no text."""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from simpo_pipeline.inference.config import SamplingParams

FinishReason = Literal["stop", "length", "stop_string"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample of one prompt.

    Attributes:
        prompt_tokens: Token ids of the prompt; not empty.
        global_prompt_index: Index of the prompt among all prompts of the job, over all hosts.
        sample_index: Index of the sample among the prompt's samples.
        sampling: Sampling parameters.
    """

    prompt_tokens: tuple[int, ...]
    global_prompt_index: int
    sample_index: int
    sampling: SamplingParams


class TokenLogprobs(NamedTuple):
    """Natural log-probabilities under the model, before penalty, temperature and filters."""

    chosen: float
    """Log-probability of the sampled token."""
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities of the requested number of most likely tokens, most likely first."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        request: The request.
        tokens: All generated token ids. With finish reason "stop", the last one is the stop token; with "stop_string",
            it is the token that completed the stop string.
        finish_reason: "stop" if a stop token was sampled, "stop_string" if the text contains a stop string, "length" if
            `max_tokens` was reached first.
        logprobs: One entry per token; None if not requested.
    """

    request: Request
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


@runtime_checkable
class Matcher(Protocol):
    """Incremental search for stop strings in the text of tokens (`stop_strings.StopMatcher`)."""

    def push(self, tokens: Sequence[int]) -> int | None:
        """Add tokens and return after how many of them the text contains a stop string, counted from 1, or None."""
        ...

    def ignore(self, tokens: Sequence[int]) -> None:
        """Add tokens whose stop strings do not count; all calls come before those of `push`."""
        ...


class SequenceState:
    """State of a request during generation: its tokens so far and the pages with their keys and values.

    The last token is never cached: it is the next input token.
    """

    def __init__(self, request: Request, index: int, matcher: Matcher | None = None) -> None:
        self.request = request
        self.index = index
        self.generated: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self._matcher = matcher
        # The scheduler owns the attributes below.
        self.num_cached = 0
        self.pages: list[int] = []
        self.prefixes: list[int] = []  # of the page pool, one per full page of known tokens
        self.announced: deque[tuple[int, int]] = deque()  # (end position, page) of registered pages to fill
        self.awaited: list[int] = []  # shared pages that other sequences still have to fill
        self.copied_from: int | None = None  # page to copy partially before the first chunk
        self.borrowed_tail = False  # whether the last page is shared and not yet written to

    @property
    def num_tokens(self) -> int:
        """Number of prompt and generated tokens so far."""
        return len(self.request.prompt_tokens) + len(self.generated)

    @property
    def num_uncached(self) -> int:
        """Number of tokens to prefill before the last token can be decoded."""
        return self.num_tokens - 1 - self.num_cached

    @property
    def last_token(self) -> int:
        """The next input token."""
        return self.generated[-1] if self.generated else self.request.prompt_tokens[-1]

    @property
    def num_remaining(self) -> int:
        """Number of tokens that may still be sampled."""
        return self.request.sampling.max_tokens - len(self.generated)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Return the prompt and generated tokens at positions start..end-1."""
        num_prompt = len(self.request.prompt_tokens)
        if end <= num_prompt:
            return self.request.prompt_tokens[start:end]
        generated = self.generated[max(start - num_prompt, 0) : end - num_prompt]
        return (*self.request.prompt_tokens[start:num_prompt], *generated)

    def append(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Append sampled tokens, up to the one that ends the sequence; drop the tokens after it.

        Only the last of `tokens` can be a stop token that ends the sequence: the device samples no tokens after it.
        """
        sampling = self.request.sampling
        num_before = len(self.generated)
        stops = bool(tokens) and tokens[-1] in sampling.stop_tokens and num_before + len(tokens) > sampling.min_tokens
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
        """Return the completion of a finished sequence."""
        reason = self.finish_reason
        assert reason is not None, f"sequence {self.index} has not finished"
        has_logprobs = self.request.sampling.logprobs is not None
        return Completion(self.request, tuple(self.generated), reason, tuple(self.logprobs) if has_logprobs else None)

    def _first_stop_string(self, tokens: Sequence[int], num_before: int) -> int | None:
        """Return after how many of the tokens a stop string ends the sequence; it must not end before `min_tokens`."""
        if self._matcher is None:
            return None
        num_early = min(max(0, self.request.sampling.min_tokens - 1 - num_before), len(tokens))
        self._matcher.ignore(tokens[:num_early])
        found = self._matcher.push(tokens[num_early:])
        return None if found is None else num_early + found
