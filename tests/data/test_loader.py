"""The loader's law: batches are windows on the epochs' permutations laid end to end."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_pipeline.data.loader import PairLoader, epoch_order
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.errors import ConfigError, DataError

PAD = 9999


def make_pair(index: int, prompt: int = 2, chosen: int = 2, rejected: int = 1) -> TokenizedPair:
    """A pair whose first token is its index, so that a batch row names the pair it came from."""
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
    return PairLoader(pairs, batch_size=batch_size, seq_len=6, seed=seed, pad_id=PAD)


def test_a_batch_is_padded_and_masked_where_a_position_predicts_an_answer_token():
    loader = PairLoader([make_pair(7, prompt=3, chosen=2, rejected=1)], batch_size=1, seq_len=6, seed=0, pad_id=PAD)
    batch = loader.batch(0)
    np.testing.assert_array_equal(batch.chosen_tokens, [[7, 100, 101, 200, 201, PAD]])
    np.testing.assert_array_equal(batch.chosen_loss_mask, [[0, 0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.rejected_tokens, [[7, 100, 101, 300, PAD, PAD]])
    np.testing.assert_array_equal(batch.rejected_loss_mask, [[0, 0, 1, 0, 0, 0]])
    assert batch.num_tokens == 5 + 4


def test_a_pair_that_fills_the_row_keeps_all_its_answer():
    loader = PairLoader([make_pair(0, prompt=2, chosen=4)], batch_size=1, seq_len=6, seed=0, pad_id=PAD)
    np.testing.assert_array_equal(loader.batch(0).chosen_loss_mask, [[0, 1, 1, 1, 1, 0]])


@given(num_pairs=st.integers(1, 40), batch_size=st.integers(1, 17), seed=st.integers(0, 2**64 - 1))
def test_each_epoch_visits_each_pair_exactly_once(num_pairs: int, batch_size: int, seed: int):
    loader = make_loader(num_pairs, batch_size, seed)
    num_steps = -(-3 * num_pairs // batch_size)
    visits = [index for step in range(num_steps) for index in loader.indices(step)]
    for epoch in range(3):
        assert sorted(visits[epoch * num_pairs : (epoch + 1) * num_pairs]) == list(range(num_pairs))


@given(num_pairs=st.integers(1, 20), batch_size=st.integers(1, 9), step=st.integers(0, 50))
def test_a_restart_reads_what_the_first_run_would_have_read(num_pairs: int, batch_size: int, step: int):
    first_run = make_loader(num_pairs, batch_size)
    for earlier in range(step):
        first_run.batch(earlier)
    expected, got = first_run.batch(step), make_loader(num_pairs, batch_size).batch(step)
    np.testing.assert_array_equal(got.chosen_tokens, expected.chosen_tokens)
    np.testing.assert_array_equal(got.rejected_tokens, expected.rejected_tokens)


@given(num_pairs=st.integers(1, 12), small=st.integers(1, 5), factor=st.integers(1, 4))
def test_the_order_does_not_depend_on_the_batch_size(num_pairs: int, small: int, factor: int):
    wide = make_loader(num_pairs, small * factor).indices(1)
    narrow = [i for step in range(factor, 2 * factor) for i in make_loader(num_pairs, small).indices(step)]
    assert wide == narrow


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(epoch_order(seed, epoch, 20)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_recorded_one_so_that_old_runs_can_be_resumed():
    assert epoch_order(seed=0, epoch=0, num_pairs=8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_a_batch_larger_than_the_data_set_repeats_pairs_evenly():
    counts = Counter(make_loader(num_pairs=3, batch_size=7).indices(0))
    assert sorted(counts.values()) == [2, 2, 3]


def test_no_pairs_is_an_error():
    with pytest.raises(DataError, match="no pairs to train on"):
        make_loader(num_pairs=0, batch_size=1)


def test_a_pair_longer_than_the_row_is_refused_by_name():
    with pytest.raises(DataError, match=r"'p5' has 9 tokens, more than seq_len 6"):
        PairLoader([make_pair(5, prompt=2, chosen=7)], batch_size=1, seq_len=6, seed=0, pad_id=PAD)


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("seq_len", 1), ("seed", -1), ("pad_id", -1)])
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: int):
    settings = {"batch_size": 1, "seq_len": 6, "seed": 0, "pad_id": 0} | {field: value}
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        PairLoader([make_pair(0)], **settings)


def test_a_negative_step_is_refused():
    with pytest.raises(ConfigError, match="step is -1"):
        make_loader(num_pairs=2, batch_size=1).batch(-1)


@pytest.mark.parametrize("start", [0, 3])
def test_a_pair_without_prompt_or_answer_is_refused(start: int):
    tokens = np.arange(3, dtype=np.int32)
    with pytest.raises(DataError, match=f"'p' *: the chosen answer starts at token {start} of 3"):
        TokenizedPair("p", tokens, tokens, start, 1)
