"""The plan is true: what a dry run says is what a run does, over random DAGs and random histories."""

import random
from typing import Any

import pytest

from simpo_pipeline.errors import StepFailedError
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.live import Live
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.executor.step import ExecutorStep, borrow, take, this_output_path, versioned
from simpo_pipeline.storage.files import list_files, remove_tree, write_text
from simpo_pipeline.storage.paths import join


class Calls(list[tuple[str, bool]]):
    """What was called, and whether as a replay; a chosen step fails."""

    failing: str | None = None


def work(config: list[Any], run: StepRun) -> Live:
    run.session.append((run.name, run.replaying))
    if run.session.failing == run.name:
        raise RuntimeError("chosen to fail")
    write_text(join(config[0], "out.txt"), run.name)
    return Live(run.name, digest=run.name)


def random_steps(choose: random.Random) -> list[ExecutorStep]:
    """Each live value has one taker at most, and no borrower is made after it is taken."""
    steps: list[ExecutorStep] = []
    free: set[ExecutorStep] = set()
    for number in range(choose.randrange(2, 12)):
        uses: list[Any] = []
        for before in choose.sample(steps, k=min(len(steps), choose.randrange(3))):
            kind = choose.choice(["path", "path", "borrow", "take"]) if before in free else "path"
            if kind == "take":
                free.discard(before)
            uses.append({"path": before, "borrow": borrow(before), "take": take(before)}[kind])
        steps.append(ExecutorStep(f"s{number}", work, [this_output_path(), versioned(number), *uses]))
        free.add(steps[-1])
    return steps


def damage(prefix: str, choose: random.Random) -> None:
    """Lose some status files and manifests."""
    for entry in list_files(prefix):
        if entry.relative_path.endswith((".executor_status", "manifest.json")) and choose.random() < 0.3:
            remove_tree(join(prefix, entry.relative_path))


@pytest.mark.parametrize("seed", range(25))
def test_a_run_does_what_the_dry_run_said(seed):
    choose = random.Random(seed)
    steps = random_steps(choose)
    prefix = f"memory://truth-{seed}"
    for _ in range(4):
        calls = Calls()
        calls.failing = choose.choice([None, choose.choice(steps).name])
        planned = Executor(prefix)
        planned.run(steps, dry_run=True)
        job = Executor(prefix, session=calls)
        try:
            job.run(steps)
        except StepFailedError:
            assert calls.failing in [name for name, _ in calls]
        expected = [(row.step_name, row.action == "REPLAY") for row in planned.plan if row.action in ("RUN", "REPLAY")]
        bad = {result.step_name for result in job.results if result.action == "DEP_FAILED"}
        assert calls == [call for call in expected if call[0] not in bad]
        assert bool(bad) <= (calls.failing is not None)
        damage(prefix, choose)
    Executor(prefix, session=Calls()).run(steps)
    last = Executor(prefix, session=Calls())
    last.run(steps)
    assert {result.action for result in last.results} == {"SKIP"}
    remove_tree(prefix)
