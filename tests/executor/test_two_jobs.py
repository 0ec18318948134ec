"""Two jobs on one prefix: each waits for the steps that the other one runs."""

import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from simpo_pipeline.errors import LeaseLostError, StorageError
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.records import lease
from simpo_pipeline.executor.records.holder import Holder
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseKeeper
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.executor.running import attempt
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, take, this_output_path
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.files import exists, read_bytes, read_text, remove_tree, write_bytes, write_text
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join

LEASE = LeaseConfig(heartbeat_seconds=0.05, expiry_seconds=60.0, poll_seconds=0.01)
OTHER = Holder("other-run", "another-host", 12, "2026-01-01T00:00:00+00:00")


def executor(prefix: str, session: Any = None) -> Executor:
    return Executor(prefix, session=session, lease=LEASE)


def in_thread(job: Executor, steps: list[ExecutorStep]) -> threading.Thread:
    thread = threading.Thread(target=job.run, args=(steps,))
    thread.start()
    return thread


def test_the_second_job_waits_for_a_shared_step_and_then_uses_it(prefix):
    shared_runs, may_end = threading.Event(), threading.Event()
    calls: list[str] = []

    def shared(config: list[str]):
        calls.append("shared")
        shared_runs.set()
        assert may_end.wait(20)
        write_text(join(config[0], "x"), "made once")

    def steps(name: str) -> list[ExecutorStep]:
        def use(config: list[str]):
            calls.append(f"{name} reads {read_text(config[0])}")

        first = ExecutorStep("shared", shared, [this_output_path()])
        return [ExecutorStep(name, use, [first / "x"])]

    one, two = executor(prefix), executor(prefix)
    thread = in_thread(one, steps("one"))
    assert shared_runs.wait(20)
    waiting = executor(prefix)
    waiting.run(steps("two"), dry_run=True)
    assert [(row.step_name, row.action) for row in waiting.plan] == [("shared", "WAIT"), ("two", "RUN")]
    assert "held by pid" in waiting.plan[0].reason
    second = in_thread(two, steps("two"))
    may_end.set()
    thread.join()
    second.join()
    assert sorted(calls) == ["one reads made once", "shared", "two reads made once"]
    assert [result.action for result in two.results] == ["SKIP", "RUN"]


def test_independent_steps_run_while_waiting_for_another_job(prefix):
    ran = threading.Event()
    job = executor(prefix)
    held = ExecutorStep("held", lambda config: None, None)
    free = ExecutorStep("free", lambda config: ran.set(), None)
    job.run([held], dry_run=True)
    lock = join(job.output_paths[held], ".executor_status.lock")
    write_bytes(lock, OTHER.encode())
    thread = in_thread(job, [held, free])
    assert ran.wait(20)
    assert thread.is_alive()
    remove_tree(lock)
    thread.join()
    assert [result.action for result in job.results] == ["RUN", "RUN"]


def test_a_live_value_is_kept_for_a_consumer_that_another_job_released(prefix):
    calls: list[str] = []
    made = threading.Event()

    def publish(config: Any, run: StepRun) -> Live:
        calls.append(f"{run.name} {run.replaying}")
        made.set()
        return Live("value", digest="d")

    def use(config: list[Any], run: StepRun):
        calls.append(f"{run.name} {config[0]}")

    first = ExecutorStep("publish", publish, None)
    borrower = ExecutorStep("borrower", use, [borrow(first)])
    taker = ExecutorStep("taker", use, [take(first)])
    job = executor(prefix)
    job.run([borrower, taker], dry_run=True)
    lock = join(job.output_paths[borrower], ".executor_status.lock")
    write_bytes(lock, OTHER.encode())
    thread = in_thread(job, [borrower, taker])
    assert made.wait(20)
    remove_tree(lock)
    thread.join()
    assert calls == ["publish False", "borrower value", "taker value"]


def test_no_replay_is_made_for_a_step_that_another_job_runs(prefix):
    calls: list[str] = []

    def publish(config: Any, run: StepRun) -> Live:
        calls.append("publish")
        return Live("value", digest="d")

    first = ExecutorStep("publish", publish, None)
    user = ExecutorStep("user", lambda config: calls.append("user"), [take(first)])
    job = executor(prefix)
    job.run([first])
    job.run([user], dry_run=True)
    path = job.output_paths[user]
    write_bytes(join(path, ".executor_status.lock"), OTHER.encode())
    again = executor(prefix)
    thread = in_thread(again, [user])
    write_text(join(path, "manifest.json"), json.dumps({"files": []}))
    write_text(join(path, ".executor_status"), "SUCCESS")
    thread.join()
    assert calls == ["publish"]
    assert [result.action for result in again.results] == ["SKIP", "SKIP"]


def test_a_job_that_lost_its_lease_records_nothing_more(prefix):
    job = Executor(prefix)  # its heartbeat is too slow to notice before the step finishes

    def lose(config: list[str]):
        write_text(join(config[0], "x"), "x")
        write_bytes(join(config[0], ".executor_status.lock"), OTHER.encode())
        write_text(join(config[0], ".executor_status"), "RUNNING")  # as at the start of the other job

    step = ExecutorStep("lose", lose, [this_output_path()])
    after = ExecutorStep("after", lambda config: None, output_path_of(step))
    with pytest.raises(LeaseLostError, match="pid 12 on host another-host"):
        job.run([after])
    path = job.output_paths[step]
    assert read_text(join(path, ".executor_status")) == "RUNNING"
    assert read_bytes(join(path, ".executor_status.lock")) == OTHER.encode()
    assert not exists(join(path, "error.json"))


def test_a_step_whose_lease_is_lost_is_stopped_and_its_writes_are_refused(prefix):
    wrote: list[str] = []

    def keep_working(config: Any, output: OutputFolder):
        write_bytes(output.path_of(".executor_status.lock"), OTHER.encode())
        try:
            while True:
                output.check()
        finally:
            output.write_text("late", "x")
            wrote.append("late")

    step = ExecutorStep("step", keep_working, None)
    job = executor(prefix)
    with pytest.raises(LeaseLostError):
        job.run([step])
    assert wrote == []
    assert read_text(join(job.output_paths[step], ".executor_status")) == "RUNNING"
    assert not exists(join(job.output_paths[step], "late"))


def one_step(calls: list[str], name: str) -> ExecutorStep:
    def work(config: list[str]):
        calls.append(name)
        write_text(join(config[0], "x"), name)

    return ExecutorStep("step", work, [this_output_path()])


def test_a_step_finished_by_another_job_between_plan_and_lease_is_not_run_again(prefix, monkeypatch):
    calls: list[str] = []
    acquire = LeaseKeeper.acquire

    def after_the_other(self: LeaseKeeper, path: str) -> bool:
        monkeypatch.setattr(LeaseKeeper, "acquire", acquire)
        executor(prefix).run([one_step(calls, "other")])
        return self.acquire(path)

    monkeypatch.setattr(LeaseKeeper, "acquire", after_the_other)
    job = executor(prefix)
    job.run([one_step(calls, "mine")])
    assert calls == ["other"]
    assert [result.action for result in job.results] == ["SKIP"]


def test_a_late_success_of_a_former_holder_is_kept(prefix, monkeypatch):
    """The SUCCESS arrives after we acquired the lease and read the record, and before we write RUNNING."""
    calls: list[str] = []
    step = one_step(calls, "mine")
    done = executor(prefix)
    done.run([step])
    calls.clear()
    status = join(done.output_paths[step], ".executor_status")
    write_text(status, "RUNNING")
    look = attempt.read_record

    def look_then_success(output_path: str, watch: Any) -> Any:
        record = look(output_path, watch)
        monkeypatch.setattr(attempt, "read_record", look)
        write_text(status, "SUCCESS")
        return record

    monkeypatch.setattr(attempt, "read_record", look_then_success)
    job = executor(prefix)
    job.run([step])
    assert calls == []
    assert [result.action for result in job.results] == ["SKIP"]
    assert read_text(status) == "SUCCESS"


def test_a_forced_step_that_another_job_runs_is_waited_for_and_then_run(prefix):
    calls: list[str] = []
    step = one_step(calls, "mine")
    first = executor(prefix)
    first.run([step])
    lock = join(first.output_paths[step], ".executor_status.lock")
    write_bytes(lock, OTHER.encode())
    job = executor(prefix)
    planned = executor(prefix)
    planned.run([step], dry_run=True, force=["step"])
    assert [row.action for row in planned.plan] == ["WAIT"]
    thread = threading.Thread(target=job.run, args=([step],), kwargs={"force": ["step"]})
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()  # although SUCCESS is recorded
    remove_tree(lock)
    thread.join()
    assert calls == ["mine", "mine"]
    assert [result.action for result in job.results] == ["RUN"]


@pytest.mark.parametrize("when", ["listing", "success"])
def test_a_failure_never_overwrites_a_success(prefix, monkeypatch, when):
    """Storage fails right after another job committed the step, or while we wait for the response to our SUCCESS."""
    calls: list[str] = []
    step = one_step(calls, "mine")
    job = executor(prefix)

    def lost(*arguments: Any) -> Any:
        monkeypatch.undo()
        raise StorageError("storage is out of reach")

    if when == "listing":
        acquire = LeaseKeeper.acquire

        def after_the_other(self: LeaseKeeper, path: str) -> bool:
            monkeypatch.undo()
            executor(prefix).run([one_step(calls, "other")])
            monkeypatch.setattr(attempt, "read_record", lost)
            return acquire(self, path)

        monkeypatch.setattr(LeaseKeeper, "acquire", after_the_other)
    else:
        write = ConditionalFiles.replace

        def replace_and_lose(self: ConditionalFiles, path: str, expected: str | None, data: bytes) -> str | None:
            version = write(self, path, expected, data)
            return lost() if data == b"SUCCESS" else version

        monkeypatch.setattr(ConditionalFiles, "replace", replace_and_lose)
    with pytest.raises(StorageError, match="out of reach"):
        job.run([step])
    path = job.output_paths[step]
    assert read_text(join(path, ".executor_status")) == "SUCCESS"
    assert not exists(join(path, "error.json"))
    assert not exists(join(path, ".executor_status.lock"))


def test_a_step_that_swallows_a_refused_write_has_lost_its_lease_anyway(prefix):
    refused: list[str] = []

    def finish_nevertheless(config: Any, output: OutputFolder):
        write_bytes(output.path_of(".executor_status.lock"), OTHER.encode())
        while not refused:
            try:
                output.write_text("x", "x")
            except LeaseLostError as error:
                refused.append(str(error))

    step = ExecutorStep("step", finish_nevertheless, None)
    with pytest.raises(LeaseLostError):
        executor(prefix).run([step])
    assert len(refused) == 1


def test_a_lease_that_cannot_be_taken_over_is_an_error_and_not_an_endless_loop(prefix, monkeypatch):
    calls: list[str] = []
    step = one_step(calls, "mine")
    job = executor(prefix)
    job.run([step], dry_run=True)
    gone = replace(Holder.of_this_process("gone"), started="1")
    write_bytes(join(job.output_paths[step], ".executor_status.lock"), gone.encode())

    def refuse(*arguments: Any) -> Any:
        raise StorageError("403")

    monkeypatch.setattr(ConditionalFiles, "replace", refuse)
    with pytest.raises(StorageError, match="403"):
        job.run([step])
    assert calls == []


def take_over(output_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a frozen job: another job takes the step over, and the expiry passes twice."""
    write_bytes(join(output_path, ".executor_status.lock"), OTHER.encode())
    write_text(join(output_path, ".executor_status"), "RUNNING")
    write_text(join(output_path, ".executor_info"), "{}")
    later = lease._now() + 2 * LEASE.expiry_seconds
    monkeypatch.setattr(lease, "_now", lambda: later)


def test_a_job_frozen_between_lease_and_read_overwrites_nothing_of_the_next_holder(prefix, monkeypatch):
    calls: list[str] = []
    step = one_step(calls, "mine")
    look = attempt.read_record

    def look_after_the_freeze(output_path: str, watch: Any) -> Any:
        take_over(output_path, monkeypatch)
        return look(output_path, watch)

    monkeypatch.setattr(attempt, "read_record", look_after_the_freeze)
    job = executor(prefix)
    with pytest.raises(LeaseLostError, match="pid 12 on host another-host"):
        job.run([step])
    path = job.output_paths[step]
    assert calls == []
    assert [read_text(join(path, name)) for name in (".executor_status", ".executor_info")] == ["RUNNING", "{}"]


def test_a_job_frozen_while_retrying_a_write_overwrites_nothing_of_the_next_holder(prefix, monkeypatch):
    """Our SUCCESS collided with the last write of a former holder. We confirmed our lease, froze, and then resumed."""
    confirm = LeaseKeeper.confirm

    def confirm_and_freeze(self: LeaseKeeper, path: str) -> None:
        confirm(self, path)
        monkeypatch.setattr(LeaseKeeper, "confirm", confirm)
        take_over(path.rsplit("/", 1)[0], monkeypatch)

    def work(config: list[str]):
        write_text(join(config[0], ".executor_status"), "RUNNING")  # as a former holder does
        monkeypatch.setattr(LeaseKeeper, "confirm", confirm_and_freeze)

    job = executor(prefix)
    step = ExecutorStep("step", work, [this_output_path()])
    with pytest.raises(LeaseLostError, match="pid 12 on host another-host"):
        job.run([step])
    assert read_text(join(job.output_paths[step], ".executor_status")) == "RUNNING"
