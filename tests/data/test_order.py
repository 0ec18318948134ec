"""The order of a run: epochs, weights, restarts."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_pipeline.data.order import Mixture, PairOrder
from simpo_pipeline.errors import ConfigError


def test_seeds_and_epochs_give_different_orders():
    orders = {
        tuple(PairOrder(Mixture((20,), (1.0,)), seed).read(range(20 * epoch, 20 * epoch + 20)))
        for seed in (0, 1, 2**32, 2**63)
        for epoch in range(3)
    }
    assert len(orders) == 12
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_the_order_never_changes_so_that_old_runs_can_be_resumed():
    assert PairOrder(Mixture((8,), (1.0,)), 0).read(range(8)) == [5, 3, 6, 7, 4, 2, 1, 0]
    assert PairOrder(Mixture((4, 4), (1.0, 3.0)), 0).read(range(8)) == [2, 5, 6, 7, 3, 4, 4, 7]


# grain's shuffle walks through 65,536 positions to find those of a small data set, so there are few examples.
@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(5, 60), min_size=2, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 500),
    data=st.data(),
)
def test_every_window_contains_the_datasets_in_proportion_to_their_weights(
    sizes: list[int], seed: int, start: int, data
):
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=len(sizes), max_size=len(sizes)))
    read = PairOrder(Mixture(tuple(sizes), tuple(weights)), seed).read(range(start, start + 60))
    first = 0
    for size, weight in zip(sizes, weights, strict=True):
        count = sum(first <= index < first + size for index in read)
        assert abs(count - 60 * weight / sum(weights)) <= 2, (sizes, weights, count)
        first += size


def test_each_dataset_of_a_mixture_goes_through_its_own_epochs():
    read = PairOrder(Mixture((3, 50), (1.0, 1.0)), 5).read(range(24))
    small = [index for index in read if index < 3]
    assert Counter(small) == {0: 4, 1: 4, 2: 4}
    assert all(sorted(small[epoch : epoch + 3]) == [0, 1, 2] for epoch in range(0, 12, 3))
    large = [index for index in read if index >= 3]
    assert len(set(large)) == len(large) == 12


def test_reading_can_start_at_any_position():
    order = PairOrder(Mixture((7, 5), (2.0, 1.0)), 3)
    assert order.read(range(40, 60)) == PairOrder(Mixture((7, 5), (2.0, 1.0)), 3).read(range(60))[40:]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ((), (), "each dataset needs at least one pair"),
        ((3, 0), (1.0, 1.0), "each dataset needs at least one pair"),
        ((3,), (1.0, 1.0), "each dataset needs at least one pair, and a weight"),
        ((3, 3), (1.0, 0.0), r"weights \[0.0\] are not finite numbers above 0; leave such a dataset out"),
        ((3, 3), (float("nan"), 1.0), r"weights \[nan\]"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(sizes, weights, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(sizes, weights)
