"""Several processes of one job, simulated by threads. Each has its own executor, and they agree through a barrier."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

import simpo_pipeline.executor.executor as executor_module
from simpo_pipeline.errors import (
    ConfigError,
    LeaseLostError,
    PeerFailedError,
    PlanError,
    SimpoPipelineError,
    StepError,
    StepFailedError,
)
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.records.holder import Holder
from simpo_pipeline.executor.records.lease import LeaseConfig
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, take, this_output_path, versioned
from simpo_pipeline.processes import NoWatch, Processes
from simpo_pipeline.storage.files import exists, list_files, read_json, read_text, remove_tree, write_bytes, write_text
from simpo_pipeline.storage.paths import join

COUNT = 4


class Meeting:
    """Communication that lets threads agree and gather as processes do. A missing call fails the test by timeout."""

    def __init__(self, count: int):
        self._values: list[Any] = [None] * count
        self._barrier = threading.Barrier(count, timeout=20)

    def gather(self, index: int, value: Any) -> list[Any]:
        self._values[index] = value
        self._barrier.wait()
        gathered = list(self._values)
        self._barrier.wait()
        return gathered

    def process(self, index: int) -> Processes:
        return Processes(
            process_index=index,
            process_count=len(self._values),
            agree=lambda value: self.gather(index, value)[0],
            gather=lambda value: self.gather(index, value),
        )


def on_all_hosts(
    prefix: str, make_steps: Callable[[int], list[ExecutorStep]], *, lease: LeaseConfig | None = None, **options: Any
) -> list[Any]:
    """Run the steps on every host. Return the executor of each process, or the error that it raised."""
    meeting = Meeting(COUNT)
    ended: list[Any] = [None] * COUNT

    def work(index: int):
        executor = Executor(prefix, processes=meeting.process(index), lease=lease)
        try:
            executor.run(make_steps(index), **options)
            ended[index] = executor
        except SimpoPipelineError as error:
            ended[index] = error

    threads = [threading.Thread(target=work, args=(index,), name=f"host {index}") for index in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def interleave(calls: list[str], fail_on: tuple[int, ...] = ()) -> list[ExecutorStep]:
    def prepare(config: list[str]):
        calls.append("prepare")

    def train(config: list[Any], run: StepRun) -> Live:
        calls.append(f"{run.name} {run.replaying}")
        return Live({"host": run.processes.process_index}, digest=f"shard {run.processes.process_index}")

    def infer(config: list[Any], run: StepRun):
        me = run.processes.process_index
        if me in fail_on:
            raise RuntimeError(f"host {me} lost a device")
        write_text(join(config[1], f"host_{me}.txt"), f"{config[0]['host']}")
        run.processes.gather("all rows are written")
        calls.append(run.name)

    prepared = ExecutorStep("prepare", prepare, [])
    first = ExecutorStep("train-2", train, [prepared, versioned(2)])
    middle = ExecutorStep("infer", infer, [borrow(first), this_output_path()])
    last = ExecutorStep("train-5", train, [prepared, take(first)])
    return [prepared, first, middle, last, ExecutorStep("report", prepare, [output_path_of(middle)])]


def test_every_process_runs_every_step_with_its_own_live_values(prefix):
    calls: list[list[str]] = [[] for _ in range(COUNT)]
    executors = on_all_hosts(prefix, lambda index: interleave(calls[index]))
    # A step function without a `run` argument only reads and writes files, so it runs on the leader alone.
    assert calls[0] == ["prepare", "train-2 False", "infer", "train-5 False", "prepare"]
    assert calls[1:] == [["train-2 False", "infer", "train-5 False"]] * (COUNT - 1)
    assert len({executor.plan for executor in executors}) == 1
    path = executors[0].output_paths[executors[0].steps[2]]
    assert [read_text(join(path, f"host_{index}.txt")) for index in range(COUNT)] == ["0", "1", "2", "3"]
    assert [file["path"] for file in read_json(join(path, "manifest.json"))["files"]] == [
        f"host_{index}.txt" for index in range(COUNT)
    ]


def test_every_process_skips_and_replays_as_the_leader_decides(prefix):
    executors = on_all_hosts(prefix, lambda index: interleave([]))
    last = next(step for step in executors[0].steps if step.name == "train-5")
    remove_tree(join(executors[0].output_paths[last], ".executor_status"))
    calls: list[list[str]] = [[] for _ in range(COUNT)]
    executors = on_all_hosts(prefix, lambda index: interleave(calls[index]))
    assert calls == [["train-2 True", "train-5 False"]] * COUNT
    assert [result.action for result in executors[3].results] == ["SKIP", "REPLAY", "SKIP", "RUN", "SKIP"]


def test_when_a_step_fails_on_every_host_every_process_names_the_first(prefix):
    calls: list[list[str]] = [[] for _ in range(COUNT)]
    errors = on_all_hosts(prefix, lambda index: interleave(calls[index], fail_on=(0, 1, 2, 3)))
    assert all(isinstance(error, StepFailedError) for error in errors)
    assert all("'infer' failed on host" in str(error) and "(process 0 of 4)" in str(error) for error in errors)
    assert calls[0] == ["prepare", "train-2 False", "train-5 False"]
    assert calls[1:] == [["train-2 False", "train-5 False"]] * (COUNT - 1)
    failures = [entry for entry in list_files(prefix) if entry.relative_path.endswith("error.json")]
    failed = read_json(join(prefix, failures[0].relative_path))["failures"]
    assert [failure["process_index"] for failure in failed] == [0, 1, 2, 3]


def test_one_failing_host_fails_the_step_everywhere_and_its_traceback_is_reported(prefix):
    def steps(index: int) -> list[ExecutorStep]:
        def fail_on_two(config: Any, run: StepRun):
            if run.processes.process_index == 2:
                raise RuntimeError("lost a device")

        step = ExecutorStep("train", fail_on_two, None)
        return [ExecutorStep("after", lambda config: None, output_path_of(step))]

    errors = on_all_hosts(prefix, steps)
    assert {str(error).splitlines()[0] for error in errors} == {str(errors[0]).splitlines()[0]}
    assert "(process 2 of 4): RuntimeError: lost a device" in str(errors[0])
    assert isinstance(errors[2].__cause__, RuntimeError)
    assert "in fail_on_two" in errors[0].__notes__[0]


def test_a_leader_that_cannot_read_storage_fails_every_process(tmp_path):
    (tmp_path / "file").write_text("in the way")
    errors = on_all_hosts(str(tmp_path / "file" / "runs"), lambda index: interleave([]))
    assert all(isinstance(error, SimpoPipelineError) for error in errors)
    assert all("file" in str(error) for error in errors)


def test_processes_with_different_steps_report_where_they_diverge(prefix):
    def steps(index: int) -> list[ExecutorStep]:
        return [ExecutorStep("train", lambda config: None, [versioned(0 if index != 2 else 1)])]

    errors = on_all_hosts(prefix, steps)
    assert all(isinstance(error, PlanError) for error in errors)
    assert all("Process 2 built a different DAG than process 0: train-" in str(error) for error in errors)


def test_a_process_that_stopped_because_of_a_peer_is_not_named_first(prefix):
    def steps(index: int) -> list[ExecutorStep]:
        def fail(config: Any, run: StepRun):
            if run.processes.process_index == 2:
                raise RuntimeError("lost a device")
            raise PeerFailedError("process 2 of 4 failed, so this one stopped")

        return [ExecutorStep("train", fail, None)]

    errors = on_all_hosts(prefix, steps)
    assert all("(process 2 of 4): RuntimeError: lost a device (at " in str(error) for error in errors)
    assert all("test_many_hosts.py" in str(error) for error in errors)
    (recorded,) = [entry for entry in list_files(prefix) if entry.relative_path.endswith("error.json")]
    failures = read_json(join(prefix, recorded.relative_path))["failures"]
    assert [failure["process_index"] for failure in failures] == [2, 0, 1, 3]


def test_hosts_that_do_not_share_the_prefix_are_named_before_any_step_runs(prefix, monkeypatch):
    calls: list[str] = []
    blind = {"host 1", "host 3"}
    monkeypatch.setattr(executor_module, "exists", lambda path: threading.current_thread().name not in blind)
    errors = on_all_hosts(prefix, lambda index: interleave(calls))
    assert all(isinstance(error, PlanError) for error in errors)
    assert all("process 1, 3 does not see it" in str(error) for error in errors)
    assert calls == []
    assert list_files(prefix) == []


def test_a_job_terminated_by_its_watch_records_the_step_as_failed(prefix):
    """The abort comes from another thread while the step function is stuck, as from the watch of a real job."""
    aborts: list[Callable[[Any], None]] = []
    failure = {"process_index": 1, "host": "b", "exception": "it was killed", "traceback": None}

    class Watch(NoWatch):
        def phase(self, name: str, *, files_only: bool, on_abort: Any) -> Any:
            aborts.append(on_abort)
            return super().phase(name, files_only=files_only, on_abort=on_abort)

    class Ended(BaseException):
        """Stand-in for the end of the process."""

    def stuck(config: Any, run: StepRun):
        thread = threading.Thread(target=aborts[-1], args=(failure,))
        thread.start()
        thread.join()
        raise Ended

    with pytest.raises(Ended):
        Executor(prefix, processes=Processes(watch=Watch())).run([ExecutorStep("train", stuck, None)])
    files = {entry.relative_path.split("/", 1)[1]: entry.relative_path for entry in list_files(prefix)}
    assert read_text(join(prefix, files[".executor_status"])) == "FAILED"
    assert read_json(join(prefix, files["error.json"]))["failures"] == [failure]
    assert ".executor_status.lock" not in files


def test_a_dry_run_on_many_hosts_is_one_plan(prefix):
    executors = on_all_hosts(prefix, lambda index: interleave([]), dry_run=True)
    assert len({executor.plan for executor in executors}) == 1
    assert not exists(prefix)


def test_a_process_index_outside_the_job_is_refused():
    with pytest.raises(ConfigError, match="process_index is 4 of 4"):
        Processes(4, 4)


def test_when_the_lease_is_lost_no_process_continues_writing(prefix):
    other = Holder("other-run", "another-host", 12, "2026-01-01T00:00:00+00:00")
    lease = LeaseConfig(heartbeat_seconds=0.05, expiry_seconds=60.0, poll_seconds=0.01)
    refused: list[str] = []

    def lose(config: Any, run: StepRun):
        # Gather before the lease is lost: afterwards some processes may have raised already.
        run.processes.gather("all are here")
        if run.processes.is_leader:
            write_bytes(run.output.path_of(".executor_status.lock"), other.encode())
        try:
            while True:
                run.output.write_text(f"host_{run.processes.process_index}.txt", "late")
        except LeaseLostError as error:
            refused.append(str(error))
            raise

    ended = on_all_hosts(prefix, lambda index: [ExecutorStep("lose", lose, None)], lease=lease)
    assert len(refused) == COUNT
    assert all(isinstance(error, StepError) for error in ended)
