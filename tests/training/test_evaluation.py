"""Intervals against worked examples, and their coverage."""

import numpy as np
import pytest

from simpo_pipeline.training.evaluation import accuracy, accuracy_gain, margin_gain


def test_the_accuracy_counts_margins_above_zero_with_wilsons_interval():
    found = accuracy([0.1] * 81 + [0.0] * 100 + [-2.0] * 82)
    # Newcombe 1998, table I: 81 of 263.
    assert (found.value, found.low, found.high) == pytest.approx((0.3080, 0.2553, 0.3662), abs=5e-5)


def test_an_accuracy_of_one_has_no_interval_of_width_zero():
    found = accuracy([1.0] * 10)
    assert found.low < 0.75 and found.high == pytest.approx(1.0)


def test_a_gain_is_computed_over_the_same_pairs():
    before, after = [-1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0]
    assert accuracy_gain(before, after).value == 0.25
    same = accuracy_gain(before, before)
    assert same.low < 0 < same.high and same.low == pytest.approx(-same.high)


def test_the_interval_of_a_gain_contains_the_true_gain_about_19_times_in_20():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        before = rng.normal(size=60)
        after = before + rng.normal(0.8, 0.7, size=60)
        found = accuracy_gain(before.tolist(), after.tolist())
        # P(N(0.8, 1.49) > 0) - 1/2, with a variance of 1 + 0.49.
        held += found.low <= 0.24392 <= found.high
    assert 920 <= held <= 985


def test_a_margin_gain_is_the_mean_rise_of_the_same_pairs():
    found = margin_gain([0.0, 1.0, -1.0, 2.0] * 10, [1.0, 1.0, 1.0, 3.0] * 10)
    # Rises of 1, 0, 2 and 1: a standard deviation of 0.7161, and of 0.1132 for their mean.
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 0.7781, 1.2219), abs=1e-4)
    assert margin_gain([0.0] * 29, [1.0] * 29) is None


def test_the_interval_of_a_margin_gain_contains_the_true_gain_about_19_times_in_20():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        before = rng.normal(size=40)
        found = margin_gain(before.tolist(), (before + rng.exponential(0.5, size=40)).tolist())
        assert found is not None
        held += found.low <= 0.5 <= found.high
    assert 900 <= held <= 985
