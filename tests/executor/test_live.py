import pytest

from simpo_pipeline.errors import LiveEdgeError
from simpo_pipeline.executor.run import Live
from simpo_pipeline.executor.running.live import LiveStore
from simpo_pipeline.executor.step import ExecutorStep, LiveUse

MADE, ONE, TWO = (ExecutorStep(name, None, None) for name in ("made", "one", "two"))


def published(*consumers: ExecutorStep) -> tuple[LiveStore, list[str]]:
    store, freed = LiveStore(), []
    store.publish(MADE, Live("value", free=lambda: freed.append("freed")), consumers)
    return store, freed


def test_a_borrowed_value_is_kept_until_its_last_borrower_finishes():
    store, freed = published(ONE, TWO)
    assert store.give(MADE, ONE, LiveUse.BORROW) == "value"
    store.consumer_ended(ONE, failed=False)
    assert store.give(MADE, TWO, LiveUse.BORROW) == "value"
    assert not freed
    store.consumer_ended(TWO, failed=True)
    assert freed == ["freed"]
    assert store.held() == frozenset()


def test_a_taken_value_belongs_to_the_taker():
    store, freed = published(ONE)
    store.give(MADE, ONE, LiveUse.TAKE)
    assert store.held() == frozenset()
    store.consumer_ended(ONE, failed=False)
    assert not freed


def test_the_value_of_a_failed_taker_is_freed_once():
    store, freed = published(ONE)
    store.give(MADE, ONE, LiveUse.TAKE)
    store.consumer_ended(ONE, failed=True)
    store.consumer_ended(ONE, failed=True)
    assert freed == ["freed"]


def test_a_value_is_not_taken_while_a_borrower_has_yet_to_finish():
    store, _ = published(ONE, TWO)
    with pytest.raises(LiveEdgeError, match="'two' cannot take the live value of 'made', which is still needed by one"):
        store.give(MADE, TWO, LiveUse.TAKE)


def test_a_value_that_was_not_published_is_an_error():
    store, _ = published(ONE)
    with pytest.raises(LiveEdgeError, match="There is no live value of 'one'"):
        store.give(ONE, TWO, LiveUse.BORROW)


def test_free_all_frees_every_value():
    store, freed = published(ONE)
    store.free_all()
    assert freed == ["freed"]
    assert store.held() == frozenset()
