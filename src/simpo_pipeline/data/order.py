"""The order in which a run reads its pairs: a pure function of the seed and the position in the run, by `grain`.

Invariants: each dataset is reshuffled every epoch, and its epochs follow each other without a gap. Several datasets are
interleaved by weight, so every part of the run contains them in proportion, whatever their sizes. A run that starts at
any position reads what an uninterrupted run reads there.

Numpy and grain only: nothing is prefetched, no thread is started, and every process computes the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import grain
import numpy as np

from simpo_pipeline.errors import ConfigError


@dataclass(frozen=True)
class Mixture:
    """Datasets that are concatenated in one list of pairs.

    Attributes:
        sizes: Number of pairs in each dataset.
        weights: Relative rate at which pairs are read from each dataset. Only the ratios matter, to a hundredth of the
            smallest weight, because grain converts weights to integers.

    Raises:
        ConfigError: there is no dataset, a dataset is empty or has no weight, or a weight is not finite and above 0.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.weights) or min(self.sizes) < 1:
            raise ConfigError(
                f"Mixture: sizes are {self.sizes} and weights {self.weights}; each dataset needs at least one pair, "
                "and a weight"
            )
        wrong = [weight for weight in self.weights if not (math.isfinite(weight) and weight > 0)]
        if wrong:
            raise ConfigError(f"Mixture: weights {wrong} are not finite numbers above 0; leave such a dataset out")


class PairOrder:
    """The pair that is read at each position of a run. The first position is 0."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        """Build the order from `seed`, any integer of at least 0.

        The seed of each dataset is drawn from it, because grain's own seeds have 32 bits.
        """
        ends = np.cumsum(mixture.sizes).tolist()
        datasets = [
            grain.MapDataset.range(end - size, end).shuffle(seed=_seed_of(seed, number)).repeat()
            for number, (end, size) in enumerate(zip(ends, mixture.sizes, strict=True))
        ]
        self._order = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights=mixture.weights)

    def read(self, places: Sequence[int]) -> list[int]:
        """Return the pairs at these positions, as indices into the list of all pairs."""
        return [cast(int, self._order[place]) for place in places]


def _seed_of(seed: int, dataset: int) -> int:
    # numpy keeps the values of SeedSequence stable across releases.
    return int(np.random.SeedSequence((seed, dataset)).generate_state(1)[0])
