"""Metrics of the weights on held-out pairs, and their confidence intervals. Plain Python."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simpo_pipeline.training.config import SimpoConfig

# The 97.5% quantile of the standard normal distribution, for 95% intervals.
_Z = 1.959963984540054
# With fewer values and an estimated standard deviation, a mean is further from normal than its interval assumes.
_FEWEST_FOR_A_MEAN = 30

EVALUATIONS_FILE = "evaluations.jsonl"
"""Rows of a training step, one per evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: The metrics of `step.part_loss`.
        margins: avg(chosen) - avg(rejected) of each pair, nats per token, in the order of the pairs.
    """

    metrics: dict[str, float]
    margins: tuple[float, ...]


@dataclass(frozen=True)
class IntervalEstimate:
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BatchMetrics:
    """The metrics of `step.part_loss` for one batch, and the numbers of pairs and tokens that they are means over."""

    metrics: Mapping[str, float]
    num_pairs: int
    num_chosen_tokens: int
    num_answer_tokens: int

    def count(self, name: str) -> int:
        """Return the number of pairs or tokens that a metric is a mean over."""
        return {"sft_loss": self.num_chosen_tokens, "z_loss": self.num_answer_tokens}.get(name, self.num_pairs)


def join_metrics(batches: Sequence[BatchMetrics], simpo: SimpoConfig) -> dict[str, float]:
    """Return the metrics of all batches as if they were one, for any number of pairs and tokens in each of them."""
    joined: dict[str, float] = {}
    for name in batches[0].metrics:
        total = sum(batch.count(name) * batch.metrics[name] for batch in batches)
        joined[name] = total / sum(batch.count(name) for batch in batches)
    if "preference_loss" in joined:
        weights = {"sft_loss": simpo.sft_weight, "z_loss": simpo.z_loss_weight}
        terms = [weight * joined[name] for name, weight in weights.items() if name in joined]
        joined["loss"] = joined["preference_loss"] + sum(terms)
    return joined


def accuracy(margins: Sequence[float]) -> IntervalEstimate:
    """Return the share of pairs whose margin is above 0, with Wilson's interval (Wilson 1927)."""
    n, p = len(margins), sum(margin > 0 for margin in margins) / len(margins)
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return IntervalEstimate(p, centre - half, centre + half)


def accuracy_gain(before: Sequence[float], after: Sequence[float]) -> IntervalEstimate:
    """Return the rise in accuracy on the same pairs, with the adjusted Wald interval for it (Agresti and Min 2005)."""
    gained = sum(new > 0 >= old for old, new in zip(before, after, strict=True))
    lost = sum(old > 0 >= new for old, new in zip(before, after, strict=True))
    n, up, down = len(before) + 2, gained + 0.5, lost + 0.5
    centre = (up - down) / n
    half = _Z * math.sqrt(up + down - (up - down) ** 2 / n) / n
    return IntervalEstimate((gained - lost) / len(before), centre - half, centre + half)


def margin_gain(before: Sequence[float], after: Sequence[float]) -> IntervalEstimate | None:
    """Return the rise in the mean margin of the same pairs, with its normal interval; None for fewer than 30 pairs.

    Accuracy changes only when the margin of a pair changes sign. The mean margin needs fewer pairs to show learning.
    """
    rises = [new - old for old, new in zip(before, after, strict=True)]
    if len(rises) < _FEWEST_FOR_A_MEAN:
        return None
    value, half = statistics.fmean(rises), _Z * statistics.stdev(rises) / math.sqrt(len(rises))
    return IntervalEstimate(value, value - half, value + half)
