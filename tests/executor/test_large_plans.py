"""Plans of thousands of steps have no depth limit and read storage at most once for each step."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.planning import plan
from simpo_pipeline.executor.step import ExecutorStep, this_output_path, versioned


def do_nothing(config: Any) -> None:
    """Do nothing. This is never called."""


def step(name: str, *uses: Any) -> ExecutorStep:
    return ExecutorStep(name, do_nothing, {"value": versioned(name), "out": this_output_path(), "uses": uses})


def chain(count: int) -> ExecutorStep:
    last = step("step-0")
    for number in range(1, count):
        last = step(f"step-{number}", last / "data")
    return last


def fan_out(count: int) -> ExecutorStep:
    root = step("root")
    return step("join", *(step(f"step-{number}", root) for number in range(count - 2)))


def diamonds(count: int) -> ExecutorStep:
    joint = step("joint-0")
    for number in range(1, (count + 2) // 3):
        joint = step(f"joint-{number}", step(f"left-{number}", joint), step(f"right-{number}", joint))
    return joint


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return a counter of reads by path."""
    counts: Counter[str] = Counter()

    def counted(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asking(path: str, *more: Any) -> Any:
            counts[path] += 1
            return ask(path, *more)

        return asking

    monkeypatch.setattr(plan, "read_record", counted(plan.read_record))
    monkeypatch.setattr(plan, "list_names", counted(plan.list_names))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("make", [chain, fan_out, diamonds])
def test_ten_thousand_steps_that_never_ran_are_planned_with_one_listing(tmp_path, asked, make):
    executor = Executor(str(tmp_path))
    executor.run([make(10_000)], dry_run=True)
    assert len(executor.plan) in range(9_998, 10_001)
    assert {row.action for row in executor.plan} == {"RUN"}
    assert asked == {str(tmp_path): 1}


def test_each_of_a_thousand_finished_steps_is_read_once(tmp_path, asked):
    last = chain(1_000)
    planned = Executor(str(tmp_path))
    planned.run([last], dry_run=True)
    for path in set(planned.output_paths.values()):
        folder = Path(path)
        folder.mkdir()
        (folder / "manifest.json").write_text('{"files": []}')
        (folder / ".executor_status").write_text("SUCCESS")
    asked.clear()
    executor = Executor(str(tmp_path))
    executor.run([last])
    assert {result.action for result in executor.results} == {"SKIP"}
    assert len(executor.results) == 1_000
    assert set(asked.values()) == {1}
    assert len(asked) == 1_001
