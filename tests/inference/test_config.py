import math

import pytest

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import MAX_STOP_TOKENS, EngineConfig, SamplingParams


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
    ],
)
def test_sampling_params_that_mean_nothing_are_refused_by_name(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SamplingParams(**{"max_tokens": 1, **wrong})


@pytest.mark.parametrize("field", ["max_seqs", "max_seq_len", "page_size", "num_pages", "prefill_chunk_tokens"])
def test_an_engine_size_below_one_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{field}"):
        EngineConfig(**{"max_seqs": 1, "max_seq_len": 1, field: 0})


def test_pages_are_derived_from_the_work_unless_given() -> None:
    assert EngineConfig(max_seqs=3, max_seq_len=33, page_size=16).total_pages == 3 * 3
    assert EngineConfig(max_seqs=3, max_seq_len=33, page_size=16, num_pages=5).total_pages == 5
