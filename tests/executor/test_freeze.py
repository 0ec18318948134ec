"""A holder that is frozen (SIGSTOP) until another job took its lease over and finished: its later writes are refused.

The freeze falls before each change of storage that a run makes, in turn: none is left out, none is sampled.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.executor.status import find_outputs, manifest_bytes
from simpo_pipeline.storage.files import exists, list_names, read_bytes, read_text
from simpo_pipeline.storage.paths import join

PROGRAM = Path(__file__).parent / "programs" / "freeze.py"
NEVER = 10_000
ANYWHERE = 0
HEARTBEAT = -1


def start(prefix: str, name: str, point: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), prefix, name, str(point)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


def wait_until_stopped(process: subprocess.Popen[str]) -> bool:
    """False when it ended instead."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, code = os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)
        if pid and os.WIFSTOPPED(code):
            return True
        if pid:
            process.returncode = os.waitstatus_to_exitcode(code)
            return False
        time.sleep(0.002)
    process.kill()
    raise TimeoutError("the program neither stopped nor ended")


def freeze_at_every_point(place: str, environment: dict[str, str]) -> list[str]:
    """How the frozen holder ended, by point."""
    ends: list[str] = []
    while True:
        point = len(ends) + 1
        prefix = f"{place}/{point}"
        frozen = start(prefix, "frozen", point, environment)
        if not wait_until_stopped(frozen):
            outcome(frozen)
            return ends
        other = outcome(start(prefix, "other", NEVER, environment))
        frozen.send_signal(signal.SIGCONT)
        end = outcome(frozen)
        ends.append(end["error"] or end["actions"][0])
        check(other, end)


def check(other: dict[str, Any], end: dict[str, Any]) -> None:
    """One of the two made everything that is there, and all of it is there."""
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
def test_wherever_a_holder_is_frozen_its_later_writes_are_refused(tmp_path):
    ends = freeze_at_every_point(str(tmp_path), dict(os.environ))
    assert len(ends) >= 11
    assert "LeaseLostError" in ends
    assert {"SKIP", "RUN"} <= set(ends)


@pytest.mark.slow
def test_wherever_a_holder_is_frozen_its_later_writes_to_a_bucket_are_refused(gcs, gcs_here):
    ends = freeze_at_every_point("gs://bucket/freeze", gcs.environment())
    assert len(ends) >= 11
    assert {"LeaseLostError", "SKIP", "RUN"} <= set(ends)


@pytest.mark.parametrize("point", [ANYWHERE, HEARTBEAT])
def test_a_holder_that_is_frozen_in_its_work_stops_soon_after_it_goes_on(tmp_path, point):
    prefix = str(tmp_path / "runs")
    frozen = start(prefix, "frozen", point, dict(os.environ))
    if point == ANYWHERE:
        while not list(Path(prefix).glob("shared-*/endless.txt")):
            assert frozen.poll() is None
            time.sleep(0.002)
        frozen.send_signal(signal.SIGSTOP)
    assert wait_until_stopped(frozen)
    other = outcome(start(prefix, "other", NEVER, dict(os.environ)))
    frozen.send_signal(signal.SIGCONT)
    end = outcome(frozen)  # its step never ends by itself
    assert end["error"] == "LeaseLostError"
    assert read_text(join(other["path"], "first.txt")) == "other"
