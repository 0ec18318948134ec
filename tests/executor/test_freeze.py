"""Writes of a lease holder are refused after it was frozen (SIGSTOP) until another job took over and finished.

The tests freeze the holder before every change of storage that a run makes, one after the other, without sampling.
"""

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.executor.records.status import find_outputs, manifest_bytes
from simpo_pipeline.storage.files import exists, list_names, read_bytes, read_text
from simpo_pipeline.storage.paths import join

PROGRAM = Path(__file__).parent / "programs" / "freeze.py"
NEVER = 10_000
ANYWHERE = 0
HEARTBEAT = -1


class Program:
    """One run of the program, which starts at construction."""

    def __init__(self, start_program: Any, prefix: str, name: str, point: int, environment: dict[str, str]):
        self._client, self.pid = start_program(PROGRAM, prefix, name, str(point), environment=environment)
        self._client.stdin.write("begin\n")
        self._client.stdin.flush()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def has_ended(self) -> bool:
        return self._client.poll() is not None

    def outcome(self) -> dict[str, Any]:
        """Wait for the program to finish and return the JSON that it printed."""
        out, err = self._client.communicate(timeout=60)
        assert self._client.returncode == 0, err
        return json.loads(out)

    def wait_until_stopped(self) -> bool:
        """Wait until every thread is stopped. Return False if the program finished instead."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.has_ended():
                return False
            # The parent of the program is the fork server, so waitpid cannot report the stop here.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                threads = [path.read_text() for path in Path(f"/proc/{self.pid}/task").glob("*/stat")]
                if threads and all(stat.rsplit(")", 1)[1].split()[0] == "T" for stat in threads):
                    return True
            time.sleep(0.002)
        self._client.kill()
        raise TimeoutError("the program neither stopped nor ended")


@pytest.fixture
def start(start_program):
    """Return a function that starts a run of the program."""
    return functools.partial(Program, start_program)


def freeze_at_every_point(start: Callable[..., Program], place: str, environment: dict[str, str]) -> list[str]:
    """Freeze a holder at every point, and return its result for each: the error, or the action of its step."""
    ends: list[str] = []
    while True:
        point = len(ends) + 1
        prefix = f"{place}/{point}"
        frozen = start(prefix, "frozen", point, environment)
        if not frozen.wait_until_stopped():
            frozen.outcome()
            return ends
        other = start(prefix, "other", NEVER, environment).outcome()
        frozen.send(signal.SIGCONT)
        end = frozen.outcome()
        ends.append(end["error"] or end["actions"][0])
        check(other, end)


def check(other: dict[str, Any], end: dict[str, Any]) -> None:
    """Assert that exactly one of the two jobs made the outputs and that they are complete."""
    path = other["path"]
    assert other["error"] is None
    ran = {"RUN": "other", "SKIP": "frozen"}[other["actions"][0]]
    assert [read_text(join(path, name)) for name in ("first.txt", "second.txt")] == [ran, ran]
    assert read_text(join(path, ".executor_status")) == "SUCCESS"
    assert read_bytes(join(path, "manifest.json")) == manifest_bytes(find_outputs(path))
    info = json.loads(read_text(join(path, ".executor_info")))
    assert ran in info["argv"]
    assert info["finished_date"]
    assert not exists(join(path, "error.json"))
    assert ".executor_status.lock" not in list_names(path)
    assert end["error"] in (None, "LeaseLostError")
    assert end["actions"] == (["RUN"] if ran == "frozen" else ["SKIP"] if end["error"] is None else ["FAILED"])


@pytest.mark.slow
def test_wherever_a_holder_is_frozen_its_later_writes_are_refused(start, tmp_path):
    ends = freeze_at_every_point(start, str(tmp_path), dict(os.environ))
    assert len(ends) >= 11
    assert "LeaseLostError" in ends
    assert {"SKIP", "RUN"} <= set(ends)


@pytest.mark.slow
def test_wherever_a_holder_is_frozen_its_later_writes_to_a_bucket_are_refused(start, gcs, gcs_here):
    ends = freeze_at_every_point(start, "gs://bucket/freeze", gcs.environment())
    assert len(ends) >= 11
    assert {"LeaseLostError", "SKIP", "RUN"} <= set(ends)


@pytest.mark.parametrize("point", [ANYWHERE, HEARTBEAT])
def test_a_holder_frozen_during_its_work_stops_soon_after_it_resumes(start, tmp_path, point):
    prefix = str(tmp_path / "runs")
    frozen = start(prefix, "frozen", point, dict(os.environ))
    if point == ANYWHERE:
        while not list(Path(prefix).glob("shared-*/endless.txt")):
            assert not frozen.has_ended()
            time.sleep(0.002)
        frozen.send(signal.SIGSTOP)
    assert frozen.wait_until_stopped()
    other = start(prefix, "other", NEVER, dict(os.environ)).outcome()
    frozen.send(signal.SIGCONT)
    end = frozen.outcome()  # the step never finishes on its own
    assert end["error"] == "LeaseLostError"
    assert read_text(join(other["path"], "first.txt")) == "other"
