"""How weights do on pairs that they are not trained on, and how sure one can be of it. Plain Python."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simpo_pipeline.training.config import SimpoConfig

# Of the standard normal distribution, for 95% intervals.
_Z = 1.959963984540054
# A mean of fewer is further from a normal distribution, with its standard deviation estimated, than an interval says.
_FEWEST_FOR_A_MEAN = 30


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: Those of `step.part_loss`.
        margins: avg(chosen) - avg(rejected) of each pair, nats per token, in the order of the pairs.
    """

    metrics: dict[str, float]
    margins: tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BatchMetrics:
    """The metrics of `step.part_loss` of one batch, and how many of each thing they are means over."""

    metrics: Mapping[str, float]
    num_pairs: int
    num_chosen_tokens: int
    num_answer_tokens: int

    def count(self, name: str) -> int:
        """How many things a metric is a mean over."""
        return {"sft_loss": self.num_chosen_tokens, "z_loss": self.num_answer_tokens}.get(name, self.num_pairs)


def join_metrics(batches: Sequence[BatchMetrics], simpo: SimpoConfig) -> dict[str, float]:
    """The metrics of all batches as if they were one, however many pairs and tokens each of them has."""
    joined: dict[str, float] = {}
    for name in batches[0].metrics:
        total = sum(batch.count(name) * batch.metrics[name] for batch in batches)
        joined[name] = total / sum(batch.count(name) for batch in batches)
    if "preference_loss" in joined:
        weights = {"sft_loss": simpo.sft_weight, "z_loss": simpo.z_loss_weight}
        terms = [weight * joined[name] for name, weight in weights.items() if name in joined]
        joined["loss"] = joined["preference_loss"] + sum(terms)
    return joined


def accuracy(margins: Sequence[float]) -> Estimate:
    """The share of pairs whose margin is above 0, with Wilson's interval (Wilson 1927)."""
    n, p = len(margins), sum(margin > 0 for margin in margins) / len(margins)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(p, centre - half, centre + half)


def accuracy_gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """By how much the accuracy on the same pairs rose, with the adjusted Wald interval for them (Agresti, Min 2005)."""
    gained = sum(new > 0 >= old for old, new in zip(before, after, strict=True))
    lost = sum(old > 0 >= new for old, new in zip(before, after, strict=True))
    n, up, down = len(before) + 2, gained + 0.5, lost + 0.5
    centre = (up - down) / n
    half = _Z * math.sqrt(up + down - (up - down) ** 2 / n) / n
    return Estimate((gained - lost) / len(before), centre - half, centre + half)


def margin_gain(before: Sequence[float], after: Sequence[float]) -> Estimate | None:
    """By how much the mean margin of the same pairs rose, with the normal interval for it; None for less than 30 pairs.

    Accuracy sees a pair only when its margin changes sign, so this needs fewer pairs to tell that something was learnt.
    """
    rises = [new - old for old, new in zip(before, after, strict=True)]
    if len(rises) < _FEWEST_FOR_A_MEAN:
        return None
    value, half = statistics.fmean(rises), _Z * statistics.stdev(rises) / math.sqrt(len(rises))
    return Estimate(value, value - half, value + half)
