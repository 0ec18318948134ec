"""The border between text and token ids: which tokens end a sample, and what text its tokens have."""

import dataclasses
from collections.abc import Callable, Sequence

from simpo_pipeline.data.chat import Tokenizer
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import MAX_STOP_TOKENS, SamplingParams
from simpo_pipeline.inference.sequence import Completion
from simpo_pipeline.inference.stop_strings import text_before_stop

# The text of token ids.
Decode = Callable[[Sequence[int]], str]


def decoder_of(tokenizer: Tokenizer) -> Decode:
    """The text of generated tokens: special tokens have none, and nothing is tidied up."""

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode


def with_end_tokens(sampling: SamplingParams, end_tokens: Sequence[int], vocab_size: int) -> SamplingParams:
    """The sampling in which the tokenizer's `end_tokens` end a sample too, unless it ignores them.

    Raises:
        ConfigError: a stop token is none of the model's, or there are too many.
    """
    unknown = [token for token in sampling.stop_token_ids if token >= vocab_size]
    if unknown:
        raise ConfigError(f"stop_token_ids has {unknown[0]}; the model knows 0 to {vocab_size - 1}")
    if sampling.ignore_eos:
        return sampling
    stop_token_ids = tuple(dict.fromkeys((*sampling.stop_token_ids, *end_tokens)))
    if len(stop_token_ids) > MAX_STOP_TOKENS:
        raise ConfigError(
            f"stop_token_ids {list(sampling.stop_token_ids)} and the tokenizer's own end tokens {list(end_tokens)} are "
            f"{len(stop_token_ids)}, and at most {MAX_STOP_TOKENS} are supported; give fewer, or set ignore_eos"
        )
    return dataclasses.replace(sampling, stop_token_ids=stop_token_ids)


def text_of(completion: Completion, decode: Decode) -> str:
    """What was generated, without the stop token or the stop string that ended it."""
    tokens = completion.tokens
    match completion.finish_reason:
        case "stop":
            return decode(tokens[:-1])
        case "stop_string":
            # Strings that came before `min_tokens` did not count: the one that did came with the last token.
            return text_before_stop(decode(tokens), completion.request.sampling.stop, seen=decode(tokens[:-1]))
        case "length":
            return decode(tokens)
