"""A single pass over all pairs, in order, for an evaluation."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from simpo_pipeline.data.pairs import TokenizedPair, check_lengths
from simpo_pipeline.data.rows import RowBatch, RowShape, packed_rows, packed_shape, padded_rows, padded_shape
from simpo_pipeline.errors import DataError


@dataclass(frozen=True, eq=False)
class PairSweep:
    """Serves each pair once, `batch_size` at a time, as rows of one shape; fields as in `loader.PairLoader`.

    Raises:
        DataError: there are no pairs, or a pair is longer than seq_len; the message names it.
    """

    pairs: Sequence[TokenizedPair]
    batch_size: int
    seq_len: int
    pad_id: int
    packing: bool = False
    num_groups: int = 1
    earlier_shape: RowShape | None = None

    def __post_init__(self) -> None:
        if not self.pairs:
            raise DataError("there are no pairs to evaluate on; hold some out, or leave out the evaluation")
        check_lengths(self.pairs, self.seq_len)

    @functools.cached_property
    def shape(self) -> RowShape:
        """The shape of every batch."""
        if self.packing:
            return packed_shape(self._batches, self.num_groups, self.earlier_shape)
        return padded_shape(self._batches, self.batch_size, self.seq_len, self.num_groups, self.earlier_shape)

    def batches(self) -> Iterator[RowBatch]:
        """Yield the batches; the last one may have fewer pairs."""
        rows = packed_rows if self.packing else padded_rows
        for batch in self._batches:
            yield rows(batch, self.shape, self.pad_id)

    @property
    def _batches(self) -> list[Sequence[TokenizedPair]]:
        return [self.pairs[start : start + self.batch_size] for start in range(0, len(self.pairs), self.batch_size)]
