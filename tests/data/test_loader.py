"""The loader's invariant: batches are consecutive windows on the concatenated orders of the epochs."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.order import Mixture
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.errors import ConfigError, DataError

PAD = 9999


def make_pair(index: int, prompt: int = 2, chosen: int = 2, rejected: int = 1) -> TokenizedPair:
    """Return a pair whose first token is its index, so that a batch row identifies its pair."""
    prompt_tokens = [index, *range(100, 99 + prompt)]
    return TokenizedPair(
        prompt_id=f"p{index}",
        chosen_tokens=np.array([*prompt_tokens, *range(200, 200 + chosen)], dtype=np.int32),
        rejected_tokens=np.array([*prompt_tokens, *range(300, 300 + rejected)], dtype=np.int32),
        chosen_response_start=prompt,
        rejected_response_start=prompt,
    )


def make_loader(num_pairs: int, batch_size: int, seed: int = 0) -> PairLoader:
    pairs = [make_pair(index) for index in range(num_pairs)]
    return PairLoader(pairs, batch_size=batch_size, seq_len=6, seed=seed, pad_id=PAD, num_updates=10)


def test_packed_rows_contain_less_padding_than_padded_rows():
    rng = np.random.default_rng(0)
    # Answers of 10 to 300 tokens, mostly short, as in real data.
    pairs = [make_pair(index, 40, *np.clip(rng.gamma(1.5, 60, 2), 10, 300).astype(int)) for index in range(64)]
    padded, packed = (
        PairLoader(pairs, batch_size=8, seq_len=340, seed=0, pad_id=PAD, num_updates=8, packing=packing)
        for packing in (False, True)
    )
    for step in range(8):
        assert packed.batch(step).num_tokens == padded.batch(step).num_tokens
        assert packed.batch(step).padding_share < 0.6 * padded.batch(step).padding_share


# grain's shuffle walks through 65,536 positions to find those of a small data set, so there are few examples.
@settings(max_examples=10, deadline=None)
@given(num_pairs=st.integers(1, 40), batch_size=st.integers(1, 17), seed=st.integers(0, 2**64 - 1))
def test_each_epoch_visits_each_pair_exactly_once(num_pairs: int, batch_size: int, seed: int):
    loader = make_loader(num_pairs, batch_size, seed)
    num_steps = -(-3 * num_pairs // batch_size)
    visits = [index for step in range(num_steps) for index in loader.indices(step)]
    for epoch in range(3):
        assert sorted(visits[epoch * num_pairs : (epoch + 1) * num_pairs]) == list(range(num_pairs))


@settings(max_examples=5, deadline=None)
@given(num_pairs=st.integers(5, 40), batch_size=st.integers(1, 9), step=st.integers(0, 9))
def test_a_restart_reads_the_same_batches_as_the_first_run(num_pairs: int, batch_size: int, step: int):
    first_run = make_loader(num_pairs, batch_size)
    for earlier in range(step):
        first_run.batch(earlier)
    expected, got = first_run.batch(step), make_loader(num_pairs, batch_size).batch(step)
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(expected, field.name))


@settings(max_examples=10, deadline=None)
@given(num_pairs=st.integers(1, 12), small=st.integers(1, 5), factor=st.integers(1, 4))
def test_the_order_does_not_depend_on_the_batch_size(num_pairs: int, small: int, factor: int):
    wide = make_loader(num_pairs, small * factor).indices(1)
    narrow = [i for step in range(factor, 2 * factor) for i in make_loader(num_pairs, small).indices(step)]
    assert wide == narrow


def test_a_batch_larger_than_the_data_set_repeats_pairs_evenly():
    counts = Counter(make_loader(num_pairs=3, batch_size=7).indices(0))
    assert sorted(counts.values()) == [2, 2, 3]


def test_no_pairs_is_an_error():
    with pytest.raises(DataError, match="no pairs to train on"):
        make_loader(num_pairs=0, batch_size=1)


def test_a_pair_longer_than_the_row_is_refused_by_name():
    with pytest.raises(DataError, match=r"'p5' has 9 tokens, more than seq_len 6"):
        PairLoader([make_pair(5, prompt=2, chosen=7)], batch_size=1, seq_len=6, seed=0, pad_id=PAD, num_updates=1)


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 0), ("seq_len", 1), ("seed", -1), ("pad_id", -1), ("num_updates", 0)]
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: int):
    settings: dict[str, Any] = {"batch_size": 1, "seq_len": 6, "seed": 0, "pad_id": 0, "num_updates": 1} | {
        field: value
    }
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        PairLoader([make_pair(0)], **settings)


def test_a_mixture_of_other_pairs_is_refused():
    settings: dict[str, Any] = {"batch_size": 1, "seq_len": 6, "seed": 0, "pad_id": 0, "num_updates": 1}
    with pytest.raises(ConfigError, match="the mixture has 3 pairs, but 1 were given"):
        PairLoader([make_pair(0)], mixture=Mixture((2, 1), (1.0, 1.0)), **settings)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step: int):
    with pytest.raises(ConfigError, match=f"step is {step}; the run has updates 0 to 9"):
        make_loader(num_pairs=2, batch_size=1).batch(step)


@pytest.mark.parametrize("start", [0, 3])
def test_a_pair_without_prompt_or_answer_is_refused(start: int):
    tokens = np.arange(3, dtype=np.int32)
    with pytest.raises(DataError, match=f"'p' *: the chosen answer starts at token {start} of 3"):
        TokenizedPair("p", tokens, tokens, start, 1)
