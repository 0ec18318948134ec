"""Pairs as rows of arrays with a fixed shape: padded (one row per sequence) or packed (one row per group).

A packed row contains the pairs that one device computes at a time, longest first. The two answers of a pair share its
prompt:

    tokens      prompt without its last token | last of prompt, chosen answer | last of prompt, rejected answer
    branches    0                             | 1                             | 2
    positions   0 ..                          | continue from the prompt      | continue from the prompt

A token attends to the earlier tokens of its segment (its pair) on branch 0 and on its own branch. Each answer thus
sees exactly what it would see in a row of its own, and the prompt is computed once. The last token of an answer is
predicted but never fed to the model. Attention does not need the whole row: each pair occupies a slot, and the slot
lengths are the same for all updates that read the same pairs.

Numpy only; this module does not know devices. Every process builds the same arrays.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from simpo_pipeline.data.pairs import TokenizedPair

# Lengths of rows and slots, in tokens, are multiples of these, which matmuls and attention prefer.
_ROW_STEP = 64
_SLOT_STEP = 32
_PREDICTIONS_STEP = 8
# Attention handles the slots of one length together, and each distinct length adds code to the program.
_MOST_SLOT_LENS = 6
PADDING = -1


@dataclass(frozen=True)
class RowShape:
    """The shape of an update's arrays.

    Attributes:
        num_groups: Number of groups of adjacent rows. One device computes one group at a time.
        num_predictions: Maximum number of predictions in a group.
        slot_lens: Lengths of the slots of a packed row, longest first. The pairs of a row, sorted by length, fit into
            the slots in this order. Empty if attention over the whole row is no more expensive.
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
        positions: Position of each token in its sequence.
        segments: Id of each token's segment, the tokens that belong together; `PADDING` for padding.
        branches: 0 for tokens that the whole segment may attend to; otherwise the only branch that may.
        slots: Position in the row of the first token, and number of tokens, of the pair in each slot of a packed row;
            (0, 0) for an empty slot.
        predict_at: Index of the token before each predicted token of an answer, counted from the first token of the
            group's first row.
        targets: The predicted tokens.
        sequences: Sequence of each target: 2 * pair for the chosen answer, 2 * pair + 1 for the rejected one, `PADDING`
            for padding.
        answer_lens: Number of tokens in the two answers of each pair.
        pair_rows: Index of a row that contains the pair. If its two answers have rows of their own, these are adjacent.
        num_tokens: Number of tokens in all sequences, without padding. A prompt counts once for each answer.
        padding_share: Fraction of the rows' positions that are padding.
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
    """Adjacent tokens of a row that belong to one sequence and one branch."""

    tokens: Int32[np.ndarray, " piece"]
    first_position: int
    segment: int
    branch: int
    targets: Int32[np.ndarray, " predicted"]  # predicted by the last len(targets) tokens of the piece
    sequence: int


def packed_shape(
    batches: Sequence[Sequence[TokenizedPair]], num_groups: int, earlier: RowShape | None = None
) -> RowShape:
    """Return the smallest shape, up to rounding, that fits each of the batches in packed rows.

    A program is compiled for each shape. So `earlier`, the shape of other pairs of the run, is returned if it fits.
    Otherwise, every size is at least that of `earlier`, and sizes that grow do so by a quarter or more.
    """
    by_slot: list[int] = []
    row_len = num_predictions = 1
    for batch in batches:
        lengths = [packed_len(pair) for pair in batch]
        for row in fill_rows(lengths, num_groups):
            in_row = [lengths[index] for index in row]
            by_slot = [max(both) for both in itertools.zip_longest(by_slot, in_row, fillvalue=0)]
            row_len = max(row_len, sum(in_row))
            num_predictions = max(num_predictions, sum(_num_answer_tokens(batch[index]) for index in row))
    if earlier is not None:
        if earlier.slot_lens:
            longest_first = itertools.zip_longest(by_slot, earlier.slot_lens, fillvalue=0)
            by_slot = [_grown(length, most) for length, most in longest_first]
            by_slot = list(itertools.accumulate(reversed(by_slot), max))[::-1]
        row_len = _grown(row_len, earlier.row_len)
        num_predictions = _grown(num_predictions, earlier.num_predictions)
        fits = (row_len, num_predictions) == (earlier.row_len, earlier.num_predictions)
        if fits and (not earlier.slot_lens or by_slot == list(earlier.slot_lens)):
            return earlier
    row_len = _rounded_up(row_len, _ROW_STEP)
    slot_lens = _merge_lens([_rounded_up(length, _SLOT_STEP) for length in by_slot])
    # Attention covers all slots of every row. They are long if rows have few pairs whose lengths vary between rows.
    slots_pay = sum(length**2 for length in slot_lens) < row_len**2
    if earlier is not None and not earlier.slot_lens:
        slots_pay = False  # the lengths of the earlier pairs are not known, and they must fit too
    num_predictions = _rounded_up(num_predictions, _PREDICTIONS_STEP)
    return RowShape(num_groups, row_len, num_groups, num_predictions, slot_lens if slots_pay else ())


def padded_shape(
    batches: Sequence[Sequence[TokenizedPair]],
    batch_size: int,
    seq_len: int,
    num_groups: int,
    earlier: RowShape | None = None,
) -> RowShape:
    """Return the shape of batches of `batch_size` pairs with one row of `seq_len` tokens per sequence.

    `earlier`, the shape of other pairs of the run, is returned if these fit. Otherwise, the shape fits any batch, so no
    third shape is needed. It is not used from the start because predictions that no batch needs take time, and change
    the order of sums.
    """
    rows_per_group, most = 2 * batch_size // num_groups, 1
    for batch in batches:
        num_predictions = [0] * num_groups
        for number, pair in enumerate(batch):
            num_predictions[2 * number // rows_per_group] += _num_answer_tokens(pair)
        most = max(most, *num_predictions)
    if earlier is not None:
        return earlier if most <= earlier.num_predictions else max_padded_shape(batch_size, seq_len, num_groups)
    return RowShape(2 * batch_size, seq_len, num_groups, _rounded_up(most, _PREDICTIONS_STEP))


def max_padded_shape(batch_size: int, seq_len: int, num_groups: int) -> RowShape:
    """Return a `padded_shape` that fits any batch: every token of a sequence but the first may belong to an answer."""
    num_rows = 2 * batch_size
    num_predictions = _rounded_up(num_rows // num_groups * (seq_len - 1), _PREDICTIONS_STEP)
    return RowShape(num_rows, seq_len, num_groups, num_predictions)


def packed_rows(pairs: Sequence[TokenizedPair], shape: RowShape, pad_id: int) -> RowBatch:
    """Return the batch in packed rows.

    Raises:
        ValueError: a pair is longer than its slot.
    """
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
                raise ValueError(
                    f"pairs of {in_row} tokens do not fit slots of {shape.slot_lens}: the shape is for other batches"
                )
            slots[number, : len(row), 0] = np.cumsum([0, *in_row])[:-1]
            slots[number, : len(row), 1] = in_row
    return _build_batch(pieces, pairs, pair_rows, slots, shape, pad_id)


def padded_rows(pairs: Sequence[TokenizedPair], shape: RowShape, pad_id: int) -> RowBatch:
    """Return the batch with one row per sequence: rows 2 * p and 2 * p + 1 are chosen and rejected of pair p."""
    pieces = {
        2 * index + side: [_Piece(tokens[:-1], 0, 0, 0, tokens[start:], 2 * index + side)]
        for index, pair in enumerate(pairs)
        for side, (tokens, start) in enumerate(_sides(pair))
    }
    no_slots = np.zeros((shape.num_rows, 0, 2), np.int32)
    return _build_batch(pieces, pairs, 2 * np.arange(len(pairs), dtype=np.int32), no_slots, shape, pad_id)


def packed_len(pair: TokenizedPair) -> int:
    """Return the number of positions that a pair takes in a packed row."""
    return sum(len(piece.tokens) for piece in _packed_pieces(pair, 0))


def fill_rows(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Return the items of each row: items are assigned longest first, each to the row that is the least full."""
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
        pieces = [_Piece(chosen[:shared], 0, 2 * index, 0, chosen[:0], PADDING)] if shared else []
    else:  # a chat template may render the two prompts differently
        shared, segments, branches, pieces = 0, (2 * index, 2 * index + 1), (0, 0), []
    for side, (tokens, first) in enumerate(_sides(pair)):
        fed = tokens[shared:-1]
        pieces.append(_Piece(fed, shared, segments[side], branches[side], tokens[first:], 2 * index + side))
    return pieces


def _build_batch(
    rows: Mapping[int, Sequence[_Piece]],
    pairs: Sequence[TokenizedPair],
    pair_rows: Int32[np.ndarray, " pairs"],
    slots: Int32[np.ndarray, "rows slots 2"],
    shape: RowShape,
    pad_id: int,
) -> RowBatch:
    by_token, by_prediction = (shape.num_rows, shape.row_len), (shape.num_groups, shape.num_predictions)
    tokens, segments = np.full(by_token, pad_id, np.int32), np.full(by_token, PADDING, np.int32)
    positions, branches = np.zeros(by_token, np.int32), np.zeros(by_token, np.int32)
    predict_at, targets = np.zeros(by_prediction, np.int32), np.zeros(by_prediction, np.int32)
    sequences = np.full(by_prediction, PADDING, np.int32)
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
            predicted = group, slice(num_predicted[group], num_predicted[group] + count)
            predict_at[predicted] = row_in_group * shape.row_len + np.arange(start - count, start)
            targets[predicted], sequences[predicted] = piece.targets, piece.sequence
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


def _grown(needed: int, earlier: int) -> int:
    """Return `earlier` if it is enough, otherwise a size that is larger by a quarter or more."""
    return earlier if needed <= earlier else max(needed, earlier + -(-earlier // 4))


def _merge_lens(slot_lens: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths, longest first, with some raised until at most `_MOST_SLOT_LENS` are distinct.

    The lengths whose increase adds the least attention are raised.
    """
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
