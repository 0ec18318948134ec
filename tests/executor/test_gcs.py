"""The executor on Google Cloud Storage over HTTP: its requests, and its behaviour under faults and kills."""

import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.main import ExecutorMainConfig, executor_main
from simpo_pipeline.executor.records.lease import LeaseConfig
from simpo_pipeline.executor.step import ExecutorStep, this_output_path, versioned
from simpo_pipeline.storage.files import write_text
from simpo_pipeline.storage.paths import join

PROGRAM = Path(__file__).parent / "programs" / "bucket_job.py"
CHANGES = ["POST", "PUT", "PATCH", "DELETE"]
MAX_OPERATIONS = 12


def write(config: list[Any]) -> None:
    write_text(join(config[0], "data/out.txt"), "x")


def chain(length: int) -> list[ExecutorStep]:
    steps: list[ExecutorStep] = []
    for number in range(length):
        before = steps[-1] / "data" if steps else None
        steps.append(ExecutorStep(f"step-{number}", write, [this_output_path(), versioned(number), before]))
    return steps


def operations(gcs: Any, prefix: str, length: int) -> Counter[str]:
    """Run a job of `length` steps and count its requests by kind, without those for the data."""
    gcs.reset_log()
    executor_main(ExecutorMainConfig(prefix=prefix), steps=chain(length))
    return Counter(entry["kind"] for entry in gcs.log() if not entry["path"].endswith("data/out.txt"))


def test_a_step_costs_at_most_twelve_operations(gcs, gcs_here):
    few, many = operations(gcs, f"{gcs_here}/few", 4), operations(gcs, f"{gcs_here}/many", 14)
    of_each_step = {kind: (many[kind] - few[kind]) / 10 for kind in many}
    print(of_each_step)
    assert sum(of_each_step.values()) <= MAX_OPERATIONS
    assert sum(few.values()) <= 4 * MAX_OPERATIONS + 10  # 10 for the job itself: its plan, its record and its probe


@pytest.mark.parametrize("length", [3, 40])
def test_a_plan_lists_each_step_at_most_once(gcs, gcs_here, length):
    steps = chain(length)
    gcs.reset_log()
    Executor(gcs_here).run(steps, dry_run=True)
    assert len(gcs.log()) <= length + 1  # 1 lists the names in the prefix, which explain why a step is new
    Executor(gcs_here).run(steps)
    gcs.reset_log()
    planned = Executor(gcs_here)
    planned.run(steps, dry_run=True)
    assert {row.action for row in planned.plan} == {"SKIP"}
    asked = Counter(entry["path"] for entry in gcs.log())
    assert {entry["kind"] for entry in gcs.log()} == {"list"}
    assert max(asked.values()) == 1
    assert sum(asked.values()) <= length + 1


def test_an_output_that_differs_from_the_commit_is_detected_from_the_listing(gcs, gcs_here):
    step = chain(1)
    job = Executor(gcs_here)
    job.run(step)
    write_text(join(job.output_paths[step[0]], "data/out.txt"), "y")  # the same size
    planned = Executor(gcs_here)
    planned.run(step, dry_run=True)
    assert [row.action for row in planned.plan] == ["RUN"]
    assert "lists data/out.txt with CRC32C" in planned.plan[0].reason


def check_outputs(gcs: Any, name: str, *, all_done: bool) -> None:
    """Assert that steps with status SUCCESS have complete outputs, by the checksums of the store.

    With `all_done`, every step must have status SUCCESS.
    """
    objects = gcs.objects(name)
    statuses = [path for path in objects if path.endswith("/.executor_status")]
    assert len(statuses) == 3 or not all_done
    for path in statuses:
        token, folder = gcs.read(path).decode(), path.removesuffix("/.executor_status")
        assert token in ("RUNNING", "SUCCESS") and (token == "SUCCESS" or not all_done)
        if token == "SUCCESS":
            listed = json.loads(gcs.read(f"{folder}/manifest.json"))["files"]
            assert [file["path"] for file in listed] == ["deep/more.txt", "out.txt"]
            assert [objects[f"{folder}/{file['path']}"]["crc32c"] for file in listed] == [
                file["crc32c"] for file in listed
            ]


def kill_at_every_change(start_program: Any, gcs: Any, name: str, when: str) -> int:
    """Kill the job at change 1, 2, ... until it finishes, and rerun it after each kill. Return the number of kills."""
    point = 0
    while True:
        point += 1
        prefix = f"{name}/{point}"
        job, pid = start_program(PROGRAM, f"gs://bucket/{prefix}", environment=gcs.environment())
        gcs.stop_at(pid=pid, request=point, when=when, signal="KILL", methods=CHANGES, match=f"^{prefix}/")
        _, errors = job.communicate("begin\n", timeout=120)
        fired = gcs.stop_state()["fired"]
        gcs.stop_at()
        check_outputs(gcs, f"{prefix}/", all_done=False)
        if not fired:
            assert job.returncode == 0, errors
            return point - 1
        assert job.returncode == -signal.SIGKILL
        again, _ = start_program(PROGRAM, f"gs://bucket/{prefix}", environment=gcs.environment())
        _, errors = again.communicate("begin\n", timeout=120)
        assert again.returncode == 0, errors
        check_outputs(gcs, f"{prefix}/", all_done=True)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_after_a_kill_at_any_change_of_the_bucket_the_next_run_finishes(start_program, gcs, when):
    """Each step makes 10 changes: lease, RUNNING, info, two outputs, manifest, code, info, SUCCESS, lease."""
    assert kill_at_every_change(start_program, gcs, f"kill-{when}-{os.getpid()}", when) >= 3 * 10


@pytest.mark.parametrize("kind", ["503", "cut_after", "delete_lost"])
def test_any_one_request_may_fail_and_nothing_is_done_twice_or_lost(gcs, gcs_here, kind):
    name = gcs_here.removeprefix("gs://bucket/")
    gcs.faults(kinds=[kind], rate=0.25, seed=3, times=2, match=name)
    job = Executor(gcs_here)
    steps = chain(1)
    job.run(steps)
    gcs.no_faults()
    assert [result.action for result in job.results] == ["RUN"]
    objects = gcs.objects(f"{name}/step-0-")
    assert not [path for path in objects if path.endswith(".lock")]
    again = Executor(gcs_here)
    again.run(steps, dry_run=True)
    assert [row.action for row in again.plan] == ["SKIP"]


def test_a_step_is_not_taken_over_during_an_upload_longer_than_the_expiry(gcs, gcs_here):
    lease = LeaseConfig(heartbeat_seconds=0.1, expiry_seconds=0.5, poll_seconds=0.05)
    calls: list[str] = []
    begun = threading.Event()

    def upload_slowly(config: list[str]) -> None:
        calls.append("upload")
        begun.set()
        write_text(join(config[0], "large.bin"), "x")

    def run(results: list[str]) -> None:
        job = Executor(gcs_here, lease=lease)
        job.run([ExecutorStep("step", upload_slowly, [this_output_path()])])
        results.extend(result.action for result in job.results)

    gcs.faults(kinds=["slow"], slow_seconds=2.0, match="large.bin", methods=["POST"])
    first: list[str] = []
    thread = threading.Thread(target=run, args=(first,))
    thread.start()
    assert begun.wait(20)
    second: list[str] = []
    run(second)
    thread.join()
    assert (first, second, calls) == (["RUN"], ["SKIP"], ["upload"])


def test_the_files_of_a_commit_are_written_in_order(gcs, gcs_here):
    gcs.reset_log()
    Executor(gcs_here).run(chain(1))
    changed = [entry["path"].rsplit("/", 1)[1] for entry in gcs.log() if entry["kind"] in ("insert", "delete")]
    own = changed[changed.index(".executor_status.lock") :]
    expected = [".executor_status.lock", ".executor_status", ".executor_info", "out.txt"]
    expected += ["manifest.json", ".executor_code", ".executor_info", ".executor_status", ".executor_status.lock"]
    assert own[: len(expected)] == expected
