import pytest

from simpo_pipeline.inference.pages import ROOT, PagePool


def test_pages_are_allocated_once_and_released() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(2), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2]
    pool.release(first)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="not held"):
        pool.release(first)
    with pytest.raises(AssertionError, match="3 pages requested, 2 free"):
        pool.allocate(3)


def test_a_page_is_found_by_its_tokens_and_all_tokens_before() -> None:
    pool = PagePool(4)
    a, b, c, d = pool.allocate(4)
    after_a = pool.register(a, ROOT, (1, 2), ready=True)
    after_b = pool.register(b, after_a, (3, 4), ready=True)
    after_c = pool.register(c, ROOT, (9, 9), ready=True)
    pool.register(d, after_c, (3, 4), ready=True)
    assert pool.find(ROOT, (1, 2)) == (a, after_a)
    assert pool.find(after_a, (3, 4)) == (b, after_b)
    assert pool.find(after_c, (3, 4)) != (b, after_b)
    assert pool.find(ROOT, (3, 4)) is None


def test_unheld_pages_are_evicted_only_when_needed_least_recently_used_and_prefix_ends_first() -> None:
    pool = PagePool(3)
    a, b = pool.allocate(2)
    after_a = pool.register(a, ROOT, (1,), ready=True)
    pool.register(b, after_a, (2,), ready=True)
    pool.release([a, b])
    assert pool.num_free == 3
    assert pool.allocate(1) not in ([a], [b])
    assert pool.allocate(1) == [b]
    assert pool.find(after_a, (2,)) is None
    assert pool.find(ROOT, (1,)) == (a, after_a)
    pool.hold(a)
    assert pool.num_free == 0


def test_a_page_that_was_never_filled_is_forgotten_when_it_is_released() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    pool.register(page, ROOT, (1,), ready=False)
    assert not pool.is_ready(page)
    pool.release([page])
    assert pool.find(ROOT, (1,)) is None
    (page,) = pool.allocate(1)
    pool.register(page, ROOT, (1,), ready=False)
    pool.set_ready(page)
    pool.release([page])
    assert pool.find(ROOT, (1,)) is not None


def test_the_first_page_registered_for_the_same_tokens_stays() -> None:
    pool = PagePool(2)
    a, b = pool.allocate(2)
    prefix = pool.register(a, ROOT, (1,), ready=True)
    assert pool.register(b, ROOT, (1,), ready=True) == prefix
    assert pool.find(ROOT, (1,)) == (a, prefix)
    pool.release([b])
    assert pool.find(ROOT, (1,)) == (a, prefix)


def test_holders_are_counted() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    pool.register(page, ROOT, (1,), ready=True)
    pool.hold(page)
    assert pool.is_shared(page)
    pool.release([page])
    assert (pool.is_shared(page), pool.num_free) == (False, 0)
    pool.release([page])
    assert pool.num_free == 1


def test_tokens_about_to_be_overwritten_are_no_longer_found() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    prefix = pool.register(page, ROOT, (1, 2), ready=True)
    pool.register(page, ROOT, (1, 2, 3, 4), ready=True)
    pool.forget_beyond(page, 2)
    assert pool.find(ROOT, (1, 2)) == (page, prefix)
    assert pool.find(ROOT, (1, 2, 3, 4)) is None
