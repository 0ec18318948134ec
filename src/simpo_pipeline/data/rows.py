"""Pairs as the rows of arrays of one fixed shape: padded, a row for each sequence, or packed, several pairs a row.

In packed rows the two answers of a pair share its prompt:

    tokens      prompt without its last token | last of prompt, chosen answer | last of prompt, rejected answer
    branches    0                             | 1                             | 2
    positions   0 ..                          | goes on from the prompt       | goes on from the prompt too

A token reads earlier tokens of its segment (its pair) on branch 0 and on its own, so each answer sees just what it
would see in a row of its own, and the prompt is computed once. An answer's last token is predicted, but never fed.

Numpy only; knows nothing of devices. Every process builds the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from simpo_pipeline.data.pairs import TokenizedPair

# Rows are so many tokens long, or a multiple: products and attention like it.
_ROW_STEP = 64
_PREDICTIONS_STEP = 8
# Attention over a row of so many tokens costs as much as all else.
_COSTLY_ROW_LEN = 8192
_TRIED_BATCHES = 32
NOBODY = -1


@dataclass(frozen=True)
class RowShape:
    """The shape of an update's arrays.

    Attributes:
        num_groups: Into so many groups the rows fall, neighbours together: what one device computes at a time.
        num_predictions: Predictions that a group has room for.
    """

    num_rows: int
    row_len: int
    num_groups: int
    num_predictions: int

    def row_of(self, index: int) -> int:
        """Where the row that is filled as number `index` lies: groups are filled evenly."""
        return index % self.num_groups * (self.num_rows // self.num_groups) + index // self.num_groups


@dataclass(frozen=True, eq=False)
class RowBatch:
    """The rows of one update.

    Attributes:
        positions: Of each token in its sequence.
        segments: Which tokens belong together; `NOBODY` for padding.
        branches: 0 for tokens that the whole segment may read, else the branch that may.
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
    """A shape that holds each of the batches packed, in about as few places as it can be done with."""
    lengths = [[packed_len(pair) for pair in batch] for batch in batches]
    longest = _rounded_up(max(map(max, lengths)), _ROW_STEP)
    # All batches are tried with the best length only: there may be thousands.
    some = lengths[:: -(-len(lengths) // _TRIED_BATCHES)]
    row_len = min(
        range(longest, 2 * longest, _ROW_STEP),
        key=lambda row_len: _num_rows(some, row_len, num_groups) * row_len * (1 + row_len / _COSTLY_ROW_LEN),
    )
    return _with_predictions(RowShape(_num_rows(lengths, row_len, num_groups), row_len, num_groups, 1), batches, True)


def padded_shape(
    batches: Sequence[Sequence[TokenizedPair]], batch_size: int, seq_len: int, num_groups: int
) -> RowShape:
    """The shape of batches of `batch_size` pairs with a row of `seq_len` tokens for each sequence."""
    return _with_predictions(RowShape(2 * batch_size, seq_len, num_groups, 1), batches, False)


def widest_shape(batch_size: int, seq_len: int, num_groups: int) -> RowShape:
    """A `padded_shape` that holds any batches: all but the first token of each sequence are an answer's."""
    num_rows = 2 * batch_size
    num_predictions = _rounded_up(num_rows // num_groups * (seq_len - 1), _PREDICTIONS_STEP)
    return RowShape(num_rows, seq_len, num_groups, num_predictions)


def packed_rows(pairs: Sequence[TokenizedPair], shape: RowShape, pad_id: int) -> RowBatch:
    """The batch in packed rows; rows beyond those that it fills are empty."""
    rows = {
        shape.row_of(number): row for number, row in enumerate(fill_rows([packed_len(p) for p in pairs], shape.row_len))
    }
    pieces = {
        number: [piece for index in row for piece in _packed_pieces(pairs[index], index)]
        for number, row in rows.items()
    }
    pair_rows = np.zeros(len(pairs), np.int32)
    for number, row in rows.items():
        pair_rows[row] = number
    return _laid_out(pieces, pairs, pair_rows, shape, pad_id)


def padded_rows(pairs: Sequence[TokenizedPair], shape: RowShape, pad_id: int) -> RowBatch:
    """The batch with each sequence in a row of its own: chosen and rejected of pair p in rows 2 * p and 2 * p + 1."""
    pieces = {
        2 * index + side: [_Piece(tokens[:-1], 0, 0, 0, tokens[start:], 2 * index + side)]
        for index, pair in enumerate(pairs)
        for side, (tokens, start) in enumerate(_sides(pair))
    }
    return _laid_out(pieces, pairs, 2 * np.arange(len(pairs), dtype=np.int32), shape, pad_id)


def packed_len(pair: TokenizedPair) -> int:
    """Places that a pair takes in a packed row."""
    return sum(len(piece.tokens) for piece in _packed_pieces(pair, 0))


def fill_rows(lengths: Sequence[int], row_len: int) -> list[list[int]]:
    """Which items go into which row: the longest first, each into the first row with room (first fit decreasing)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        row = next((row for row, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_len)
        rows[row].append(index)
        room[row] -= lengths[index]
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
        predict_at,
        targets,
        sequences,
        answer_lens=np.array([[len(t) - first for t, first in _sides(pair)] for pair in pairs], np.float32),
        pair_rows=pair_rows,
        num_tokens=sum(pair.num_tokens for pair in pairs),
        padding_share=1 - sum(len(piece.tokens) for pieces in rows.values() for piece in pieces) / tokens.size,
    )


def _num_rows(batches: Sequence[Sequence[int]], row_len: int, num_groups: int) -> int:
    """Rows of this length that hold each batch of items of these lengths, in groups of equal size."""
    return _rounded_up(max(len(fill_rows(lengths, row_len)) for lengths in batches), num_groups)


def _with_predictions(shape: RowShape, batches: Sequence[Sequence[TokenizedPair]], packed: bool) -> RowShape:
    """The shape with room for the predictions of each of the batches."""
    rows_per_group, most = shape.num_rows // shape.num_groups, 1
    for batch in batches:
        held = [0] * shape.num_groups
        filled = (
            fill_rows([packed_len(pair) for pair in batch], shape.row_len)
            if packed
            else [[i] for i in range(len(batch))]
        )
        for number, row in enumerate(filled):
            group = (shape.row_of(number) if packed else 2 * number) // rows_per_group
            held[group] += sum(len(tokens) - start for index in row for tokens, start in _sides(batch[index]))
        most = max(most, *held)
    return dataclasses.replace(shape, num_predictions=_rounded_up(most, _PREDICTIONS_STEP))


def _sides(pair: TokenizedPair) -> tuple[tuple[Int32[np.ndarray, " _"], int], tuple[Int32[np.ndarray, " _"], int]]:
    return (pair.chosen_tokens, pair.chosen_response_start), (pair.rejected_tokens, pair.rejected_response_start)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
