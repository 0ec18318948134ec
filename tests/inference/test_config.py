import dataclasses
import math
from typing import Any

import pytest

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.planning.identity import canonical
from simpo_pipeline.inference.config import MAX_STOP_TOKENS, EngineConfig, SamplingParams


def check(cls: type[SamplingParams | EngineConfig], **values: Any) -> None:
    """Run the checks of construction alone: the type checks that tests run under would refuse some values first."""
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(made, field.name, values.get(field.name, field.default))
    made.__post_init__()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop_token_ids": tuple(range(MAX_STOP_TOKENS + 1))}, "stop_token_ids"),
        ({"seed": 2**32}, "seed"),
        ({"top_k": -2}, r"top_k must lie in \[0, 2147483647\] \(0 or -1 keeps every token\), got -2"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"n": 0}, "n must be at least 1"),
        ({"stop": ("",)}, "stop must be"),
        ({"min_tokens": 2}, r"min_tokens must lie in \[0, max_tokens=1\], got 2"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 16.0}, "max_tokens must be an integer, got 16.0"),
        ({"max_tokens": None}, "max_tokens must be an integer, got None"),
        ({"n": True}, "n must be an integer, got True"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"logprobs": 2.0}, "logprobs must be an integer, got 2.0"),
        ({"top_k": 2**31}, r"top_k must lie in \[0, 2147483647\]"),
        ({"stop_token_ids": (1.5,)}, "each of stop_token_ids must be an integer, got 1.5"),
        ({"stop_token_ids": {5}}, r"stop_token_ids must be a tuple, \(\) for none, got \{5\}"),
        ({"stop": "a\ud800"}, "stop is 'a.ud800', which is not valid Unicode"),
        ({"stop": 5}, r"stop must be a text or a tuple of texts, \(\) for none, got 5"),
        ({"stop": ""}, "stop must be a tuple of non-empty strings"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": 1e-40}, "temperature must be 0 .* or at least 1e-06, got 1e-40"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty must lie in"),
        ({"min_p": math.nan}, "min_p"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false"),
        ({"seed": -1}, "seed must lie in .* or be None"),
        ({"presence_penalty": 2.5}, r"presence_penalty must lie in \[-2.0, 2.0\]"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must lie in"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be a number, got '1'"),
        ({"logit_bias": 3}, "logit_bias must be a mapping from token ids to numbers, got 3"),
        ({"logit_bias": ((1, 2, 3),)}, r"logit_bias must be a mapping, or pairs .*, got \(1, 2, 3\)"),
        ({"logit_bias": {"5": 1.0}}, "each token id of logit_bias must be an integer, got '5'"),
        ({"logit_bias": {5: "1"}}, r"logit_bias\[5\] must be a number, got '1'"),
        ({"logit_bias": {-5: 1.0}}, "logit_bias has token id -5; token ids are not negative"),
        ({"logit_bias": {5: math.inf}}, r"logit_bias\[5\] must lie in .* or be -inf \(a ban\), got inf"),
        ({"logit_bias": {5: math.nan}}, r"logit_bias\[5\] must lie in"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "logit_bias has token id 5 twice"),
        ({"logit_bias": dict.fromkeys(range(513), 1.0)}, "at most 512 tokens may have a logit_bias, got 513"),
        ({"bad_words": (" ",)}, "bad_words must be a tuple of texts that are not blank"),
        ({"bad_words": (5,)}, r"bad_words must be a text or a tuple of texts, \(\) for none, got \(5,\)"),
        ({"prompt_logprobs": 0}, "prompt_logprobs is 0, but log-probabilities of prompt tokens are not supported"),
    ],
)
def test_invalid_sampling_params_are_refused_by_name(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(SamplingParams, **{"max_tokens": 1, **wrong})


def test_values_written_in_several_ways_are_equal() -> None:
    plain = SamplingParams(stop=("\n",), logit_bias={7: 1.0, 5: -2.0}, bad_words=("x",), stop_token_ids=(3,))
    other = SamplingParams(stop="\n", logit_bias=((5, -2.0), (7, 1.0)), bad_words=["x"], stop_token_ids=[3], top_k=-1)
    assert plain == other and hash(plain) == hash(other)
    assert canonical(plain, "x") == canonical(other, "x")
    assert SamplingParams(stop=["\n"]) == SamplingParams(stop="\n")
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, bad_words=None) == SamplingParams()


def test_parameters_added_later_leave_the_identity_of_older_steps_unchanged() -> None:
    older = {
        **{"!dataclass": "SamplingParams", "ignore_eos": False, "logprobs": None, "max_tokens": 32, "min_p": 0.0},
        **{"min_tokens": 0, "n": 1, "repetition_penalty": 1.0, "seed": 0, "stop": [], "stop_token_ids": []},
        **{"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    }
    assert canonical(SamplingParams(max_tokens=32), "x") == older
    assert canonical(SamplingParams(max_tokens=32, presence_penalty=0.5), "x") == {**older, "presence_penalty": 0.5}
    biased = canonical(SamplingParams(max_tokens=32, logit_bias={5: 1.0}), "x")
    assert biased == {**older, "logit_bias": [[5, 1.0]]}


@pytest.mark.parametrize("field", ["max_seqs", "max_seq_len", "page_size", "num_pages", "prefill_chunk_tokens"])
def test_an_engine_size_below_one_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{field}"):
        EngineConfig(**{"max_seqs": 1, "max_seq_len": 1, field: 0})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"max_seqs": 2.5}, r"engine\.max_seqs must be an integer, got 2\.5"),
        ({"memory_utilization": "0.5"}, r"engine\.memory_utilization must be a number, got '0\.5'"),
    ],
)
def test_a_size_of_another_type_is_refused(size: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(EngineConfig, **size)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_memory_utilization_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"engine\.memory_utilization must lie in \(0, 1\], got"):
        EngineConfig(memory_utilization=share)
