"""The outputs of `LLM`: one output per prompt, with one completion per sample; names as in vLLM."""

import dataclasses
from collections.abc import Sequence

from simpo_pipeline.inference.sequence import Completion, FinishReason
from simpo_pipeline.inference.text import Decode, text_of


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """Output of one sample.

    Attributes:
        index: Index of the sample among its prompt's samples.
        text: The generated text, without the stop token or stop string that ended it.
        token_ids: All generated tokens, including the one that ended the sample.
        finish_reason: "stop" (a stop token), "stop_string" or "length" (`max_tokens`).
        logprobs: For each token, the log-probabilities of the most likely tokens and of the token itself, keyed by
            token id; None unless requested.
        cumulative_logprob: Sum of the generated tokens' log-probabilities; None unless requested.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[dict[int, float], ...] | None = None
    cumulative_logprob: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        prompt: Text of the prompt; None if it was passed as token ids.
        prompt_token_ids: Token ids of the prompt.
        outputs: One completion per sample. What the prompt decodes to, followed by the text of a completion, is what
            the whole sequence decodes to.
        seed: The seed of the samples. It repeats them in a call with the same prompts.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    seed: int


def completion_output(completion: Completion, decode: Decode) -> CompletionOutput:
    """Return a finished request as a `CompletionOutput`."""
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
    """Return one output per prompt, from the completions of all samples, ordered by prompt and sample."""
    samples: list[list[Completion]] = [[] for _ in prompts]
    for completion in completions:
        samples[completion.request.global_prompt_index].append(completion)
    return [_request_output(prompt, own, decode) for prompt, own in zip(prompts, samples, strict=True)]


def _request_output(prompt: str | None, completions: Sequence[Completion], decode: Decode) -> RequestOutput:
    request = completions[0].request
    assert request.sampling.seed is not None, "the engine serves no request without a seed"
    outputs = tuple(completion_output(each, decode) for each in completions)
    return RequestOutput(prompt, request.prompt_tokens, outputs, request.sampling.seed)
