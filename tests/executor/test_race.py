"""8 real processes race for one step, up to 200 times. Some are killed, and exactly one run takes effect each time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "programs" / "race.py"


def race(prefix: str, logs: Path, rounds: int, hosts: str, environment: dict[str, str] | None) -> list[dict[str, Any]]:
    logs.mkdir()
    command = [sys.executable, str(PROGRAM), prefix, str(logs), str(rounds), "1", hosts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(seen: list[dict[str, Any]], rounds: int) -> None:
    assert len(seen) == rounds
    assert [outcome["wrong"] for outcome in seen] == [None] * rounds
    assert [outcome["failed"] for outcome in seen] == [[]] * rounds
    assert sum(outcome["lost"] for outcome in seen) <= rounds / 10
    assert sum(outcome["killed"] for outcome in seen) >= rounds / 2
    assert sum(outcome["begun"] > 1 for outcome in seen) >= rounds / 10  # takeovers in the middle of a step


def test_ten_races(tmp_path):
    check(race(str(tmp_path / "runs"), tmp_path / "logs", 10, "one", None), 10)


@pytest.mark.slow
def test_two_hundred_races(tmp_path):
    check(race(str(tmp_path / "runs"), tmp_path / "logs", 200, "one", None), 200)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "gcs"])
def test_fifty_races_of_processes_that_cannot_see_each_other_die(tmp_path, gcs, place):
    prefix = str(tmp_path / "runs") if place == "local" else "gs://bucket/race-many"
    check(race(prefix, tmp_path / "logs", 50, "many", gcs.environment()), 50)
