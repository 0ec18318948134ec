"""What `LLM` gives back: one output a prompt, with one completion a sample; names as in vLLM."""

import dataclasses
from collections.abc import Sequence

from simpo_pipeline.inference.sequence import Completion, FinishReason
from simpo_pipeline.inference.text import Decode, text_of


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample.

    Attributes:
        index: Which of its prompt's samples.
        text: What was generated, without the stop token or the stop string that ended it.
        token_ids: All generated tokens, the one that ended it included.
        finish_reason: "stop" (a stop token), "stop_string" or "length" (`max_tokens`).
        logprobs: For each token the log-probabilities of the likeliest tokens and of itself, by token id; None unless
            asked for, as the sum of the drawn tokens' is.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[dict[int, float], ...] | None = None
    cumulative_logprob: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and what was generated from it; a prompt given as token ids has no text."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


def completion_output(completion: Completion, decode: Decode) -> CompletionOutput:
    """A finished request as a user sees it."""
    logprobs = completion.logprobs
    return CompletionOutput(
        index=completion.request.sample_index,
        text=text_of(completion, decode),
        token_ids=completion.tokens,
        finish_reason=completion.finish_reason,
        logprobs=None
        if logprobs is None
        else tuple(
            {token: each.chosen, **dict(each.top)} for token, each in zip(completion.tokens, logprobs, strict=True)
        ),
        cumulative_logprob=None if logprobs is None else sum(each.chosen for each in logprobs),
    )


def request_outputs(
    prompts: Sequence[str | None], completions: Sequence[Completion], decode: Decode
) -> list[RequestOutput]:
    """One output a prompt, given the completions of all samples by prompt and sample."""
    samples: list[list[Completion]] = [[] for _ in prompts]
    for completion in completions:
        samples[completion.request.global_prompt_index].append(completion)
    return [
        RequestOutput(prompt, own[0].request.prompt_tokens, tuple(completion_output(each, decode) for each in own))
        for prompt, own in zip(prompts, samples, strict=True)
    ]
