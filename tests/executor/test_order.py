import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_pipeline.errors import LiveEdgeError
from simpo_pipeline.executor.planning.graph import build_graph
from simpo_pipeline.executor.planning.order import live_order
from simpo_pipeline.executor.step import ExecutorStep, borrow, take


def step(name: str, *uses: Any) -> ExecutorStep:
    return ExecutorStep(name, None, list(uses))


def names(*requested: ExecutorStep) -> list[str]:
    return [found.name for found in live_order(build_graph(requested, "/p")).steps]


def test_a_second_taker_is_refused_naming_both():
    made = step("made")
    with pytest.raises(LiveEdgeError, match="'one' and 'two' both take the live value of 'made'"):
        names(step("one", take(made)), step("two", take(made)))


def test_the_borrower_runs_before_the_taker_without_an_edge_between_them():
    made = step("made")
    assert names(step("taker", take(made)), step("borrower", borrow(made))) == ["made", "borrower", "taker"]


def test_a_borrower_that_needs_the_taker_is_a_cycle():
    made = step("made")
    taker = step("taker", take(made))
    with pytest.raises(LiveEdgeError, match=r"cycle.*Make the borrowers independent of the taker"):
        names(step("borrower", borrow(made), taker))


def test_a_borrower_that_needs_the_taker_through_others_is_a_cycle():
    made = step("made")
    between = step("between", step("taker", take(made)))
    with pytest.raises(LiveEdgeError, match="between"):
        names(step("borrower", borrow(made), between))


def test_a_step_that_borrows_what_it_takes_is_refused():
    made = step("made")
    with pytest.raises(LiveEdgeError, match="both borrows and takes"):
        names(step("greedy", borrow(made), take(made)))


def test_one_live_chain_is_finished_before_the_next_begins():
    chains: list[ExecutorStep] = []
    for letter in "ab":
        first = step(f"{letter}-first")
        chains.extend([first, step(f"{letter}-middle", borrow(first)), step(f"{letter}-last", take(first))])
    firsts_first = sorted(chains, key=lambda one: "first" not in one.name)
    assert names(*firsts_first) == ["a-first", "a-middle", "a-last", "b-first", "b-middle", "b-last"]


def test_other_inputs_of_a_consumer_are_made_before_the_live_value():
    made = step("made")
    data = step("data", step("raw"))
    assert names(step("taker", take(made), data)) == ["raw", "data", "made", "taker"]


def test_a_value_may_be_taken_by_a_chain_of_steps():
    one = step("one")
    two = step("two", take(one))
    three = step("three", take(two))
    eyes = [step(f"eye-{number}", borrow(made)) for number, made in enumerate((one, two, three))]
    assert names(*eyes) == ["one", "eye-0", "two", "eye-1", "three", "eye-2"]


def test_a_pseudo_dependency_is_not_a_live_use():
    made = step("made")
    taker = step("taker", take(made))
    assert names(step("watcher", taker.nonblocking()), step("other", take(made))) == ["watcher", "made", "other"]


@given(st.integers(0, 2**32), st.integers(1, 25))
def test_every_order_places_a_step_after_its_inputs_and_a_taker_after_its_borrowers(seed, count):
    choose = random.Random(seed)
    steps: list[ExecutorStep] = []
    taken: set[ExecutorStep] = set()
    for number in range(count):
        uses: list[Any] = []
        for before in choose.sample(steps, k=min(len(steps), choose.randrange(3))):
            kind = choose.choice(["path", "borrow", "take"])
            if kind == "take" and before not in taken:
                taken.add(before)
                uses.append(take(before))
            else:
                uses.append(borrow(before) if kind == "borrow" else before / "x")
        steps.append(step(f"s{number}", *uses))
    graph = build_graph(steps, "/p")
    try:
        order = live_order(graph)
    except LiveEdgeError:
        return
    place = {found: position for position, found in enumerate(order.steps)}
    assert set(place) == set(graph.steps)
    for found in graph.steps:
        assert all(place[edge.step] < place[found] for edge in graph.needs(found))
        assert all(place[borrower] < place[found] for borrower in order.implied.get(found, ()))
