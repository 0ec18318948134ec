"""A stopped call can write nothing more, and its process exits if the function does not end."""

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from simpo_pipeline.errors import LeaseLostError, StepCancelledError, StepError
from simpo_pipeline.executor.running.stopping import STOPPED_EXIT_CODE, RunningCalls, StoppableCall
from simpo_pipeline.storage.fence import OPEN

STOPS: dict[str, tuple[Callable[[StoppableCall], None], type[StepError]]] = {
    "lost": (StoppableCall.lose, LeaseLostError),
    "cancelled": (StoppableCall.cancel, StepCancelledError),
}


def nothing() -> None:
    pass


def new_call() -> StoppableCall:
    return StoppableCall("step", OPEN, nothing)


def test_return_values_and_exceptions_pass_through():
    assert new_call().call(lambda: 7, nothing) == 7
    with pytest.raises(ZeroDivisionError):
        new_call().call(lambda: 1 // 0, nothing)


@pytest.mark.parametrize("stop", STOPS)
def test_a_function_that_writes_without_end_is_stopped(stop: str):
    call, begun = new_call(), threading.Event()
    do_stop, kind = STOPS[stop]

    def endless() -> None:
        while True:
            with call.hold():
                begun.set()

    def stop_when_begun() -> None:
        assert begun.wait(20)
        do_stop(call)

    thread = threading.Thread(target=stop_when_begun)
    thread.start()
    with pytest.raises(kind):
        call.call(endless, nothing)
    thread.join()
    with pytest.raises(kind):
        call.check()


@pytest.mark.parametrize("stop", STOPS)
def test_the_reason_replaces_the_result_or_the_error_of_a_stopped_function(stop: str):
    do_stop, kind = STOPS[stop]
    call = new_call()
    with pytest.raises(kind):
        call.call(lambda: do_stop(call), nothing)
    call = new_call()

    def fail() -> None:
        do_stop(call)
        raise ZeroDivisionError

    with pytest.raises(kind) as raised:
        call.call(fail, nothing)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_stop_after_the_function_returned_does_nothing():
    call = new_call()
    assert call.call(lambda: 7, nothing) == 7
    call.lose()
    call.check()


def test_only_the_first_stop_counts():
    call = new_call()

    def stop_twice() -> None:
        call.cancel()
        call.lose()

    with pytest.raises(StepCancelledError):
        call.call(stop_twice, nothing)


def test_a_call_that_was_stopped_before_it_began_does_not_begin():
    calls, called = RunningCalls(60.0), []
    calls.interrupt()
    with pytest.raises(StepCancelledError):
        calls.call(new_call(), lambda: called.append(1))
    assert called == []


PROGRAM = """
import os, threading, time
from simpo_pipeline.executor.running.stopping import RunningCalls, StoppableCall
from simpo_pipeline.storage.fence import OPEN

calls = RunningCalls(0.2)
record = {"quick": lambda name: os.write(1, f"{name} ".encode()), "stuck": lambda name: time.sleep(600)}[RECORD]
steps = [StoppableCall(name, OPEN, lambda name=name: record(name)) for name in ("first", "second")]
for step in steps:
    threading.Thread(target=calls.call, args=(step, lambda: time.sleep(600)), daemon=True).start()
time.sleep(0.1)
{"lose": steps[0].lose, "interrupt": calls.interrupt}[STOP]()
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("stop", "record", "recorded"),
    [
        ("lose", "quick", ["second"]),
        ("interrupt", "quick", ["first", "second"]),
        ("interrupt", "stuck", []),
    ],
)
def test_the_process_exits_if_a_function_does_not_end_and_the_other_steps_are_cancelled(
    stop: str, record: str, recorded: list[str]
):
    program = PROGRAM.replace("STOP", repr(stop)).replace("RECORD", repr(record))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == STOPPED_EXIT_CODE
    assert sorted(done.stdout.split()) == recorded
    assert "step first did not end within 0.2 s" in done.stderr or stop == "interrupt"
