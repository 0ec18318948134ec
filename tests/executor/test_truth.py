"""A run does what the dry run said, for random DAGs, random flags and random histories."""

import dataclasses
import logging
import random
import threading
import time
from typing import Any

import pytest

from simpo_pipeline.errors import StepFailedError
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.records.holder import Holder
from simpo_pipeline.executor.records.lease import LeaseConfig
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, take, this_output_path, versioned
from simpo_pipeline.executor.table import plan_table
from simpo_pipeline.storage.files import exists, list_files, remove_tree, write_bytes, write_text
from simpo_pipeline.storage.paths import join

LEASE = LeaseConfig(heartbeat_seconds=5.0, expiry_seconds=60.0, poll_seconds=0.005)
OTHER = Holder("other-run", "another-host", 12, "2026-01-01T00:00:00+00:00")


class Calls(list[tuple[str, bool]]):
    """Calls of step functions as (name, is a replay). The step named `failing` fails."""

    failing: str | None = None


def work(config: list[Any], run: StepRun) -> Live:
    run.session.append((run.name, run.replaying))
    if run.session.failing == run.name:
        raise RuntimeError("chosen to fail")
    write_text(join(config[0], "out.txt"), run.name)
    return Live(run.name, digest=run.name)


def random_steps(choose: random.Random) -> list[ExecutorStep]:
    """Return random steps. A live value has at most one taker, and no borrower is made after it is taken."""
    steps: list[ExecutorStep] = []
    free: set[ExecutorStep] = set()
    for number in range(choose.randrange(2, 12)):
        uses: list[Any] = []
        for before in choose.sample(steps, k=min(len(steps), choose.randrange(3))):
            kinds = ["path", "sub-path", "pseudo", "borrow", "take"] if before in free else ["path", "pseudo"]
            kind = choose.choice(kinds)
            if kind == "take":
                free.discard(before)
            use = {"path": before, "sub-path": before / "out.txt", "pseudo": output_path_of(before).nonblocking()}
            uses.append({**use, "borrow": borrow(before), "take": take(before)}[kind])
        elsewhere = f"elsewhere/{number}" if choose.random() < 0.1 else None
        config = [this_output_path(), versioned(number), *uses]
        steps.append(ExecutorStep(f"s{number}", work, config, override_output_path=elsewhere))
        free.add(steps[-1])
        if choose.random() < 0.1:  # the same step twice, as a helper function may make it
            steps.append(dataclasses.replace(steps[-1]))
    return steps


def random_flags(choose: random.Random, steps: list[ExecutorStep]) -> dict[str, Any]:
    name = choose.choice(steps).name
    flags: list[dict[str, Any]] = [
        {},
        {"run_only": [f"{name}$"]},
        {"until": [name]},
        {"force": [name]},
        {"force": [name], "run_only": ["s[0-3]$" if steps[0].name == "s0" else "."]},
        {"force_run_failed": False},
        {"max_concurrent": 1},
    ]
    return choose.choice(flags)


def damage(prefix: str, choose: random.Random) -> None:
    """Remove some status files, manifests and outputs."""
    for entry in list_files(prefix):
        if entry.relative_path.endswith((".executor_status", "manifest.json", "out.txt")) and choose.random() < 0.2:
            remove_tree(join(prefix, entry.relative_path))


def rows_to_call(planned: Executor) -> list[tuple[str, bool]]:
    return [(row.step_name, row.action == "REPLAY") for row in planned.plan if row.action in ("RUN", "REPLAY")]


def logged_plan(caplog: pytest.LogCaptureFixture) -> str:
    """Return the first plan that the run logged."""
    return next(record.getMessage() for record in caplog.records if record.getMessage().startswith("the plan:"))


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 30))])
def test_a_run_does_what_the_dry_run_said(seed, caplog):
    caplog.set_level(logging.INFO, "simpo_pipeline")
    choose = random.Random(seed)
    steps = random_steps(choose)
    prefix = f"memory://truth-{seed}"
    for _ in range(4):
        caplog.clear()
        calls, flags = Calls(), random_flags(choose, steps)
        calls.failing = choose.choice([None, choose.choice(steps).name])
        planned = Executor(prefix)
        planned.run(steps, dry_run=True, **flags)
        job = Executor(prefix, session=calls)
        blocked = any(row.action == "BLOCKED" for row in planned.plan)
        try:
            job.run(steps, **flags)
            assert not blocked
        except StepFailedError:
            assert blocked or calls.failing in [name for name, _ in calls]
        bad = {result.step_name for result in job.results if result.action == "DEP_FAILED"}
        assert logged_plan(caplog) == f"the plan:\n{plan_table(planned.plan)}"
        assert calls == [call for call in rows_to_call(planned) if call[0] not in bad]
        assert bool(bad) <= (calls.failing is not None)
        damage(prefix, choose)
    Executor(prefix, session=Calls()).run(steps)
    last = Executor(prefix, session=Calls())
    last.run(steps)
    assert {result.action for result in last.results} == {"SKIP"}
    remove_tree(prefix)


@pytest.mark.parametrize("seed", range(10))
def test_a_run_waits_for_steps_held_by_another_job_as_the_dry_run_said(seed, caplog):
    caplog.set_level(logging.INFO, "simpo_pipeline")
    choose = random.Random(1000 + seed)
    steps = random_steps(choose)
    prefix = f"memory://truth-wait-{seed}"
    planned = Executor(prefix, lease=LEASE)
    planned.run(steps, dry_run=True)
    held = choose.choice(planned.plan)
    lock = join(held.output_path, ".executor_status.lock")
    write_bytes(lock, OTHER.encode())
    planned.run(steps, dry_run=True)
    assert [row.action for row in planned.plan if row.output_path == held.output_path] == ["WAIT"]
    calls = Calls()
    job = Executor(prefix, session=calls, lease=LEASE)
    thread = threading.Thread(target=job.run, args=(steps,))
    thread.start()
    behind = {name for name, _ in calls_behind(planned, held.step_name)}
    free = [call for call in rows_to_call(planned) if call[0] not in behind]
    while not (set(free) <= set(calls) and exists(join(prefix, "experiments"))):
        time.sleep(0.001)
    assert held.step_name not in [name for name, _ in calls]
    remove_tree(lock)
    thread.join()
    assert logged_plan(caplog) == f"the plan:\n{plan_table(planned.plan)}"
    assert {name for name, _ in calls} == {row.step_name for row in planned.plan}
    assert {result.action for result in job.results} == {"RUN"}
    remove_tree(prefix)


def calls_behind(planned: Executor, waited_for: str) -> list[tuple[str, bool]]:
    """Return the calls that must wait for the held step.

    They are the step itself, its dependents, and the takers of the live values that these borrow.
    """
    behind = {waited_for}
    order = planned._order
    assert order is not None
    for step in order.steps:
        before = [*planned.dependencies[step], *order.implied.get(step, ())]
        if behind & {one.name for one in before}:
            behind.add(step.name)
    return [call for call in rows_to_call(planned) if call[0] in behind]
