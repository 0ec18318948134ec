"""A stopped call can write nothing more, and its process exits if the function does not end."""

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from simpo_pipeline.errors import LeaseLostError, StepCancelledError, StepError
from simpo_pipeline.executor.running.stopping import STOPPED_EXIT_CODE, StoppableCall
from simpo_pipeline.storage.fence import OPEN

STOPS: dict[str, tuple[Callable[[StoppableCall], None], type[StepError]]] = {
    "lost": (StoppableCall.lose, LeaseLostError),
    "cancelled": (StoppableCall.cancel, StepCancelledError),
}


def new_call() -> StoppableCall:
    return StoppableCall(OPEN, 60.0, before_exit=lambda: None)


def test_return_values_and_exceptions_pass_through():
    assert new_call().call(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        new_call().call(lambda: 1 // 0)


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
        call.call(endless)
    thread.join()
    with pytest.raises(kind):
        call.check()


@pytest.mark.parametrize("stop", STOPS)
def test_the_reason_replaces_the_result_or_the_error_of_a_stopped_function(stop: str):
    do_stop, kind = STOPS[stop]
    call = new_call()
    with pytest.raises(kind):
        call.call(lambda: do_stop(call))
    call = new_call()

    def fail() -> None:
        do_stop(call)
        raise ZeroDivisionError

    with pytest.raises(kind) as raised:
        call.call(fail)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_stop_after_the_function_returned_does_nothing():
    call = new_call()
    assert call.call(lambda: 7) == 7
    call.lose()
    call.check()


def test_only_the_first_stop_counts():
    call = new_call()

    def stop_twice() -> None:
        call.cancel()
        call.lose()

    with pytest.raises(StepCancelledError):
        call.call(stop_twice)


@pytest.mark.parametrize(("stop", "said"), [("lose", []), ("cancel", ["recorded"])])
def test_the_process_exits_if_the_function_does_not_end(stop: str, said: list[str]):
    program = (
        "import threading, time\n"
        "from simpo_pipeline.executor.running.stopping import StoppableCall\n"
        "from simpo_pipeline.storage.fence import OPEN\n"
        "call = StoppableCall(OPEN, 0.2, before_exit=lambda: print('recorded', flush=True))\n"
        f"threading.Timer(0.1, call.{stop}).start()\n"
        "call.call(lambda: time.sleep(600))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == STOPPED_EXIT_CODE
    assert done.stdout.split() == said
    assert "did not end within 0.2 s" in done.stderr
