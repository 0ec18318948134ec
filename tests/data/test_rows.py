"""Padded and packed rows: every answer token is predicted once, from just what stands before it in its sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.data.rows import (
    NOBODY,
    RowBatch,
    fill_rows,
    packed_len,
    packed_rows,
    packed_shape,
    padded_rows,
    padded_shape,
)
from simpo_pipeline.data.sweep import PairSweep
from simpo_pipeline.errors import DataError

PAD = 9999


def make_pair(index: int, prompt: int, chosen: int, rejected: int, *, same_prompt: bool = True) -> TokenizedPair:
    """A pair all of whose tokens are different from each other and from those of other pairs."""
    first = 1000 * index
    prompt_tokens = np.arange(first, first + prompt)
    other_prompt = prompt_tokens if same_prompt else prompt_tokens + 500
    return TokenizedPair(
        f"p{index}",
        np.concatenate([prompt_tokens, np.arange(first + 100, first + 100 + chosen)]).astype(np.int32),
        np.concatenate([other_prompt, np.arange(first + 200, first + 200 + rejected)]).astype(np.int32),
        prompt,
        prompt,
    )


PAIRS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=8
).map(lambda sizes: [make_pair(index, *lens, same_prompt=same) for index, (*lens, same) in enumerate(sizes)])


def read_back(batch: RowBatch, sequence: int) -> tuple[list[int], list[list[int]]]:
    """The answer that is predicted for a sequence, and for each of its tokens what the model sees when it does so."""
    groups, places = np.nonzero(batch.sequences == sequence)
    assert len(set(groups)) == 1, "an answer is predicted in one group"
    rows_per_group, row_len = batch.tokens.shape[0] // batch.sequences.shape[0], batch.tokens.shape[1]
    seen = []
    for at in batch.predict_at[groups[0], places]:
        row, place = groups[0] * rows_per_group + at // row_len, at % row_len
        tokens, segments, branches, positions = (
            array[row] for array in (batch.tokens, batch.segments, batch.branches, batch.positions)
        )
        earlier = np.arange(row_len) <= place
        readable = (segments == segments[place]) & ((branches == 0) | (branches == branches[place])) & earlier
        assert segments[place] != NOBODY
        assert positions[readable].tolist() == list(range(readable.sum()))
        seen.append(tokens[readable].tolist())
    return batch.targets[groups[0], places].tolist(), seen


def assert_each_answer_is_predicted_from_its_beginning(batch: RowBatch, pairs: list[TokenizedPair]) -> None:
    assert set(batch.sequences.reshape(-1)) - {NOBODY} == set(range(2 * len(pairs)))
    for index, pair in enumerate(pairs):
        sides = (pair.chosen_tokens, pair.chosen_response_start), (pair.rejected_tokens, pair.rejected_response_start)
        for side, (tokens, start) in enumerate(sides):
            answer, seen = read_back(batch, 2 * index + side)
            assert answer == tokens[start:].tolist()
            assert seen == [tokens[:place].tolist() for place in range(start, len(tokens))]
            assert batch.answer_lens[index, side] == len(answer)
    held = (batch.segments != NOBODY).sum()
    assert batch.padding_share == pytest.approx(1 - held / batch.tokens.size)
    assert (batch.tokens[batch.segments == NOBODY] == PAD).all()
    assert batch.num_tokens == sum(pair.num_tokens for pair in pairs)


@given(PAIRS)
def test_packed_rows_hold_every_answer_and_what_it_follows(pairs: list[TokenizedPair]):
    shape = packed_shape([pairs], 2)
    batch = packed_rows(pairs, shape, PAD)
    assert batch.tokens.shape == (shape.num_rows, shape.row_len) and shape.num_rows % 2 == 0
    assert_each_answer_is_predicted_from_its_beginning(batch, pairs)
    for index, row in enumerate(batch.pair_rows):
        assert (batch.tokens[row] == pairs[index].chosen_tokens[0]).any()


@given(PAIRS)
def test_padded_rows_hold_every_answer_and_what_it_follows(pairs: list[TokenizedPair]):
    batch = padded_rows(pairs, padded_shape([pairs], len(pairs) + 1, 16, 1), PAD)
    assert batch.tokens.shape == (2 * len(pairs) + 2, 16)
    # One sequence a row, and no mask is needed: padding comes last.
    assert all(len(set(row) - {NOBODY}) <= 1 for row in batch.segments)
    assert_each_answer_is_predicted_from_its_beginning(batch, pairs)


def test_the_two_answers_of_a_pair_share_its_prompt_where_it_is_the_same():
    shared, apart = (make_pair(0, 50, 3, 4, same_prompt=same) for same in (True, False))
    assert packed_len(shared) == 49 + 3 + 4
    assert packed_len(apart) == 50 + 2 + 50 + 3


@given(st.lists(st.integers(1, 20), max_size=30))
def test_rows_hold_every_item_once_and_hardly_more_rows_than_needed(lengths: list[int]):
    rows = fill_rows(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 20 for row in rows)
    # Of any two rows, what the second holds did not fit into the first.
    assert len(rows) <= 2 * -(-sum(lengths) // 20)


def test_a_shape_holds_every_batch_of_a_run():
    batches = [[make_pair(index, 5, 30 * index + 1, 10) for index in indices] for indices in ((0, 0), (3, 3, 2), (1,))]
    shape = packed_shape(batches, 1)
    # The second batch has pairs of 105, 105 and 75 tokens.
    assert (shape.num_rows, shape.row_len) == (3, 128)
    for batch in batches:
        assert_each_answer_is_predicted_from_its_beginning(
            packed_rows(_renumbered(batch), shape, PAD), _renumbered(batch)
        )


def _renumbered(batch: list[TokenizedPair]) -> list[TokenizedPair]:
    """Equal pairs with tokens of their own."""
    return [
        make_pair(index, pair.chosen_response_start, len(pair.chosen_tokens) - 5, len(pair.rejected_tokens) - 5)
        for index, pair in enumerate(batch)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_a_sweep_serves_each_pair_once_the_last_batch_with_what_is_left(packing: bool):
    pairs = [make_pair(index, 2, 3, 4) for index in range(5)]
    sweep = PairSweep(pairs, batch_size=2, seq_len=8, pad_id=PAD, packing=packing)
    batches = list(sweep.batches())
    assert [len(batch.pair_rows) for batch in batches] == [2, 2, 1]
    assert {batch.tokens.shape for batch in batches} == {(sweep.shape.num_rows, sweep.shape.row_len)}
    for number, batch in enumerate(batches):
        assert_each_answer_is_predicted_from_its_beginning(batch, pairs[2 * number : 2 * number + 2])


def test_a_sweep_over_nothing_or_over_too_long_a_pair_is_refused():
    with pytest.raises(DataError, match="no pairs to evaluate on"):
        PairSweep([], batch_size=2, seq_len=8, pad_id=PAD)
    with pytest.raises(DataError, match=r"'p0' has 9 tokens, more than seq_len 8"):
        PairSweep([make_pair(0, 5, 4, 1)], batch_size=2, seq_len=8, pad_id=PAD)
