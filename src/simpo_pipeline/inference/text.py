"""Conversion between token ids and text: end tokens of a sample, and the text of its tokens."""

import dataclasses
from collections.abc import Callable, Sequence

from simpo_pipeline.data.chat import Tokenizer
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import MAX_STOP_TOKENS, SamplingParams
from simpo_pipeline.inference.sequence import Completion
from simpo_pipeline.inference.stop_strings import text_before_stop

# Decodes token ids to text.
Decode = Callable[[Sequence[int]], str]


def make_decoder(tokenizer: Tokenizer) -> Decode:
    """Return a decoder of generated tokens that skips special tokens and does not clean up spaces."""

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode


def with_end_tokens(sampling: SamplingParams, end_tokens: Sequence[int], vocab_size: int) -> SamplingParams:
    """Return `sampling` with the tokenizer's `end_tokens` added as stop tokens, unless it has `ignore_eos`.

    Raises:
        ConfigError: A stop token is not in the model's vocabulary, or there are too many stop tokens.
    """
    unknown = [token for token in sampling.stop_token_ids if token >= vocab_size]
    if unknown:
        raise ConfigError(f"stop_token_ids has {unknown[0]}; the model's token ids are 0 to {vocab_size - 1}")
    if sampling.ignore_eos:
        return sampling
    stop_token_ids = tuple(dict.fromkeys((*sampling.stop_token_ids, *end_tokens)))
    if len(stop_token_ids) > MAX_STOP_TOKENS:
        raise ConfigError(
            f"stop_token_ids {list(sampling.stop_token_ids)} and the tokenizer's end tokens {list(end_tokens)} are "
            f"{len(stop_token_ids)} stop tokens; at most {MAX_STOP_TOKENS} are supported. Pass fewer, or set ignore_eos"
        )
    return dataclasses.replace(sampling, stop_token_ids=stop_token_ids)


def text_of(completion: Completion, decode: Decode) -> str:
    """Return the generated text, without the stop token or stop string that ended it."""
    tokens = completion.tokens
    match completion.finish_reason:
        case "stop":
            return decode(tokens[:-1])
        case "stop_string":
            # Stop strings before `min_tokens` did not count; the one that ended the sample came with the last token.
            return text_before_stop(decode(tokens), completion.request.sampling.stop, seen=decode(tokens[:-1]))
        case "length":
            return decode(tokens)
