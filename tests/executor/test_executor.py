"""Experiments as users write them, and how the executor runs them."""

import dataclasses
import functools
import gc
import json
import os
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from simpo_pipeline.errors import ConfigError, PlanError, ReplayMismatchError, StepFailedError, StorageError
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.executor.step import (
    THIS_OUTPUT_PATH,
    ExecutorStep,
    InputName,
    borrow,
    output_path_of,
    take,
    this_output_path,
    versioned,
)
from simpo_pipeline.storage.checksum import crc32c_of
from simpo_pipeline.storage.files import exists, list_files, read_bytes, read_json, read_text, remove_tree, write_text
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join


class Trainer:
    """Live value that counts updates and cannot be used after its buffers are freed."""

    def __init__(self):
        self.step = 0
        self.freed = False

    def train_until(self, stop: int):
        assert not self.freed
        self.step = stop

    def free(self):
        self.freed = True


@dataclass(frozen=True)
class PrepareConfig:
    text: str
    output_path: str = THIS_OUTPUT_PATH


@dataclass(frozen=True)
class TrainConfig:
    data: str
    stop: int
    output_path: str = THIS_OUTPUT_PATH
    trainer: Trainer | None = None


@dataclass(frozen=True)
class InferConfig:
    trainer: Trainer
    rows: str = dataclasses.field(default_factory=lambda: this_output_path("rows.txt"))


def prepare(config: PrepareConfig):
    write_text(join(config.output_path, "data.txt"), config.text)


def train(config: TrainConfig, run: StepRun) -> Live:
    run.session.append(run.name)
    trainer = config.trainer or Trainer()
    trainer.train_until(config.stop)
    write_text(join(config.output_path, "log.txt"), f"{read_text(config.data)} {trainer.step}")
    return Live(trainer, digest=f"step {trainer.step}", free=trainer.free)


def infer(config: InferConfig, run: StepRun):
    run.session.append(run.name)
    write_text(config.rows, f"generated at step {config.trainer.step}")


def interleave(text: str = "pairs", first_stop: int = 2) -> dict[str, ExecutorStep]:
    prepared = ExecutorStep("prepare", prepare, PrepareConfig(versioned(text)))
    first = ExecutorStep("train-2", train, TrainConfig(prepared / "data.txt", versioned(first_stop)))
    middle = ExecutorStep("infer-128", infer, InferConfig(borrow(first)))
    last = ExecutorStep("train-5", train, TrainConfig(prepared / "data.txt", versioned(7), trainer=take(first)))
    return {step.name: step for step in (prepared, first, middle, last)}


def run(prefix: str, steps, session: Any = None, **options) -> Executor:
    executor = Executor(prefix, session=[] if session is None else session)
    executor.run(list(steps.values()) if isinstance(steps, dict) else steps, **options)
    return executor


def actions(executor: Executor) -> dict[str, str]:
    return {row.step_name: row.action for row in executor.plan}


def reason(executor: Executor, name: str) -> str:
    return next(row.reason for row in executor.plan if row.step_name == name)


def path_of(executor: Executor, name: str) -> str:
    return next(path for step, path in executor.output_paths.items() if step.name == name)


def status_of(executor: Executor, name: str) -> str:
    return read_text(join(path_of(executor, name), ".executor_status"))


def contents(executor: Executor, name: str) -> dict[str, bytes]:
    path = path_of(executor, name)
    return {entry.relative_path: read_bytes(join(path, entry.relative_path)) for entry in list_files(path)}


def test_generation_sees_the_trainer_mid_run_and_training_continues_with_it(prefix):
    calls: list[str] = []
    executor = run(prefix, interleave(), calls)
    assert calls == ["train-2", "infer-128", "train-5"]
    assert read_text(join(path_of(executor, "infer-128"), "rows.txt")) == "generated at step 2"
    assert read_text(join(path_of(executor, "train-5"), "log.txt")) == "pairs 7"
    assert [result.action for result in executor.results] == ["RUN"] * 4


def test_a_second_run_skips_every_step_and_calls_nothing(prefix):
    run(prefix, interleave())
    calls: list[str] = []
    executor = run(prefix, interleave(), calls)
    assert calls == []
    assert set(actions(executor).values()) == {"SKIP"}
    assert [(result.action, result.seconds) for result in executor.results] == [("SKIP", None)] * 4


def test_a_lost_taker_is_run_after_a_replay_and_the_borrower_is_not_run_again(prefix):
    first = run(prefix, interleave())
    before = contents(first, "train-2")
    remove_tree(join(path_of(first, "train-5"), ".executor_status"))
    calls: list[str] = []
    again = run(prefix, interleave(), calls)
    assert calls == ["train-2", "train-5"]
    assert actions(again) == {"prepare": "SKIP", "train-2": "REPLAY", "infer-128": "SKIP", "train-5": "RUN"}
    assert "train-5 (RUN)" in reason(again, "train-2")
    assert read_text(join(path_of(again, "train-5"), "log.txt")) == "pairs 7"
    assert contents(again, "train-2") == before
    assert list_files(join(prefix, ".replay")) == []


def test_a_replay_knows_that_it_is_one_and_writes_to_scratch(prefix):
    seen: list[tuple[bool, str]] = []

    def publish(config: TrainConfig, run: StepRun) -> Live:
        seen.append((run.replaying, run.output_path))
        assert config.output_path == run.output_path
        write_text(join(config.output_path, "x"), "x")
        return Live(Trainer(), digest="same")

    def steps():
        first = ExecutorStep("publish", publish, TrainConfig("", 1))
        return [ExecutorStep("use", infer, InferConfig(borrow(first)))]

    executor = run(prefix, steps())
    remove_tree(join(path_of(executor, "use"), ".executor_status"))
    run(prefix, steps())
    assert [replaying for replaying, _ in seen] == [False, True]
    assert seen[0][1] == path_of(executor, "publish")
    assert seen[1][1].startswith(join(prefix, ".replay"))


def test_a_chain_of_live_values_is_replayed_from_its_start(prefix):
    def chain():
        steps = interleave()
        steps["infer-after"] = ExecutorStep("infer-after", infer, InferConfig(borrow(steps["train-5"])))
        return steps

    executor = run(prefix, chain())
    remove_tree(join(path_of(executor, "infer-after"), ".executor_status"))
    calls: list[str] = []
    again = run(prefix, chain(), calls)
    assert calls == ["train-2", "train-5", "infer-after"]
    assert [actions(again)[name] for name in ("train-2", "infer-128", "train-5")] == ["REPLAY", "SKIP", "REPLAY"]
    assert read_text(join(path_of(again, "infer-after"), "rows.txt")) == "generated at step 7"


def test_a_replay_with_a_different_digest_is_an_error_showing_both_digests(prefix):
    digests = iter(["digest one", "digest two"])

    def drifting(config: TrainConfig) -> Live:
        return Live(Trainer(), digest=next(digests))

    def steps():
        first = ExecutorStep("drift", drifting, TrainConfig("", 1))
        return [ExecutorStep("use", infer, InferConfig(borrow(first)))]

    executor = run(prefix, steps())
    remove_tree(join(path_of(executor, "use"), ".executor_status"))
    with pytest.raises(ReplayMismatchError, match="digest two, but digest one"):
        run(prefix, steps())
    assert status_of(executor, "drift") == "SUCCESS"
    assert status_of(executor, "use") == "DEP_FAILED"


def test_a_dry_run_shows_the_plan_and_leaves_no_trace(prefix):
    calls: list[str] = []
    executor = run(prefix, interleave(), calls, dry_run=True)
    assert actions(executor) == dict.fromkeys(["prepare", "train-2", "infer-128", "train-5"], "RUN")
    assert calls == []
    assert not exists(prefix)


def test_a_failure_is_recorded_with_any_text(prefix):
    name = os.fsdecode(b"not UTF-8: \xff")

    def fail(config: Any):
        raise FileNotFoundError(name)

    executor = Executor(prefix)
    step = ExecutorStep("step", fail, [this_output_path()])
    with pytest.raises(StepFailedError):
        executor.run([step])
    assert read_json(join(executor.output_paths[step], "error.json"))["failures"][0]["exception"].endswith(name)


def test_the_records_of_a_failed_step_say_what_failed_and_why(prefix):
    def fail(config: Any):
        raise FloatingPointError("the loss is NaN")

    steps = interleave()
    steps["infer-128"] = replace(steps["infer-128"], fn=fail)
    after = ExecutorStep("report", prepare, PrepareConfig(output_path_of(steps["infer-128"])))
    executor = Executor(prefix, session=[])
    with pytest.raises(StepFailedError, match=r"'infer-128' failed on host .*the loss is NaN") as caught:
        executor.run([*steps.values(), after])
    assert isinstance(caught.value.__cause__, FloatingPointError)
    assert status_of(executor, "infer-128") == "FAILED"
    assert status_of(executor, "report") == "DEP_FAILED"
    assert status_of(executor, "train-5") == "SUCCESS"
    failure = read_json(join(path_of(executor, "infer-128"), "error.json"))["failures"][0]
    assert failure["exception"] == "FloatingPointError: the loss is NaN"
    assert "in fail" in failure["traceback"]
    results = {result.step_name: result.action for result in executor.results}
    assert results == {
        "prepare": "RUN",
        "train-2": "RUN",
        "infer-128": "FAILED",
        "train-5": "RUN",
        "report": "DEP_FAILED",
    }


def test_a_repaired_step_runs_again_and_its_error_is_removed(prefix):
    broken = [True]

    def sometimes(config: PrepareConfig):
        if broken:
            raise RuntimeError("broken")
        prepare(config)

    steps = [ExecutorStep("prepare", sometimes, PrepareConfig("x"))]
    executor = Executor(prefix)
    with pytest.raises(StepFailedError):
        executor.run(steps)
    broken.clear()
    executor = run(prefix, steps)
    assert reason(executor, "prepare") == "it failed before"
    assert not exists(join(path_of(executor, "prepare"), "error.json"))
    assert status_of(executor, "prepare") == "SUCCESS"


def test_without_force_run_failed_a_failed_step_and_its_dependents_are_blocked(prefix):
    def fail(config: Any):
        raise RuntimeError("no")

    failing = ExecutorStep("failing", fail, PrepareConfig("x"))
    after = ExecutorStep("after", prepare, PrepareConfig(output_path_of(failing)))
    executor = Executor(prefix)
    with pytest.raises(StepFailedError, match="'failing' failed"):
        executor.run([after])
    with pytest.raises(StepFailedError, match="'failing' is BLOCKED: it failed before"):
        executor.run([after], force_run_failed=False)
    assert actions(executor) == {"failing": "BLOCKED", "after": "BLOCKED"}


def test_a_step_that_exits_python_has_failed(prefix):
    def leave(config: Any):
        sys.exit(3)

    with pytest.raises(StepFailedError, match=r"sys\.exit\(3\)"):
        run(prefix, [ExecutorStep("leave", leave, None)])


def test_a_keyboard_interrupt_marks_the_step_cancelled_and_it_can_run_again(prefix):
    def interrupt(config: Any, run: StepRun):
        raise KeyboardInterrupt

    steps = [ExecutorStep("long", interrupt, PrepareConfig("x"))]
    executor = Executor(prefix)
    with pytest.raises(KeyboardInterrupt):
        executor.run(steps)
    assert status_of(executor, "long") == "CANCELLED"
    executor = run(prefix, [replace(steps[0], fn=prepare)])
    assert reason(executor, "long") == "it was cancelled before"


def test_a_live_value_is_freed_when_its_last_borrower_finishes(prefix):
    trainers: list[Trainer] = []
    freed_when_used: list[bool] = []

    def publish(config: Any) -> Live:
        trainers.append(Trainer())
        return Live(trainers[-1], free=trainers[-1].free)

    def use(config: InferConfig, run: StepRun):
        freed_when_used.append(trainers[0].freed)

    def look(config: Any, run: StepRun):
        freed_when_used.append(trainers[0].freed)

    first = ExecutorStep("publish", publish, None)
    users = [ExecutorStep(f"use-{n}", use, InferConfig(borrow(first))) for n in (1, 2)]
    after = ExecutorStep("look", look, [output_path_of(user) for user in users])
    run(prefix, [after])
    assert freed_when_used == [False, False, True]


def test_an_unused_live_value_is_freed_when_its_step_finishes(prefix):
    trainer = Trainer()
    run(prefix, [ExecutorStep("publish", lambda config: Live(trainer, free=trainer.free), None)])
    assert trainer.freed


def test_a_taken_value_belongs_to_the_taker_and_is_not_freed(prefix):
    kept: list[Trainer] = []

    def keep(config: TrainConfig, run: StepRun):
        assert config.trainer is not None
        kept.append(config.trainer)

    steps = interleave()
    steps["train-5"] = replace(steps["train-5"], fn=keep)
    run(prefix, steps)
    assert [trainer.freed for trainer in kept] == [False]


def test_a_taker_that_fails_loses_the_value_and_its_memory(prefix):
    class Buffers:
        pass

    buffers: list[weakref.ref[Buffers]] = []
    freed: list[str] = []
    alive_afterwards: list[bool] = []

    def publish(config: Any) -> Live:
        value = Buffers()
        buffers.append(weakref.ref(value))
        return Live(value, free=lambda: freed.append("freed"))

    def fail(config: list[Buffers]):
        held_in_a_local = config[0]
        raise RuntimeError(f"out of memory with {type(held_in_a_local).__name__}")

    def look(config: Any, run: StepRun):
        gc.collect()
        alive_afterwards.append(buffers[0]() is not None)

    first = ExecutorStep("publish", publish, None)
    taker = ExecutorStep("taker", fail, [take(first)])
    later = ExecutorStep("later", look, output_path_of(first))
    with pytest.raises(StepFailedError, match="out of memory with Buffers"):
        run(prefix, [taker, later])
    assert freed == ["freed"]
    assert alive_afterwards == [False]


def test_a_step_whose_live_value_is_used_must_return_one(prefix):
    first = ExecutorStep("publish", lambda config: "not a Live", None)
    with pytest.raises(StepFailedError, match=r"returned str, but its live value is used by infer.*Live\(value\)"):
        run(prefix, [ExecutorStep("infer", infer, InferConfig(borrow(first)))])


def test_success_without_a_manifest_is_not_believed(prefix):
    executor = run(prefix, interleave())
    remove_tree(join(path_of(executor, "prepare"), "manifest.json"))
    again = run(prefix, interleave())
    assert reason(again, "prepare") == "SUCCESS is recorded, but its manifest is missing"
    assert actions(again)["train-2"] == "SKIP"
    assert exists(join(path_of(executor, "prepare"), "manifest.json"))


def test_an_unknown_status_is_not_believed(prefix):
    executor = run(prefix, interleave())
    write_text(join(path_of(executor, "prepare"), ".executor_status"), "SUCCESSFUL?")
    again = run(prefix, interleave())
    assert reason(again, "prepare") == "its status file contains 'SUCCESSFUL?', which is not a valid status"


def test_the_reason_of_a_new_version_is_the_value_that_changed(prefix):
    run(prefix, interleave())
    executor = run(prefix, interleave(text="other pairs", first_stop=3), dry_run=True)
    assert 'text: "pairs" -> "other pairs"' in reason(executor, "prepare")
    assert "stop: 2 -> 3" in reason(executor, "train-2")
    assert "data: prepare-" in reason(executor, "train-2")
    assert reason(executor, "infer-128").startswith("changed since infer-128-")
    assert "(borrow)" in reason(executor, "infer-128")


def test_the_manifest_lists_every_output_and_no_record_of_the_executor(prefix):
    def write_many(config: PrepareConfig):
        for name in ("a.txt", "deep/b.bin", ".scratch/c", ".hidden"):
            write_text(join(config.output_path, name), name)

    executor = run(prefix, [ExecutorStep("many", write_many, PrepareConfig("x"))])
    path = path_of(executor, "many")
    assert read_json(join(path, "manifest.json")) == {
        "files": [
            {"path": "a.txt", "bytes": 5, "crc32c": crc32c_of(join(path, "a.txt"))},
            {"path": "deep/b.bin", "bytes": 10, "crc32c": crc32c_of(join(path, "deep/b.bin"))},
        ]
    }


def test_the_info_next_to_the_outputs_says_what_ran(prefix):
    executor = run(prefix, interleave())
    info = read_json(join(path_of(executor, "train-5"), ".executor_info"))
    assert info["name"] == "train-5"
    assert info["fn_name"].endswith(".train")
    assert info["config"]["trainer"] == {"take": "train-2"}
    assert info["config"]["data"] == join(path_of(executor, "prepare"), "data.txt")
    assert info["live_digest"] == "step 7"
    assert info["dependencies"] == [path_of(executor, "prepare"), path_of(executor, "train-2")]
    assert info["version"]["config"]["stop"] == 7


def test_the_record_of_the_experiment_lists_its_steps(prefix):
    executor = Executor(prefix, description="a toy", session=[])
    executor.run(list(interleave().values()))
    record = read_json(str(executor.executor_info_path))
    assert str(executor.executor_info_path).startswith(join(prefix, "experiments/"))
    assert record["description"] == "a toy"
    assert [step["name"] for step in record["steps"]] == [step.name for step in executor.steps]


def test_no_lease_is_left_behind(prefix):
    run(prefix, interleave())
    assert not [entry for entry in list_files(prefix) if entry.relative_path.endswith(".lock")]


def test_run_only_runs_matching_steps_and_their_dependencies(prefix):
    calls: list[str] = []
    executor = run(prefix, interleave(), calls, run_only=["train-5$"])
    assert calls == ["train-2", "train-5"]
    assert list(actions(executor)) == ["prepare", "train-2", "train-5"]


def test_run_only_does_not_run_dependencies_of_finished_steps(prefix):
    executor = run(prefix, interleave())
    remove_tree(path_of(executor, "prepare"))
    executor = run(prefix, interleave(), run_only=["infer"])
    assert actions(executor) == {"infer-128": "SKIP"}


@pytest.mark.parametrize(
    ("pattern", "message"), [("nothing", "matches no step"), ("(", "not a valid regular expression")]
)
def test_an_invalid_or_unmatched_run_only_pattern_is_refused(prefix, pattern, message):
    with pytest.raises(PlanError, match=message):
        run(prefix, interleave(), run_only=[pattern])


def test_steps_with_equal_identity_run_once(prefix):
    calls: list[str] = []
    twice = [*interleave().values(), *interleave().values()]
    executor = run(prefix, twice, calls)
    assert calls == ["train-2", "infer-128", "train-5"]
    assert len(executor.steps) == 4
    assert executor.output_paths[twice[0]] == executor.output_paths[twice[4]]


def test_two_different_steps_with_one_output_path_are_refused(prefix):
    steps = [ExecutorStep(name, prepare, PrepareConfig("x"), override_output_path="same") for name in ("one", "two")]
    with pytest.raises(PlanError, match=r"'one' .*'two' .*same"):
        run(prefix, steps)


def test_an_output_path_inside_another_steps_is_refused(prefix):
    outer = ExecutorStep("outer", prepare, PrepareConfig("x"), override_output_path="models/a")
    inner = ExecutorStep("inner", prepare, PrepareConfig("x"), override_output_path="models/a/b")
    with pytest.raises(PlanError, match="'inner' is inside that of step 'outer'"):
        run(prefix, [outer, inner])


def test_an_overridden_output_path_is_used(prefix):
    step = ExecutorStep("prepare", prepare, PrepareConfig("x")).with_output_path("my/place")
    run(prefix, [step])
    assert read_text(join(prefix, "my/place/data.txt")) == "x"


def test_a_hardcoded_path_is_below_the_prefix_or_absolute(prefix):
    def configs(path: str):
        step = ExecutorStep("prepare", prepare, PrepareConfig(InputName.hardcoded(path)))
        return run(prefix, [step], dry_run=True).configs[step].text

    assert configs("models/x") == join(prefix, "models/x")
    assert configs("gs://bucket/x") == "gs://bucket/x"


def test_a_nonblocking_input_is_neither_run_nor_waited_for(prefix):
    calls: list[str] = []
    steps = interleave()
    watcher = ExecutorStep("watch", prepare, PrepareConfig(steps["train-2"].nonblocking()))
    executor = run(prefix, [watcher], calls)
    assert calls == []
    assert list(actions(executor)) == ["watch"]
    assert read_text(join(path_of(executor, "watch"), "data.txt")) == path_of(executor, "train-2")


def test_the_attributes_of_marins_executor_are_available(prefix):
    steps = interleave()
    executor = run(prefix, steps, dry_run=True)
    last = steps["train-5"]
    assert executor.configs[last].stop == 7
    assert executor.dependencies[last] == [steps["prepare"], steps["train-2"]]
    assert executor.versions[last]["name"] == "train-5"
    assert json.loads(executor.version_strs[last]) == executor.versions[last]
    assert executor.output_paths[last].startswith(join(prefix, "train-5-"))


def test_independent_steps_run_at_the_same_time_in_other_threads(prefix):
    meeting = threading.Barrier(3, timeout=20)

    def meet(config: Any):
        assert threading.current_thread() is not threading.main_thread()
        meeting.wait()

    run(prefix, [ExecutorStep(f"meet-{n}", meet, None) for n in range(3)])


def test_steps_with_live_values_or_the_session_run_in_the_callers_thread(prefix):
    threads: dict[str, bool] = {}

    def publish(config: Any):
        threads["publish"] = threading.current_thread() is threading.main_thread()
        return Live(1)

    def use(config: Any):
        threads["use"] = threading.current_thread() is threading.main_thread()

    def plain(config: Any):
        threads["plain"] = threading.current_thread() is threading.main_thread()

    def with_session(config: Any, run: StepRun):
        threads["with_session"] = threading.current_thread() is threading.main_thread()

    first = ExecutorStep("publish", publish, None)
    steps = [ExecutorStep("use", use, [take(first)]), ExecutorStep("plain", plain, None)]
    run(prefix, [*steps, ExecutorStep("with-session", with_session, None)])
    assert threads == {"publish": True, "use": True, "plain": False, "with_session": True}


def test_with_max_concurrent_one_every_step_runs_in_the_callers_thread(prefix):
    threads: set[threading.Thread] = set()

    def note(config: Any):
        threads.add(threading.current_thread())

    run(prefix, [ExecutorStep(f"note-{n}", note, None) for n in range(5)], max_concurrent=1)
    assert threads == {threading.main_thread()}


def test_max_concurrent_limits_the_steps_of_the_pool(prefix):
    lock = threading.Lock()
    running, most = [0], [0]
    pair = threading.Barrier(2, timeout=20)

    def count(config: Any):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        pair.wait()
        with lock:
            running[0] -= 1
        pair.wait()

    run(prefix, [ExecutorStep(f"count-{n}", count, None) for n in range(6)], max_concurrent=2)
    assert most[0] == 2


@pytest.mark.parametrize("count", [0, -1])
def test_max_concurrent_below_one_is_refused(prefix, count):
    with pytest.raises(ConfigError, match="at least 1"):
        run(prefix, interleave(), max_concurrent=count)


def test_a_step_without_a_function_is_blocked_and_nothing_is_written_to_its_output_path(prefix):
    made_elsewhere = ExecutorStep("made-elsewhere", None, None, override_output_path="mine")
    write_text(join(prefix, "mine/data.txt"), "x")
    with pytest.raises(StepFailedError, match="has no function"):
        run(prefix, [made_elsewhere])
    assert [entry.relative_path for entry in list_files(join(prefix, "mine"))] == ["data.txt"]


def test_a_chain_of_five_thousand_steps_is_planned(tmp_path):
    step = ExecutorStep("link", prepare, PrepareConfig("x"))
    for number in range(5000):
        step = ExecutorStep("link", prepare, PrepareConfig(step / str(number)))
    executor = run(str(tmp_path / "runs"), [step], dry_run=True)
    assert len(executor.plan) == 5001


def test_storage_is_asked_once_per_step_when_planning(prefix, monkeypatch):
    from simpo_pipeline.executor.planning import plan

    asked: list[str] = []
    original = plan.read_record

    def counting(path, watch):
        asked.append(path)
        return original(path, watch)

    run(prefix, interleave())
    monkeypatch.setattr(plan, "read_record", counting)
    executor = run(prefix, interleave(), dry_run=True)
    assert sorted(asked) == sorted(executor.output_paths.values())


def test_a_step_receives_the_plan(prefix):
    plans: list[list[tuple[str, str]]] = []

    def look(config: Any, run: StepRun):
        plans.append([(row.step_name, row.action) for row in run.plan])

    first = ExecutorStep("prepare", prepare, PrepareConfig("x"))
    run(prefix, [ExecutorStep("look", look, output_path_of(first))])
    assert plans == [[("prepare", "RUN"), ("look", "RUN")]]


def test_the_scratch_folder_of_a_running_replay_has_a_lease(prefix):
    seen: list[bool] = []

    def publish(config: Any, run: StepRun) -> Live:
        scratch = run.output_path.rsplit("/", 1)[0]
        seen.append(exists(join(scratch, ".executor_status.lock")))
        return Live(1, digest="1")

    first = ExecutorStep("first", publish, None)
    run(prefix, [first])
    run(prefix, [ExecutorStep("second", lambda config: None, [take(first)])])
    assert seen == [False, True]
    assert list_files(join(prefix, ".replay")) == []


class Plain(MemoryFileSystem):
    """File system without conditional writes."""

    protocol = "plain"


def test_a_prefix_without_conditional_writes_is_used_only_with_unsafe_locks():
    fsspec.register_implementation("plain", Plain, clobber=True)
    failing = [True]

    def work(config: list[str]):
        if failing:
            raise ValueError("once")
        write_text(join(config[0], "x"), "x")

    step = ExecutorStep("step", work, [this_output_path()])
    with pytest.raises(StorageError, match="--unsafe_locks"):
        Executor("plain://bucket").run([step])
    for expected in ("FAILED", "RUN", "SKIP"):
        executor = Executor("plain://bucket", unsafe_locks=True)
        try:
            executor.run([step])
        except StepFailedError:
            failing.clear()
        assert [result.action for result in executor.results] == [expected]


RECEIVED: list[Any] = []
FUNCTIONS: list[tuple[Callable[..., Any], Any]] = [
    (lambda config, output: RECEIVED.append(type(output)), OutputFolder),
    (lambda config, *, run: RECEIVED.append(type(run)), StepRun),
    (lambda config, run=None, output=None: RECEIVED.append((type(run), type(output))), (StepRun, OutputFolder)),
    (functools.partial(lambda config, run: RECEIVED.append(run), run="ablation-3"), "ablation-3"),
    (lambda config, **run: RECEIVED.append(run), {}),
    (lambda config, *output: RECEIVED.append(output), ()),
]


@pytest.mark.parametrize(("fn", "received"), FUNCTIONS)
def test_a_function_gets_what_its_parameters_name(prefix, fn: Callable[..., Any], received: Any):
    RECEIVED.clear()
    run(prefix, [ExecutorStep("step", fn, None)])
    assert RECEIVED == [received]


async def coroutine(config: Any) -> None: ...


def generator(config: Any):
    yield config


@pytest.mark.parametrize("fn", [coroutine, generator])
def test_a_function_whose_call_would_run_nothing_is_refused(fn):
    with pytest.raises(PlanError, match="is a coroutine or a generator"):
        ExecutorStep("step", fn, None)
