"""Checkpoints are not outputs. They are kept while a step may resume from them, and removed afterwards."""

import time

import pytest

from simpo_pipeline.errors import StepFailedError
from simpo_pipeline.executor.commands.litter import find_litter, remove_litter
from simpo_pipeline.executor.commands.survey import read_survey
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.records.status import CHECKPOINTS_FOLDER, read_manifest
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.executor.step import ExecutorStep, take, this_output_path
from simpo_pipeline.storage.files import list_files, write_text
from simpo_pipeline.storage.paths import base_name, join

HOUR = 3600.0


class Fault:
    """Switch that makes a step fail."""

    on = True


def resumable(fault: Fault, calls: list[StepRun]):
    """Return a step function that writes a checkpoint, and then succeeds or fails."""

    def function(config: tuple, run: StepRun) -> Live:
        calls.append(run)
        if not run.replaying:
            write_text(join(run.recorded_path, CHECKPOINTS_FOLDER, "00000001-a", "state"), "123")
            write_text(join(run.recorded_path, CHECKPOINTS_FOLDER, "00000001-a.json"), "{}")
        if fault.on:
            raise ValueError("no such row")
        write_text(join(run.output_path, "rows"), "1")
        return Live("value", digest="same")

    return function


def execute(prefix: str, steps: list[ExecutorStep]) -> Executor:
    executor = Executor(prefix)
    try:
        executor.run(steps)
    except StepFailedError:
        pass
    return executor


def checkpoints(path: str) -> list[str]:
    return [entry.relative_path for entry in list_files(join(path, CHECKPOINTS_FOLDER))]


def test_checkpoints_are_kept_when_the_step_fails_and_removed_when_it_succeeds(prefix):
    fault, calls = Fault(), []
    step = ExecutorStep("alone", resumable(fault, calls), (this_output_path(),))
    path = execute(prefix, [step]).output_paths[step]
    assert len(checkpoints(path)) == 2
    fault.on = False
    execute(prefix, [step])
    assert checkpoints(path) == []
    assert [entry.relative_path for entry in read_manifest(path)] == ["rows"]
    assert [(run.recorded_path, run.is_used_live) for run in calls] == [(path, False)] * 2
    assert calls[0].version.startswith(path.rsplit("-", 1)[1])


def test_checkpoints_are_kept_until_the_taker_of_the_live_value_succeeds(prefix):
    fine, fault, calls = Fault(), Fault(), []
    fine.on = False
    first = ExecutorStep("first", resumable(fine, calls), (this_output_path(),))
    second = ExecutorStep("second", resumable(fault, []), (this_output_path(), take(first)))
    executor = execute(prefix, [first, second])
    paths = [executor.output_paths[step] for step in (first, second)]
    assert [len(checkpoints(path)) for path in paths] == [2, 2]
    fault.on = False
    execute(prefix, [first, second])
    # A replay receives the path of the recorded outputs, but writes to another path.
    assert [(run.replaying, run.recorded_path) for run in calls] == [(False, paths[0]), (True, paths[0])]
    assert calls[1].output_path != paths[0] and calls[1].is_used_live
    assert [checkpoints(path) for path in paths] == [[], []]


def test_checkpoints_left_by_a_job_killed_after_success_are_removed_by_the_next_run(prefix):
    fault = Fault()
    fault.on = False
    step = ExecutorStep("alone", resumable(fault, []), (this_output_path(),))
    path = execute(prefix, [step]).output_paths[step]
    write_text(join(path, CHECKPOINTS_FOLDER, "00000001-a.json"), "{}")
    execute(prefix, [step])
    assert checkpoints(path) == []


@pytest.mark.parametrize("failed", [False, True])
def test_gc_finds_checkpoints_unchanged_for_an_hour(prefix, failed):
    fault = Fault()
    fault.on = failed
    step = ExecutorStep("alone", resumable(fault, []), (this_output_path(),))
    path = execute(prefix, [step]).output_paths[step]
    write_text(join(path, CHECKPOINTS_FOLDER, "00000001-a.json"), "{}")
    survey = read_survey(prefix)
    assert find_litter(survey, time.time() + 0.9 * HOUR) == []
    found = find_litter(survey, time.time() + 1.1 * HOUR)
    assert [(item.kind.value, item.path) for item in found] == [
        ("checkpoint", f"{base_name(path)}/{CHECKPOINTS_FOLDER}")
    ]
    (removal,) = remove_litter(prefix, found)
    assert len(removal.removed) == (2 if failed else 1)
    assert checkpoints(path) == []
