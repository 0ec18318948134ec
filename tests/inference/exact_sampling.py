"""The exact distribution that tokens are drawn from, by its definition, and a test of draws against it."""

import numpy as np
import scipy.stats

# The significance level; the draws are fixed, so a test that passes once always passes.
ALPHA = 1e-6


def exact_probabilities(
    logits: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
) -> np.ndarray:
    """Return the distribution of one row by its definition, in float64: sort, accumulate, cut, renormalise."""
    scores = logits.astype(np.float64)
    for token in set(seen):
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    scores[list(banned)] = -np.inf
    probabilities = normalised(np.exp((scores - scores.max()) / temperature))
    if top_k:
        last = np.sort(probabilities)[::-1][min(top_k, len(probabilities)) - 1]
        probabilities = normalised(np.where(probabilities >= last, probabilities, 0))
    if top_p < 1:
        ranked = np.sort(probabilities)[::-1]
        last = ranked[np.cumsum(ranked) - ranked < top_p][-1]
        probabilities = normalised(np.where(probabilities >= last, probabilities, 0))
    return normalised(np.where(probabilities >= min_p * probabilities.max(), probabilities, 0))


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def require_draws_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Check draws with Pearson's test, the rarest tokens merged into one; no token may be wrongly drawn or missing."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0, "drawn, but filtered out"
    assert counts[expected > 30].all(), "kept, but never drawn"
    common = expected >= 5
    expected = np.append(expected[common], expected[~common].sum())
    counts = np.append(counts[common], counts[~common].sum())
    if expected[-1] == 0:
        expected, counts = expected[:-1], counts[:-1]
    if len(counts) > 1:
        statistic = np.sum((counts - expected) ** 2 / expected)
        assert statistic < scipy.stats.chi2.isf(ALPHA, len(counts) - 1)
