"""Padded and packed rows: every answer token is predicted once, from exactly the tokens before it in its sequence."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.data.rows import (
    PADDING,
    RowBatch,
    RowShape,
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
    """Return a pair whose tokens differ from each other and from those of all other pairs."""
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
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=24
).map(lambda sizes: [make_pair(index, *lens, same_prompt=same) for index, (*lens, same) in enumerate(sizes)])


def read_back(batch: RowBatch, sequence: int) -> tuple[list[int], list[list[int]]]:
    """Return the predicted answer of a sequence, and the tokens that the model sees for each of its predictions."""
    groups, columns = np.nonzero(batch.sequences == sequence)
    assert len(set(groups)) == 1, "an answer must be predicted in a single group"
    rows_per_group, row_len = batch.tokens.shape[0] // batch.sequences.shape[0], batch.tokens.shape[1]
    seen = []
    for at in batch.predict_at[groups[0], columns]:
        row, index = groups[0] * rows_per_group + at // row_len, at % row_len
        tokens, segments, branches, positions = (
            array[row] for array in (batch.tokens, batch.segments, batch.branches, batch.positions)
        )
        earlier = np.arange(row_len) <= index
        readable = (segments == segments[index]) & ((branches == 0) | (branches == branches[index])) & earlier
        assert segments[index] != PADDING
        assert positions[readable].tolist() == list(range(readable.sum()))
        seen.append(tokens[readable].tolist())
    return batch.targets[groups[0], columns].tolist(), seen


def assert_each_answer_is_predicted_from_its_beginning(batch: RowBatch, pairs: list[TokenizedPair]) -> None:
    assert set(batch.sequences.reshape(-1)) - {PADDING} == set(range(2 * len(pairs)))
    for index, pair in enumerate(pairs):
        sides = (pair.chosen_tokens, pair.chosen_response_start), (pair.rejected_tokens, pair.rejected_response_start)
        for side, (tokens, start) in enumerate(sides):
            answer, seen = read_back(batch, 2 * index + side)
            assert answer == tokens[start:].tolist()
            assert seen == [tokens[:end].tolist() for end in range(start, len(tokens))]
            assert batch.answer_lens[index, side] == len(answer)
    held = (batch.segments != PADDING).sum()
    assert batch.padding_share == pytest.approx(1 - held / batch.tokens.size)
    assert (batch.tokens[batch.segments == PADDING] == PAD).all()
    assert batch.num_tokens == sum(pair.num_tokens for pair in pairs)


def assert_each_token_is_in_the_slot_of_its_pair(batch: RowBatch, shape: RowShape, num_pairs: int) -> None:
    if not shape.slot_lens:
        assert batch.slots.size == 0
        return
    seen = set()
    for row, slots in enumerate(batch.slots):
        held = np.zeros(shape.row_len, int)
        for (first, tokens), most in zip(slots, shape.slot_lens, strict=True):
            assert tokens <= most <= shape.row_len
            held[first : first + tokens] += 1
            seen |= (pairs := set(batch.segments[row, first : first + tokens] // 2))
            assert len(pairs) == (tokens > 0)
        np.testing.assert_array_equal(held, batch.segments[row] != PADDING)
    assert seen == set(range(num_pairs))


@settings(max_examples=40)
@given(PAIRS)
def test_packed_rows_contain_every_answer_and_its_context(pairs: list[TokenizedPair]):
    shape = packed_shape([pairs], 2)
    batch = packed_rows(pairs, shape, PAD)
    assert batch.tokens.shape == (shape.num_rows, shape.row_len) and shape.num_rows == 2
    assert_each_answer_is_predicted_from_its_beginning(batch, pairs)
    assert_each_token_is_in_the_slot_of_its_pair(batch, shape, len(pairs))
    for index, row in enumerate(batch.pair_rows):
        assert (batch.tokens[row] == pairs[index].chosen_tokens[0]).any()


@settings(max_examples=40)
@given(PAIRS)
def test_padded_rows_contain_every_answer_and_its_context(pairs: list[TokenizedPair]):
    batch = padded_rows(pairs, padded_shape([pairs], len(pairs) + 1, 16, 1), PAD)
    assert batch.tokens.shape == (2 * len(pairs) + 2, 16)
    # There is one sequence per row, and no mask is needed: padding comes last.
    assert all(len(set(row) - {PADDING}) <= 1 for row in batch.segments)
    assert_each_answer_is_predicted_from_its_beginning(batch, pairs)


def test_both_answers_of_a_pair_share_the_prompt_if_it_is_the_same():
    shared, apart = (make_pair(0, 50, 3, 4, same_prompt=same) for same in (True, False))
    assert packed_len(shared) == 49 + 3 + 4
    assert packed_len(apart) == 50 + 2 + 50 + 3


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 4))
def test_rows_contain_every_item_once_and_are_nearly_balanced(lengths: list[int], num_rows: int):
    rows = fill_rows(lengths, num_rows)
    assert len(rows) == num_rows
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        held = [lengths[index] for index in row]
        assert held == sorted(held, reverse=True)
        # A row gets its last item while no other row is less full, so without that item it has at most its share.
        assert num_rows * sum(held[:-1]) <= sum(lengths)


def test_a_shape_fits_every_batch_of_a_run():
    batches = [[make_pair(index, 5, 30 * index + 1, 10) for index in indices] for indices in ((0, 0), (3, 3, 2), (1,))]
    shape = packed_shape(batches, 1)
    # The second batch has pairs of 105, 105 and 75 tokens; the first has two of 15.
    assert (shape.num_rows, shape.row_len, shape.slot_lens) == (1, 320, (128, 128, 96))
    for batch in batches:
        rows = packed_rows(_renumbered(batch), shape, PAD)
        assert_each_answer_is_predicted_from_its_beginning(rows, _renumbered(batch))
        assert_each_token_is_in_the_slot_of_its_pair(rows, shape, len(batch))


LONG_PAIRS = st.lists(
    st.tuples(st.integers(1, 99), st.integers(1, 90), st.integers(1, 90), st.booleans()), min_size=1, max_size=12
).map(lambda sizes: [make_pair(index, *lens, same_prompt=same) for index, (*lens, same) in enumerate(sizes)])


@settings(max_examples=10, deadline=None)
@given(st.lists(LONG_PAIRS, min_size=2, max_size=4), st.integers(1, 2))
# The first pair needs a slot as long as its row, so there are no slots; the second has more predictions but is shorter.
@example([[make_pair(0, 6, 1, 86, same_prompt=False)], [make_pair(0, 1, 1, 88, same_prompt=False)]], 1)
def test_the_shape_of_later_pairs_fits_them_and_all_earlier_ones(batches: list[list[TokenizedPair]], groups: int):
    shape = None
    for number, batch in enumerate(batches):
        before, shape = shape, packed_shape([batch], groups, shape)
        for earlier in batches[: number + 1]:
            # `packed_rows` raises if a row, a slot or the predictions have too little room.
            assert_each_answer_is_predicted_from_its_beginning(packed_rows(earlier, shape, PAD), earlier)
        assert list(shape.slot_lens) == sorted(shape.slot_lens, reverse=True)
        for done in batches[:number]:
            assert packed_shape([done], groups, before) == before
        assert packed_shape([batch], groups, shape) == shape


def test_pairs_that_become_longer_and_longer_need_few_shapes():
    padded, packed = [padded_shape([], 8, 200, 2)], [packed_shape([], 2)]
    for length in range(10, 150):
        batch = [make_pair(index, 5, length, length) for index in range(8)]
        padded.append(padded_shape([batch], 8, 200, 2, padded[-1]))
        packed.append(packed_shape([batch], 2, packed[-1]))
    sizes = [shape.num_predictions for shape in packed]
    assert sizes == sorted(sizes)
    # From 8 to about 1,200 by a quarter or more each time: log(150) / log(1.25) = 22.
    assert len(set(sizes)) <= 23 and len(set(packed)) <= 30
    # The second shape fits every batch: 8 sequences in each group, of 200 tokens without the first.
    assert {shape.num_predictions for shape in padded} == {8, 8 * 199}


def test_slots_are_used_only_where_they_cost_less_than_the_row():
    long, short = make_pair(0, 5, 60, 64), make_pair(1, 5, 2, 2)
    # A single slot would be no shorter than the row.
    assert packed_shape([[long]], 1).slot_lens == ()
    # Each row needs room for the longest pair of any row.
    assert packed_shape([[long, short], [short, short, short]], 2).slot_lens == ()
    assert packed_shape([[long, short, short]], 1).slot_lens == (128, 32, 32)


def test_a_pair_longer_than_its_slot_is_refused():
    short, long = make_pair(0, 5, 2, 2), make_pair(1, 5, 40, 40)
    with pytest.raises(ValueError, match="the shape is for other batches"):
        packed_rows([long], packed_shape([[short] * 9], 1), PAD)


def test_many_slot_lengths_are_rounded_up_to_a_few():
    lengths = [10, 100, 170, 220, 290, 350, 420, 480, 500]
    shape = packed_shape([[make_pair(index, 1, length, 1) for index, length in enumerate(lengths)]], 1)
    assert len(set(shape.slot_lens)) == 6
    assert all(slot >= length + 1 for slot, length in zip(shape.slot_lens, sorted(lengths, reverse=True), strict=True))
    assert list(shape.slot_lens) == sorted(shape.slot_lens, reverse=True)
    assert shape.slot_lens[-2:] == (128, 128)


def _renumbered(batch: list[TokenizedPair]) -> list[TokenizedPair]:
    """Return pairs of the same lengths with unique tokens."""
    return [
        make_pair(index, pair.chosen_response_start, len(pair.chosen_tokens) - 5, len(pair.rejected_tokens) - 5)
        for index, pair in enumerate(batch)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_a_sweep_yields_each_pair_once_and_a_smaller_last_batch(packing: bool):
    pairs = [make_pair(index, 2, 3, 4) for index in range(5)]
    sweep = PairSweep(pairs, batch_size=2, seq_len=8, pad_id=PAD, packing=packing)
    batches = list(sweep.batches())
    assert [len(batch.pair_rows) for batch in batches] == [2, 2, 1]
    assert {batch.tokens.shape for batch in batches} == {(sweep.shape.num_rows, sweep.shape.row_len)}
    for number, batch in enumerate(batches):
        assert_each_answer_is_predicted_from_its_beginning(batch, pairs[2 * number : 2 * number + 2])


def test_a_sweep_without_pairs_or_with_a_pair_that_is_too_long_is_refused():
    with pytest.raises(DataError, match="no pairs to evaluate on"):
        PairSweep([], batch_size=2, seq_len=8, pad_id=PAD)
    with pytest.raises(DataError, match=r"'p0' has 9 tokens, more than seq_len 8"):
        PairSweep([make_pair(0, 5, 4, 1)], batch_size=2, seq_len=8, pad_id=PAD)
