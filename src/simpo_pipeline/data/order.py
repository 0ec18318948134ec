"""The order in which a run reads its pairs: a function of the seed and the place in the run alone, by `grain`.

Laws: each dataset is shuffled anew each epoch, and its epochs lie end to end. Several are interleaved by weight, so
that every stretch of the run holds them in proportion, however large they are. Whoever starts at any place reads what
would have been read there.

Numpy and grain only: nothing is prefetched, no thread is started, and every process finds the same order.
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
    """Datasets that lie one after the other in one list of pairs.

    Attributes:
        sizes: How many pairs each has.
        weights: In which proportion pairs are read of each; only their ratios matter, to a hundredth of the smallest,
            since grain makes whole numbers of them.

    Raises:
        ConfigError: there is none, one is empty, or a weight is not a finite number above 0.
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
    """Which pair is read at which place of a run, the first being 0."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        """`seed` is any integer of at least 0; grain's own seeds have 32 bits, so each dataset's is drawn from it."""
        ends = np.cumsum(mixture.sizes).tolist()
        datasets = [
            grain.MapDataset.range(end - size, end).shuffle(seed=_seed_of(seed, number)).repeat()
            for number, (end, size) in enumerate(zip(ends, mixture.sizes, strict=True))
        ]
        self._order = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights=mixture.weights)

    def read(self, places: Sequence[int]) -> list[int]:
        """The pairs at these places, by their indices in the list of all."""
        return [cast(int, self._order[place]) for place in places]


def _seed_of(seed: int, dataset: int) -> int:
    # numpy keeps the values of SeedSequence stable for ever.
    return int(np.random.SeedSequence((seed, dataset)).generate_state(1)[0])
