"""Batches of pairs, in an order that is a pure function of (seed, step).

Invariant: update `step` (0-based) reads positions [step * batch_size, (step + 1) * batch_size) of the run's
`PairOrder`. A run that stops and restarts at any step therefore reads the same batches as one that does not stop. If a
run changes its pairs, the updates of each loader are counted from the first that reads it. A batch may span epochs. A
batch larger than the dataset is allowed and contains some pairs more than once.

This module does not know devices, shards or processes: every process builds the same global batch in numpy.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from simpo_pipeline.data.order import Mixture, PairOrder
from simpo_pipeline.data.pairs import TokenizedPair, check_lengths, tokens_digest
from simpo_pipeline.data.rows import RowBatch, RowShape, packed_rows, packed_shape, padded_rows, padded_shape
from simpo_pipeline.errors import ConfigError, DataError

_LEAST = {"batch_size": 1, "seq_len": 2, "seed": 0, "pad_id": 0, "num_updates": 1, "num_groups": 1}


@dataclass(frozen=True, eq=False)
class PairLoader:
    """Serves the `num_updates` batches of a run, each with `batch_size` pairs, as rows of one shape.

    With `packing`, each group has one row, long enough for every batch of the run (`rows.packed_shape`). Without it,
    each sequence has a row of `seq_len` tokens. Rows are divided into `num_groups` groups of equal size. `pad_id` is
    the padding token. `mixture` assigns the pairs to datasets; without it, all pairs form one dataset. `earlier_shape`
    is the shape of the pairs that the run read before, which is kept if these pairs fit (`rows.packed_shape`).

    Raises:
        ConfigError: batch_size < 1, seq_len < 2, num_updates < 1, num_groups < 1, a negative seed or pad_id, or a
            mixture whose sizes do not add up to the number of pairs.
        DataError: there are no pairs, or a pair is longer than seq_len; the message names it.
    """

    pairs: Sequence[TokenizedPair]
    batch_size: int
    seq_len: int
    seed: int
    pad_id: int
    num_updates: int
    packing: bool = False
    num_groups: int = 1
    mixture: Mixture | None = None
    earlier_shape: RowShape | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            got = getattr(self, name)
            if got < least:
                raise ConfigError(f"PairLoader: {name} is {got}; it must be at least {least}")
        if not self.pairs:
            raise DataError("there are no pairs to train on; check the source and how many were dropped as too long")
        if self.mixture is not None and sum(self.mixture.sizes) != len(self.pairs):
            raise ConfigError(
                f"PairLoader: the mixture has {sum(self.mixture.sizes)} pairs, but {len(self.pairs)} were given"
            )
        check_lengths(self.pairs, self.seq_len)

    @functools.cached_property
    def shape(self) -> RowShape:
        """The shape of every batch of the run."""
        batches = [self._pairs_of(step) for step in range(self.num_updates)]
        if self.packing:
            return packed_shape(batches, self.num_groups, self.earlier_shape)
        return padded_shape(batches, self.batch_size, self.seq_len, self.num_groups, self.earlier_shape)

    @functools.cached_property
    def data_digest(self) -> str:
        """SHA-256 (hex) of the tokens of all pairs and of their mixture.

        Loaders of one run with equal digests serve the same batches, wherever their pairs are stored.
        """
        mixture = self._mixture
        rates = [round(weight / min(mixture.weights), 2) for weight in mixture.weights]  # as exact as `Mixture` is
        return hashlib.sha256(f"{mixture.sizes} {rates} {tokens_digest(self.pairs)}".encode()).hexdigest()

    def batch(self, step: int) -> RowBatch:
        """Return the batch of update `step` (0-based); every call returns the same batch."""
        if not 0 <= step < self.num_updates:
            raise ConfigError(f"PairLoader: step is {step}; the run has updates 0 to {self.num_updates - 1}")
        rows = packed_rows if self.packing else padded_rows
        return rows(self._pairs_of(step), self.shape, self.pad_id)

    def _pairs_of(self, step: int) -> list[TokenizedPair]:
        return [self.pairs[index] for index in self.indices(step)]

    def indices(self, step: int) -> list[int]:
        """Return the indices into `pairs` that update `step` reads."""
        return self._order.read(range(step * self.batch_size, (step + 1) * self.batch_size))

    @functools.cached_property
    def _order(self) -> PairOrder:
        return PairOrder(self._mixture, self.seed)

    @property
    def _mixture(self) -> Mixture:
        return self.mixture or Mixture((len(self.pairs),), (1.0,))
