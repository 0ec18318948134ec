"""Processes gather, agree and compare without a device program, and a process at another call is named.

The processes of these tests are threads.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from simpo_pipeline.distributed.group import ProcessGroup
from simpo_pipeline.distributed.ledger import Launch
from simpo_pipeline.errors import CoordinationError, PeerFailedError, ProgramError

COUNT = 3


def launch(name: str, num_processes: int = COUNT) -> Launch:
    return Launch(name, f"fingerprint of {name}", 2 * num_processes, num_processes)


@pytest.fixture
def in_all(make_coordination) -> Callable[[Callable[[ProcessGroup], Any]], list[Any]]:
    """Return a function that calls `work` in each process and returns each result, or the error that was raised."""

    def call(work: Callable[[ProcessGroup], Any]) -> list[Any]:
        coordination = make_coordination(COUNT)
        ended: list[Any] = [None] * COUNT

        def run(index: int) -> None:
            try:
                ended[index] = work(ProcessGroup(coordination, index, COUNT))
            except Exception as error:
                ended[index] = error

        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(COUNT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in threads), "a process hangs"
        return ended

    return call


def test_gather_returns_the_values_of_all_processes(in_all):
    assert in_all(lambda group: group.gather({"index": group.index})) == [[{"index": i} for i in range(COUNT)]] * COUNT


def test_agree_returns_the_value_of_the_leader_everywhere(in_all):
    assert in_all(lambda group: [group.agree(group.index), group.agree("b")]) == [[0, "b"]] * COUNT


def test_values_read_by_all_processes_are_deleted(make_coordination):
    coordination = make_coordination(1)
    group = ProcessGroup(coordination, 0, 1)
    for number in range(50):
        group.gather(number)
        group.agree(number)
    group.gather("last")
    assert list(coordination.list("meeting/")) == ["meeting/101/0"]


def test_processes_at_different_calls_all_report_where_each_of_them_is(in_all):
    def work(group: ProcessGroup) -> Any:
        if group.index == 1:
            return group.agree("here")
        return group.gather("there")

    errors = in_all(work)
    assert all(isinstance(error, CoordinationError) for error in errors)
    for error in errors[:2]:
        assert "process 0 reached gather (" in str(error) and "process 1 reached agree (" in str(error)


def test_the_peers_of_a_failed_process_stop_and_meet_it_at_the_end_of_the_step(in_all):
    def work(group: ProcessGroup) -> Any:
        outcome = "well"
        try:
            if group.index == 2:
                raise FloatingPointError("a planted error")
            group.gather("fingerprint of a program")
        except Exception as error:
            outcome = type(error).__name__
            group.failed({"exception": repr(error)})
        outcomes = group.gather(outcome)
        group.step_ended("train")
        return outcomes, group.gather("next step")

    reports = (["PeerFailedError", "PeerFailedError", "FloatingPointError"], ["next step"] * COUNT)
    assert in_all(work) == [reports] * COUNT


def test_a_peer_failure_known_to_the_monitor_stops_local_work_of_that_step_only(make_coordination):
    group = ProcessGroup(make_coordination(1), 0, 1)
    group.standing.peer_failure = (0, "process 1 of 2 failed: a planted error")
    with pytest.raises(PeerFailedError, match="a planted error"):
        group.check_peers()
    group.step_ended("infer")
    group.check_peers()


def test_equal_shared_launches_pass_regardless_of_local_launches(in_all):
    def work(group: ProcessGroup) -> str:
        for name in ("train_step", "handoff"):
            group.ledger.record(launch(name))
        for _ in range(group.index):
            group.ledger.record(launch("decode", num_processes=1))
        group.step_ended("infer")
        return group.ledger.digest()

    assert len(set(in_all(work))) == 1


def test_launches_in_a_different_order_are_reported_with_position_and_lines(in_all):
    def work(group: ProcessGroup) -> None:
        names = ["a", "b", "c"] if group.index != 1 else ["a", "c", "b"]
        for name in names:
            group.ledger.record(launch(name))
        group.step_ended("train")

    errors = in_all(work)
    assert all(isinstance(error, ProgramError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "in 'train', at shared event 1: process 0 launched 'b' (" in str(errors[0])
    assert "test_group:" in str(errors[0]) and "process 1 launched 'c' (" in str(errors[0])


def test_an_extra_launch_on_one_host_is_reported_and_blocks_further_launches(in_all):
    def work(group: ProcessGroup) -> str:
        group.ledger.record(launch("train_step"))
        if group.index == 0:
            group.ledger.record(launch("zeros"))
        try:
            group.step_ended("train")
        except ProgramError as error:
            group.ledger.record(launch("decode", num_processes=1))
            with pytest.raises(ProgramError, match=r"diverged in step 'train'; restart the job"):
                group.ledger.record(launch("train_step"))
            return str(error)
        return "not noticed"

    for text in in_all(work):
        assert "process 0 launched 'zeros'" in text


def test_unequal_launches_of_a_failed_step_block_further_launches_without_another_error(in_all):
    def work(group: ProcessGroup) -> str:
        if group.index == 1:
            group.failed({"exception": "a planted error"})
        else:
            group.ledger.record(launch("train_step"))
        group.step_ended("train")
        with pytest.raises(ProgramError, match="diverged in step 'train'"):
            group.ledger.record(launch("train_step"))
        return "barred"

    assert in_all(work) == ["barred"] * COUNT
