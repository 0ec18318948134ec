"""A step function can be stopped from another thread, anywhere in Python code."""

import subprocess
import sys
import threading
import time

import pytest

from simpo_pipeline.errors import LeaseLostError
from simpo_pipeline.executor.running.stopping import LOST_EXIT_CODE, StoppableCall


def stop_when(call: StoppableCall, begun: threading.Event) -> threading.Thread:
    def stop() -> None:
        assert begun.wait(20)
        call.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    return thread


def test_return_values_and_exceptions_pass_through():
    assert StoppableCall(60.0).call(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        StoppableCall(60.0).call(lambda: 1 // 0)


def test_an_endless_function_is_stopped_even_if_it_swallows_exceptions():
    call, begun, cleaned = StoppableCall(60.0), threading.Event(), threading.Event()

    def endless() -> None:
        try:
            while True:
                begun.set()
                try:
                    time.sleep(0.001)
                except Exception:
                    continue
        finally:
            cleaned.set()

    thread = stop_when(call, begun)
    with pytest.raises(LeaseLostError, match="lost its lease"):
        call.call(endless)
    thread.join()
    assert cleaned.is_set()


def test_a_stop_after_the_function_returned_does_nothing():
    call = StoppableCall(60.0)
    assert call.call(lambda: 7) == 7
    call.stop()
    assert sum(range(10_000)) == 49_995_000  # and no error is raised later


def test_a_stop_at_any_moment_affects_only_the_call():
    """Stop many short calls at a random moment around their end. The error never escapes into the code that follows."""
    for number in range(300):
        call, begun = StoppableCall(60.0), threading.Event()

        def short(begun: threading.Event = begun, turns: int = 10 * (number % 30)) -> int:
            begun.set()
            return sum(range(turns))

        thread = stop_when(call, begun)
        try:
            call.call(short)
        except LeaseLostError:
            pass
        thread.join()
        assert call._thread is None and call._ended.is_set()


def test_the_process_exits_if_a_function_is_stuck_in_native_code():
    program = (
        "import ctypes, threading\n"
        "from simpo_pipeline.executor.running.stopping import StoppableCall\n"
        "call = StoppableCall(0.2)\n"
        "threading.Timer(0.1, call.stop).start()\n"
        "call.call(lambda: ctypes.CDLL(None).sleep(600))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == LOST_EXIT_CODE
    assert "did not stop within 0.2 s" in done.stderr


def test_after_a_call_a_profiler_can_run():
    """Python 3.11 loops forever here if an exception that was set for a thread is cleared again."""
    program = (
        "import cProfile\n"
        "from simpo_pipeline.executor.running.stopping import StoppableCall\n"
        "StoppableCall(60.0).call(lambda: 7)\n"
        "cProfile.Profile().runcall(lambda: [str(n) for n in range(100)])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_stop_waits_until_locks_are_released():
    """Stop calls inside a block that holds a lock, many times. The lock is always released."""
    lock = threading.Lock()
    for _ in range(100):
        call, begun = StoppableCall(60.0), threading.Event()

        def endless(call: StoppableCall = call, begun: threading.Event = begun) -> None:
            while True:
                with call.shielded(), lock:
                    begun.set()

        thread = stop_when(call, begun)
        with pytest.raises(LeaseLostError):
            call.call(endless)
        thread.join()
        assert not lock.locked()
