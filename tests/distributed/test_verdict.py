"""The verdict decides when a job stops and which process is named, from the data of the leader, without a clock."""

import dataclasses
from typing import Any

from simpo_pipeline.distributed.config import WatchConfig
from simpo_pipeline.distributed.ledger import Event
from simpo_pipeline.distributed.standing import StatusReport
from simpo_pipeline.distributed.verdict import ProcessState, Verdict, judge

CONFIG = WatchConfig(silence_seconds=15.0, grace_seconds=3.0, stall_seconds=900.0)
FAILURE = {"exception": "ValueError: bad", "at": "steps/train.py:7 in train", "traceback": None}
HEALTHY = StatusReport(
    host="a",
    pid=10,
    beat=1,
    phase="train-2",
    page=0,
    num_events=2,
    idle_seconds=1.0,
    stalled=False,
    waiting=None,
    failure=None,
    leaving=None,
)


def known(
    silent: float = 0.1, failed: float | None = None, events: tuple[Event, ...] = (), **report: Any
) -> ProcessState:
    return ProcessState(dataclasses.replace(HEALTHY, **report), silent, failed, events)


def launches(*names: str) -> tuple[Event, ...]:
    return tuple(Event(f"launch {name} x", f"launched {name!r} (steps.train:1)") for name in names)


def verdict(*processes: ProcessState) -> Verdict:
    found = judge(processes, CONFIG)
    assert found is not None
    return found


def test_a_healthy_job_continues():
    assert judge([known(), known(waiting="reached gather (x:1)"), known(silent=14.0)], CONFIG) is None


def test_a_process_silent_for_too_long_is_named():
    found = verdict(known(), known(silent=15.5, host="b", pid=11))
    assert found.process_index == 1
    assert "host b (process 1 of 2, pid 11) has not been heard from for 16 s" in found.message


def test_a_process_that_never_reported_is_named():
    assert verdict(known(), ProcessState(None, 16.0, None, ())).process_index == 1


def test_a_process_that_leaves_with_an_error_is_named_immediately():
    assert "left the job: KeyboardInterrupt" in verdict(known(), known(leaving="KeyboardInterrupt: ")).message


def test_a_failure_is_named_with_its_line_after_the_grace_period():
    waits = known(failed=2.9, failure=FAILURE)
    assert judge([known(), waits], CONFIG) is None
    found = verdict(known(), known(failed=3.1, failure=FAILURE))
    assert found.process_index == 1 and found.failure == FAILURE
    assert "failed in 'train-2': ValueError: bad (at steps/train.py:7 in train)" in found.message


def test_the_first_of_several_failures_is_named():
    found = verdict(known(), known(failed=3.1, failure=FAILURE), known(failed=3.9, failure=FAILURE))
    assert found.process_index == 2


def test_a_killed_process_is_named_before_those_whose_collective_it_broke():
    broken = {**FAILURE, "exception": "Gloo all-reduce failed: Connection closed by peer"}
    found = verdict(known(failed=3.1, failure=broken), known(silent=3.2), known(failed=3.1, failure=broken))
    assert found.process_index == 1
    assert "it was killed, or is frozen" in found.message


def test_the_one_process_with_a_different_launch_is_named():
    same, other = launches("a", "b"), launches("a", "zeros")
    found = verdict(known(events=same), known(events=other), known(events=same[:1]), known(events=same))
    assert found.process_index == 1 and found.dump
    assert "differs from most processes" in found.message
    assert "process 0 launched 'b' (steps.train:1); process 1 launched 'zeros' (steps.train:1)" in found.message
    assert "process 2 did nothing more" in found.message


def test_neither_of_two_diverging_processes_is_blamed():
    found = verdict(known(events=launches("a")), known(events=launches("b")))
    assert "alone" not in found.message
    assert "process 0 launched 'a'" in found.message and "process 1 launched 'b'" in found.message


def test_records_are_not_compared_across_pages_nor_after_a_failure():
    a, b = launches("a"), launches("b")
    assert judge([known(events=a), known(events=b, page=1)], CONFIG) is None
    assert judge([known(events=a), known(events=b, failed=0.5, failure=FAILURE)], CONFIG) is None


def test_a_stalled_process_is_named_and_the_processes_waiting_for_it_are_not():
    hangs = known(num_events=3, idle_seconds=899.0, host="b")
    in_collective = known(num_events=4, idle_seconds=901.0, stalled=True)
    at_meeting = known(num_events=4, waiting="reached gather (steps.train:9)")
    found = verdict(in_collective, hangs, at_meeting)
    assert found.process_index == 1 and found.dump
    assert "no progress: host b (process 1 of 3, pid 10) in 'train-2' for 899 s" in found.message


def test_all_processes_stuck_in_one_collective_are_named():
    stuck = known(stalled=True, idle_seconds=901.0)
    assert verdict(stuck, stuck).message.count("in 'train-2' for 901 s") == 2
