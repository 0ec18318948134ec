"""The monitor distributes the verdict, reports failures, and never dies silently. Processes are threads here."""

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest

from simpo_pipeline.distributed.config import WatchConfig
from simpo_pipeline.distributed.group import ProcessGroup
from simpo_pipeline.distributed.ledger import Launch
from simpo_pipeline.distributed.monitor import BEAT_SECONDS, Monitor
from simpo_pipeline.errors import CoordinationError

WATCH = WatchConfig(grace_seconds=0.5, stall_seconds=1.0, silence_seconds=2.0)


class Job:
    """Two monitored processes that share a store. Their exits are recorded and not executed."""

    def __init__(self, coordination: Any) -> None:
        self.coordination = coordination
        self.groups = [ProcessGroup(coordination, index, 2, WATCH) for index in (0, 1)]
        self.ended: dict[int, int] = {}
        self.recorded: list[Any] = []
        self.monitors = [
            Monitor(group, coordination, WATCH, functools.partial(self.ended.__setitem__, group.index))
            for group in self.groups
        ]

    def start(self) -> None:
        for monitor in self.monitors:
            monitor.start()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 8.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)


@pytest.fixture
def job(make_coordination):
    made = Job(make_coordination(2))
    made.start()
    yield made
    for monitor in made.monitors:
        monitor.stop()


def launch(group: ProcessGroup, name: str) -> None:
    group.ledger.record(Launch(name, name, 4, 2))


def test_equal_records_are_deleted_from_the_store_and_the_job_continues(job):
    for number in range(300):
        for group in job.groups:
            launch(group, f"program {number}")
    job.wait_for(lambda: not job.coordination.list("events/"))
    time.sleep(4 * BEAT_SECONDS)
    assert job.ended == {}


def test_diverging_processes_are_terminated_and_the_leader_records_the_step(job):
    for name in ("a", "b"):
        launch(job.groups[0], name)
        launch(job.groups[1], name if name == "a" else "zeros")
    with job.groups[0].phase("train-2", files_only=False, on_abort=job.recorded.append):
        job.wait_for(lambda: set(job.ended) == {0, 1})
    (failure,) = job.recorded
    assert "at shared event 1: " in failure["exception"]
    assert "process 1 launched 'zeros'" in failure["exception"]


def test_a_failure_is_reported_to_the_peers_and_cleared_at_the_end_of_the_step(job):
    failing, other = job.groups[1], job.groups[0]
    failing.failed({"exception": "ValueError: bad", "at": None})
    job.wait_for(lambda: other.standing.peer_failure is not None)
    with pytest.raises(CoordinationError, match=r"process 1 of 2 failed: ValueError: bad"):
        other.check_peers()
    failing.ledger.turn_page()
    failing.standing.failure = None
    other.ledger.turn_page()
    other.check_peers()
    time.sleep(WATCH.grace_seconds + 4 * BEAT_SECONDS)
    assert job.ended == {}


def test_a_process_that_leaves_terminates_the_others(job):
    job.monitors[1].leave("KeyboardInterrupt: ")
    job.wait_for(lambda: set(job.ended) == {0, 1})
    assert set(job.ended.values()) == {1}


def test_a_stall_is_detected_within_a_phase_and_a_meeting_is_not_a_stall(job):
    job.groups[0].standing.waiting = "reached gather (x:1)"
    waiting = job.groups[0].phase("infer", files_only=False, on_abort=None)
    with waiting, job.groups[1].phase("infer", files_only=False, on_abort=None):
        for _ in range(5):
            time.sleep(WATCH.stall_seconds / 3)
            job.groups[1].standing.progress()
        assert job.ended == {}
        job.wait_for(lambda: set(job.ended) == {0, 1})


def test_a_process_that_cannot_reach_the_leader_terminates_itself(make_coordination):
    coordination = make_coordination(2)
    job = Job(coordination)

    def lost(*_: Any) -> None:
        raise CoordinationError("the coordination service in process 0 does not answer")

    coordination.put = lost
    job.monitors[1].start()
    job.wait_for(lambda: job.ended == {1: 1})


def test_a_frozen_leader_whose_service_hangs_is_detected_by_the_guard(make_coordination):
    coordination = make_coordination(2)
    job = Job(coordination)
    coordination.put = lambda *_: time.sleep(60)
    job.monitors[1].start()
    job.wait_for(lambda: job.ended == {1: 1})


def test_a_monitor_that_fails_terminates_its_process(make_coordination):
    coordination = make_coordination(2)
    job = Job(coordination)
    coordination.put = lambda *_: 1 / 0
    job.monitors[1].start()
    job.wait_for(lambda: job.ended == {1: 1})
