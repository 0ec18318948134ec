"""Batches of pairs in an order that is a pure function of (seed, step).

Law: lay the permutations of epochs 0, 1, 2, ... end to end; update `step` (0-based) reads the positions
[step * batch_size, (step + 1) * batch_size) of that line. So a run that stops and restarts at any step reads what it
would have read, every epoch visits each pair exactly once, and a batch may span epochs. A batch larger than the data
set is allowed and holds some pairs more than once.

Knows nothing of devices, shards or processes: every process builds the same whole batch in numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Int64

from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class PairBatch:
    """The rows of one update, padded at the right to one length.

    `*_loss_mask[p, t]` is 1 exactly where position t predicts a token of the answer, that is where `tokens[p, t + 1]`
    belongs to the answer, and 0 elsewhere; so its last column is always 0. `num_tokens` counts without padding.
    """

    chosen_tokens: Int32[np.ndarray, "pairs seq"]
    rejected_tokens: Int32[np.ndarray, "pairs seq"]
    chosen_loss_mask: Float32[np.ndarray, "pairs seq"]
    rejected_loss_mask: Float32[np.ndarray, "pairs seq"]
    num_tokens: int


def epoch_order(seed: int, epoch: int, num_pairs: int) -> Int64[np.ndarray, " pairs"]:
    """Return the permutation of range(num_pairs) in which `epoch` visits the pairs.

    Sorts raw Philox draws instead of calling Generator.permutation: numpy keeps the raw stream of a bit generator
    stable for ever, the algorithms of Generator it does not, and a run must restart under another numpy.
    """
    draws = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_pairs)
    return np.argsort(draws, kind="stable").astype(np.int64)


@dataclass(frozen=True, eq=False)
class PairLoader:
    """Serve batches of `batch_size` pairs padded to `seq_len` with `pad_id`.

    Raises:
        ConfigError: batch_size < 1, seq_len < 2, a negative seed or pad_id.
        DataError: there are no pairs, or one is longer than seq_len (named).
    """

    pairs: Sequence[TokenizedPair]
    batch_size: int
    seq_len: int
    seed: int
    pad_id: int

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("seq_len", 2), ("seed", 0), ("pad_id", 0)):
            got = getattr(self, name)
            if got < least:
                raise ConfigError(f"PairLoader: {name} is {got}; it must be at least {least}")
        if not self.pairs:
            raise DataError("there are no pairs to train on; check the source and how many were dropped as too long")
        for pair in self.pairs:
            if pair.longest > self.seq_len:
                raise DataError(
                    f"pair {pair.prompt_id!r} has {pair.longest} tokens, more than seq_len {self.seq_len}; "
                    f"raise the sequence length or prepare the pairs with a shorter max_length"
                )

    def batch(self, step: int) -> PairBatch:
        """Return the batch of update number `step` (0-based), the same at every call."""
        if step < 0:
            raise ConfigError(f"PairLoader: step is {step}; updates are counted from 0")
        rows = [self.pairs[index] for index in self.indices(step)]
        chosen_tokens, chosen_loss_mask = self._pad([(row.chosen_tokens, row.chosen_response_start) for row in rows])
        rejected_tokens, rejected_loss_mask = self._pad(
            [(row.rejected_tokens, row.rejected_response_start) for row in rows]
        )
        return PairBatch(
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            chosen_loss_mask=chosen_loss_mask,
            rejected_loss_mask=rejected_loss_mask,
            num_tokens=sum(row.num_tokens for row in rows),
        )

    def indices(self, step: int) -> list[int]:
        """Return which pairs update `step` reads, in row order, as indices into `pairs`."""
        first, num_pairs = step * self.batch_size, len(self.pairs)
        positions = range(first, first + self.batch_size)
        epochs = range(positions[0] // num_pairs, positions[-1] // num_pairs + 1)
        orders = {epoch: epoch_order(self.seed, epoch, num_pairs) for epoch in epochs}
        return [int(orders[position // num_pairs][position % num_pairs]) for position in positions]

    def _pad(
        self, rows: list[tuple[Int32[np.ndarray, " _"], int]]
    ) -> tuple[Int32[np.ndarray, "pairs seq"], Float32[np.ndarray, "pairs seq"]]:
        tokens = np.full((len(rows), self.seq_len), self.pad_id, dtype=np.int32)
        loss_mask = np.zeros((len(rows), self.seq_len), dtype=np.float32)
        for index, (row, response_start) in enumerate(rows):
            tokens[index, : len(row)] = row
            loss_mask[index, response_start - 1 : len(row) - 1] = 1.0
        return tokens, loss_mask
