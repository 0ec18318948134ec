"""One generation: what is asked for, how far it is, and what came of it. Plain Python; token ids only, no text."""

import dataclasses
from typing import Literal, NamedTuple

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


class Sequence:
    """A request on its way: its tokens so far, and which pages hold their keys and values.

    The last token is never cached: it is the next one to be fed. Only the scheduler changes `pages` and `num_cached`.
    """

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.generated: list[int] = []
        self.pages: list[int] = []
        self.num_cached = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens so far."""
        return len(self.request.prompt_tokens) + len(self.generated)

    @property
    def num_uncached(self) -> int:
        """Tokens to prefill before the last one can be fed."""
        return self.num_tokens - 1 - self.num_cached

    @property
    def last_token(self) -> int:
        """The token to feed next."""
        return self.generated[-1] if self.generated else self.request.prompt_tokens[-1]

    @property
    def num_remaining(self) -> int:
        """Tokens it may still draw."""
        return self.request.sampling.max_tokens - len(self.generated)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it has ended, None while it has not."""
        if self.generated and self.generated[-1] in self.request.sampling.stop_token_ids:
            return "stop"
        return "length" if self.num_remaining == 0 else None

    def tokens(self, start: int, end: int) -> list[int]:
        """Prompt and generated tokens at positions start..end-1."""
        num_prompt = len(self.request.prompt_tokens)
        return [
            *self.request.prompt_tokens[start:end],
            *self.generated[max(start - num_prompt, 0) : max(end - num_prompt, 0)],
        ]

    def completion(self) -> Completion:
        """The outcome of a sequence that has ended."""
        reason = self.finish_reason
        assert reason is not None, f"sequence {self.index} has not ended"
        return Completion(self.request, tuple(self.generated), reason)
