"""Conversion between token ids and text: end tokens of a sample, and the text of its tokens."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from simpo_pipeline.data.tokenizer import Tokenizer
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import MAX_STOP_TOKENS, SamplingParams
from simpo_pipeline.inference.sequence import Completion
from simpo_pipeline.inference.stop_strings import known_length, text_before_stop, texts_at_end

# Decodes token ids to text.
Decode = Callable[[Sequence[int]], str]


def make_decoder(tokenizer: Tokenizer) -> Decode:
    """Return a decoder of generated tokens that skips special tokens and does not clean up spaces."""

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=True)

    return decode


def with_end_tokens(sampling: SamplingParams, end_tokens: Sequence[int], vocab_size: int) -> SamplingParams:
    """Return `sampling` with the tokenizer's `end_tokens` added as stop tokens, unless it has `ignore_eos`.

    Raises:
        ConfigError: A stop token or a biased token is not in the model's vocabulary, there are too many stop tokens, or
            no token is left that may be sampled.
    """
    for name, tokens in (("stop_token_ids", sampling.stop_tokens), ("logit_bias", dict(sampling.biases))):
        unknown = [token for token in tokens if token >= vocab_size]
        if unknown:
            raise ConfigError(f"{name} has {unknown[0]}; the model's token ids are 0 to {vocab_size - 1}")
    added = () if sampling.ignore_eos else end_tokens
    stop_token_ids = tuple(dict.fromkeys((*sampling.stop_tokens, *added)))
    if len(stop_token_ids) > MAX_STOP_TOKENS:
        raise ConfigError(
            f"stop_token_ids {list(sampling.stop_tokens)} and the tokenizer's end tokens {list(added)} are "
            f"{len(stop_token_ids)} stop tokens; at most {MAX_STOP_TOKENS} are supported. Pass fewer, or set ignore_eos"
        )
    banned = {token for token, bias in sampling.biases if bias == -math.inf}
    if sampling.min_tokens:
        banned.update(token for token in stop_token_ids if token < vocab_size)
    if len(banned) == vocab_size:
        raise ConfigError(
            f"logit_bias, bad_words and min_tokens ban all {vocab_size} tokens of the vocabulary; leave at least one"
        )
    return dataclasses.replace(sampling, stop_token_ids=stop_token_ids)


def with_bad_words(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """Return `sampling` with its bad words as bans of tokens in `logit_bias`.

    As in vLLM, a word is banned as it is tokenized alone, and as it is tokenized after a blank if that is the same
    number of tokens with another first token.

    Raises:
        ConfigError: A word takes several tokens. To ban it, the programs would have to compare the last tokens too.
    """
    banned: set[int] = set()
    for word in sampling.bad_words or ():
        alone, after_blank = (
            list(tokenizer.encode(start + word.lstrip(), add_special_tokens=False)) for start in ("", " ")
        )
        if len(alone) != 1:
            raise ConfigError(
                f"bad_words has {word!r}, which is {len(alone)} tokens of this vocabulary, {alone[:8]}; only words of "
                "one token are supported. Ban single tokens with logit_bias (-inf), or end the text with stop"
            )
        banned.update(alone, after_blank if len(after_blank) == 1 else ())
    if not banned:
        return sampling
    biases = dict(sampling.biases) | dict.fromkeys(banned, -math.inf)
    return dataclasses.replace(sampling, bad_words=(), logit_bias=biases)


def text_of(completion: Completion, decode: Decode) -> str:
    """Return the generated text, without the stop token or stop string that ended it.

    It is what the tokens add to the text of the prompt, so both together are what the whole sequence decodes to. If the
    prompt ends inside a character, the generated text begins with that character.
    """
    prompt, sampling = completion.request.prompt_tokens, completion.request.sampling
    tokens = completion.tokens[:-1] if completion.finish_reason == "stop" else completion.tokens
    whole = decode((*prompt, *tokens))
    start = known_length(texts_at_end(decode, prompt), whole)
    if completion.finish_reason != "stop_string":
        return whole[start:]
    ignored = texts_at_end(decode, (*prompt, *tokens[: max(0, sampling.min_tokens - 1)]))
    return text_before_stop(whole[start:], sampling.stop_strings, seen=whole[start : known_length(ignored, whole)])
