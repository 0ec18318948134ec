"""Pairs as the rows of arrays of one fixed shape: padded, a row for each sequence, or packed, a row for each group.

A packed row holds the pairs of what one device computes at a time, the longest first. The two answers of a pair share
its prompt:

    tokens      prompt without its last token | last of prompt, chosen answer | last of prompt, rejected answer
    branches    0                             | 1                             | 2
    positions   0 ..                          | goes on from the prompt       | goes on from the prompt too

A token reads earlier tokens of its segment (its pair) on branch 0 and on its own, so each answer sees just what it
would see in a row of its own, and the prompt is computed once. An answer's last token is predicted, but never fed.
Attention need not look at the whole row: each pair lies in a slot, and slots have lengths that hold for the whole run.

Numpy only; knows nothing of devices. Every process builds the same.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from simpo_pipeline.data.pairs import TokenizedPair

# Rows and slots are so many tokens long, or a multiple: products and attention like it.
_ROW_STEP = 64
_SLOT_STEP = 32
_PREDICTIONS_STEP = 8
# Slots of one length are attended together, and each length is a piece of program of its own.
_MOST_SLOT_LENS = 6
NOBODY = -1


@dataclass(frozen=True)
class RowShape:
    """The shape of an update's arrays.

    Attributes:
        num_groups: Into so many groups the rows fall, neighbours together: what one device computes at a time.
        num_predictions: Predictions that a group has room for.
        slot_lens: Of packed rows, the longest first: a row's pairs, by their lengths, have no more tokens than these.
            Empty where attention over the whole row costs no more.
    """

    num_rows: int
    row_len: int
    num_groups: int
    num_predictions: int
    slot_lens: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class RowBatch:
    """The rows of one update.

    Attributes:
        positions: Of each token in its sequence.
        segments: Which tokens belong together; `NOBODY` for padding.
        branches: 0 for tokens that the whole segment may read, else the branch that may.
        slots: First place and tokens of the pair in each slot of a packed row; (0, 0) where there is none.
        predict_at: Where a token of an answer is predicted, that is the place of the token before it: counted from the
            first token of the group's first row.
        targets: The token predicted there.
        sequences: Whose it is: 2 * pair for the chosen answer, 2 * pair + 1 for the rejected one, `NOBODY` for none.
        answer_lens: Tokens of each pair's two answers.
        pair_rows: A row that each pair lies in; two answers in rows of their own are neighbours.
        num_tokens: Tokens of all sequences, prompts counted for each answer, without padding.
        padding_share: The part of the rows' places that holds no token.
    """

    tokens: Int32[np.ndarray, "rows row_len"]
    positions: Int32[np.ndarray, "rows row_len"]
    segments: Int32[np.ndarray, "rows row_len"]
    branches: Int32[np.ndarray, "rows row_len"]
    slots: Int32[np.ndarray, "rows slots 2"]
    predict_at: Int32[np.ndarray, "groups predictions"]
    targets: Int32[np.ndarray, "groups predictions"]
    sequences: Int32[np.ndarray, "groups predictions"]
    answer_lens: Float32[np.ndarray, "pairs 2"]
    pair_rows: Int32[np.ndarray, " pairs"]
    num_tokens: int
    padding_share: float


class _Piece(NamedTuple):
    """Tokens that lie side by side in a row, all of one sequence and one branch."""

    tokens: Int32[np.ndarray, " piece"]
    first_position: int
    segment: int
    branch: int
    targets: Int32[np.ndarray, " predicted"]  # predicted by the last so many tokens of the piece
    sequence: int


def packed_shape(batches: Sequence[Sequence[TokenizedPair]], num_groups: int) -> RowShape:
    """The smallest shape that holds each of the batches packed, but for rounding up."""
    by_slot: list[int] = []
    row_len = num_predictions = 1
    for batch in batches:
        lengths = [packed_len(pair) for pair in batch]
        for row in fill_rows(lengths, num_groups):
            in_row = [lengths[index] for index in row]
            by_slot = [max(both) for both in itertools.zip_longest(by_slot, in_row, fillvalue=0)]
            row_len = max(row_len, sum(in_row))
            num_predictions = max(num_predictions, sum(_num_answer_tokens(batch[index]) for index in row))
    row_len = _rounded_up(row_len, _ROW_STEP)
    slot_lens = _few_lens([_rounded_up(length, _SLOT_STEP) for length in by_slot])
    # All slots are attended, in every row: of few pairs whose lengths vary much from row to row they are long.
    pays = sum(length**2 for length in slot_lens) < row_len**2
    num_predictions = _rounded_up(num_predictions, _PREDICTIONS_STEP)
    return RowShape(num_groups, row_len, num_groups, num_predictions, slot_lens if pays else ())


def padded_shape(
    batches: Sequence[Sequence[TokenizedPair]], batch_size: int, seq_len: int, num_groups: int
) -> RowShape:
    """The shape of batches of `batch_size` pairs with a row of `seq_len` tokens for each sequence."""
    rows_per_group, most = 2 * batch_size // num_groups, 1
    for batch in batches:
        held = [0] * num_groups
        for number, pair in enumerate(batch):
            held[2 * number // rows_per_group] += _num_answer_tokens(pair)
        most = max(most, *held)
    return RowShape(2 * batch_size, seq_len, num_groups, _rounded_up(most, _PREDICTIONS_STEP))


def widest_shape(batch_size: int, seq_len: int, num_groups: int) -> RowShape:
    """A `padded_shape` that holds any batches: all but the first token of each sequence are an answer's."""
    num_rows = 2 * batch_size
    num_predictions = _rounded_up(num_rows // num_groups * (seq_len - 1), _PREDICTIONS_STEP)
    return RowShape(num_rows, seq_len, num_groups, num_predictions)


def packed_rows(pairs: Sequence[TokenizedPair], shape: RowShape, pad_id: int) -> RowBatch:
    """The batch in packed rows; ValueError where a pair is longer than its slot."""
    lengths = [packed_len(pair) for pair in pairs]
    slots = np.zeros((shape.num_rows, len(shape.slot_lens), 2), np.int32)
    pair_rows = np.zeros(len(pairs), np.int32)
    pieces: dict[int, list[_Piece]] = {}
    for number, row in enumerate(fill_rows(lengths, shape.num_rows)):
        pieces[number] = [piece for index in row for piece in _packed_pieces(pairs[index], index)]
        pair_rows[row] = number
        if shape.slot_lens:
            in_row = [lengths[index] for index in row]
            if any(length > most for length, most in zip(in_row, shape.slot_lens, strict=False)):
                raise ValueError(f"pairs of {in_row} tokens in slots of {shape.slot_lens}: the shape of other batches")
            slots[number, : len(row), 0] = np.cumsum([0, *in_row])[:-1]
            slots[number, : len(row), 1] = in_row
    return _laid_out(pieces, pairs, pair_rows, slots, shape, pad_id)


def padded_rows(pairs: Sequence[TokenizedPair], shape: RowShape, pad_id: int) -> RowBatch:
    """The batch with each sequence in a row of its own: chosen and rejected of pair p in rows 2 * p and 2 * p + 1."""
    pieces = {
        2 * index + side: [_Piece(tokens[:-1], 0, 0, 0, tokens[start:], 2 * index + side)]
        for index, pair in enumerate(pairs)
        for side, (tokens, start) in enumerate(_sides(pair))
    }
    no_slots = np.zeros((shape.num_rows, 0, 2), np.int32)
    return _laid_out(pieces, pairs, 2 * np.arange(len(pairs), dtype=np.int32), no_slots, shape, pad_id)


def packed_len(pair: TokenizedPair) -> int:
    """Places that a pair takes in a packed row."""
    return sum(len(piece.tokens) for piece in _packed_pieces(pair, 0))


def fill_rows(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Which items go into which row: the longest first, each into the row that is the least full."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    by_fill = [(0, number) for number in range(num_rows)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        filled, number = heapq.heappop(by_fill)
        rows[number].append(index)
        heapq.heappush(by_fill, (filled + lengths[index], number))
    return rows


def _packed_pieces(pair: TokenizedPair, index: int) -> list[_Piece]:
    (chosen, start), (rejected, rejected_start) = _sides(pair)
    if start == rejected_start and np.array_equal(chosen[:start], rejected[:start]):
        shared = start - 1
        segments, branches = (2 * index, 2 * index), (1, 2)
        pieces = [_Piece(chosen[:shared], 0, 2 * index, 0, chosen[:0], NOBODY)] if shared else []
    else:  # a chat template may render the two prompts differently
        shared, segments, branches, pieces = 0, (2 * index, 2 * index + 1), (0, 0), []
    for side, (tokens, first) in enumerate(_sides(pair)):
        fed = tokens[shared:-1]
        pieces.append(_Piece(fed, shared, segments[side], branches[side], tokens[first:], 2 * index + side))
    return pieces


def _laid_out(
    rows: Mapping[int, Sequence[_Piece]],
    pairs: Sequence[TokenizedPair],
    pair_rows: Int32[np.ndarray, " pairs"],
    slots: Int32[np.ndarray, "rows slots 2"],
    shape: RowShape,
    pad_id: int,
) -> RowBatch:
    by_token, by_prediction = (shape.num_rows, shape.row_len), (shape.num_groups, shape.num_predictions)
    tokens, segments = np.full(by_token, pad_id, np.int32), np.full(by_token, NOBODY, np.int32)
    positions, branches = np.zeros(by_token, np.int32), np.zeros(by_token, np.int32)
    predict_at, targets = np.zeros(by_prediction, np.int32), np.zeros(by_prediction, np.int32)
    sequences = np.full(by_prediction, NOBODY, np.int32)
    num_predicted = [0] * shape.num_groups
    for row, pieces in sorted(rows.items()):
        group, row_in_group = divmod(row, shape.num_rows // shape.num_groups)
        start = 0
        for piece in pieces:
            length, count = len(piece.tokens), len(piece.targets)
            at = row, slice(start, start + length)
            tokens[at], segments[at], branches[at] = piece.tokens, piece.segment, piece.branch
            positions[at] = np.arange(piece.first_position, piece.first_position + length)
            start += length
            places = group, slice(num_predicted[group], num_predicted[group] + count)
            predict_at[places] = row_in_group * shape.row_len + np.arange(start - count, start)
            targets[places], sequences[places] = piece.targets, piece.sequence
            num_predicted[group] += count
    return RowBatch(
        tokens,
        positions,
        segments,
        branches,
        slots,
        predict_at,
        targets,
        sequences,
        answer_lens=np.array([[len(t) - first for t, first in _sides(pair)] for pair in pairs], np.float32),
        pair_rows=pair_rows,
        num_tokens=sum(pair.num_tokens for pair in pairs),
        padding_share=1 - sum(len(piece.tokens) for pieces in rows.values() for piece in pieces) / tokens.size,
    )


def _few_lens(slot_lens: Sequence[int]) -> tuple[int, ...]:
    """The same lengths, longest first, some of them raised until there are few: those that cost the least attention."""
    lens = list(slot_lens)
    while len(distinct := sorted(set(lens))) > _MOST_SLOT_LENS:
        shorter, longer = min(
            itertools.pairwise(distinct), key=lambda both: lens.count(both[0]) * (both[1] ** 2 - both[0] ** 2)
        )
        lens = [longer if length == shorter else length for length in lens]
    return tuple(lens)


def _num_answer_tokens(pair: TokenizedPair) -> int:
    return sum(len(tokens) - start for tokens, start in _sides(pair))


def _sides(pair: TokenizedPair) -> tuple[tuple[Int32[np.ndarray, " _"], int], tuple[Int32[np.ndarray, " _"], int]]:
    return (pair.chosen_tokens, pair.chosen_response_start), (pair.rejected_tokens, pair.rejected_response_start)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
