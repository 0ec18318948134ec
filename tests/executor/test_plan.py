import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_pipeline.executor.planning.graph import build_graph
from simpo_pipeline.executor.planning.order import live_order
from simpo_pipeline.executor.planning.plan import Situation, make_plan
from simpo_pipeline.executor.records.lease import Holder
from simpo_pipeline.executor.records.status import LeaseSight, Status, StepRecord
from simpo_pipeline.executor.run import Action
from simpo_pipeline.executor.step import ExecutorStep, borrow, output_path_of, take

DONE = StepRecord(Status.SUCCESS, manifest_problem=None)
NEW = StepRecord()
HOLDER = Holder("run1", "host1", 77, "2026-01-01T00:00:00+00:00")
HELD = StepRecord(Status.RUNNING, lease=LeaseSight(HOLDER, fresh=True))
LEFT = StepRecord(Status.RUNNING, lease=LeaseSight(HOLDER, fresh=False))
FAILED = StepRecord(Status.FAILED)


def do_nothing(config: Any) -> None:
    """Do nothing. This is never called."""


def interleave() -> dict[str, ExecutorStep]:
    """train-2 ==> infer (borrows) ==> train-5 (takes) -> report"""
    first = ExecutorStep("train-2", do_nothing, [])
    middle = ExecutorStep("infer", do_nothing, [borrow(first)])
    last = ExecutorStep("train-5", do_nothing, [take(first)])
    report = ExecutorStep("report", do_nothing, [output_path_of(middle), output_path_of(last)])
    return {step.name: step for step in (first, middle, last, report)}


def plan(
    records: dict[str, StepRecord], *, held: tuple[str, ...] = (), ended: tuple[str, ...] = (), selected=None, **options
):
    steps = interleave()
    graph = build_graph(list(steps.values()), "/p")
    situation = Situation(
        records={step: records.get(name, NEW) for name, step in steps.items()},
        selected=frozenset(steps[name] for name in selected or steps),
        held=frozenset(steps[name] for name in held),
        ended={steps[name]: "it failed in this job" for name in ended},
        **options,
    )
    return {step.name: decision for step, decision in make_plan(graph, live_order(graph), situation).items()}


def actions(*arguments, **options) -> str:
    decided = plan(*arguments, **options)
    return " ".join(str(decided[name].action) if name in decided else "-" for name in interleave())


def test_a_chain_of_live_values_is_replayed_from_its_beginning():
    """train-2 ==> train-5 (takes) ==> infer-after (borrows). Only infer-after is not done."""
    first = ExecutorStep("train-2", do_nothing, [])
    second = ExecutorStep("train-5", do_nothing, [take(first)])
    after = ExecutorStep("infer-after", do_nothing, [borrow(second)])
    graph = build_graph([first, second, after], "/p")
    situation = Situation(
        records={first: DONE, second: DONE, after: NEW}, selected=frozenset([first, second, after]), held=frozenset()
    )
    decided = make_plan(graph, live_order(graph), situation)
    assert [decided[step].action for step in (first, second, after)] == [Action.REPLAY, Action.REPLAY, Action.RUN]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ({}, "RUN RUN RUN RUN"),
        ({"train-2": DONE, "infer": DONE, "train-5": DONE, "report": DONE}, "SKIP SKIP SKIP SKIP"),
        ({"train-2": DONE, "infer": DONE, "report": DONE}, "REPLAY SKIP RUN SKIP"),
        ({"train-2": DONE, "train-5": DONE}, "REPLAY RUN SKIP RUN"),
        ({"train-2": DONE}, "REPLAY RUN RUN RUN"),
        ({"infer": DONE, "train-5": DONE}, "RUN SKIP SKIP RUN"),
        ({"train-2": DONE, "infer": DONE, "train-5": LEFT}, "REPLAY SKIP RUN RUN"),
        ({"train-2": DONE, "infer": DONE, "train-5": FAILED}, "REPLAY SKIP RUN RUN"),
        ({"train-2": DONE, "infer": HELD, "train-5": DONE}, "SKIP WAIT SKIP RUN"),
        ({"train-2": HELD}, "WAIT RUN RUN RUN"),
    ],
)
def test_the_action_of_each_step_follows_from_what_is_recorded(records, expected):
    assert actions(records) == expected


def test_a_value_this_process_holds_needs_no_replay():
    decided = plan({"train-2": DONE, "infer": DONE}, held=("train-2",))
    assert decided["train-2"].action is Action.SKIP
    assert "held for train-5" in decided["train-2"].reason


def test_dependents_of_a_blocked_step_are_blocked_and_other_steps_are_not():
    assert actions({"infer": FAILED}, force_run_failed=False) == "RUN BLOCKED RUN BLOCKED"
    assert actions({"train-2": FAILED}, force_run_failed=False) == "BLOCKED BLOCKED BLOCKED BLOCKED"
    assert actions({"train-2": FAILED, "infer": DONE}, force_run_failed=False) == "BLOCKED SKIP BLOCKED BLOCKED"


def test_a_step_that_failed_in_this_job_is_not_tried_again():
    decided = plan({"train-2": DONE, "infer": DONE, "train-5": FAILED}, ended=("train-5",))
    assert decided["train-5"].action is Action.BLOCKED
    assert decided["train-2"].action is Action.SKIP


def test_a_replay_that_failed_in_this_job_blocks_the_steps_that_need_its_value():
    assert actions({"train-2": DONE, "infer": DONE}, ended=("train-2",)) == "BLOCKED SKIP BLOCKED BLOCKED"


def test_only_wanted_steps_and_their_missing_inputs_are_in_the_plan():
    assert actions({}, selected=("infer",)) == "RUN RUN - -"
    assert actions({"train-2": DONE}, selected=("infer",)) == "REPLAY RUN - -"
    assert actions({"infer": DONE}, selected=("infer",)) == "- SKIP - -"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (NEW, "never ran"),
        (StepRecord(what_changed="changed since x: a: 1 -> 2"), "changed since x: a: 1 -> 2"),
        (LEFT, "left RUNNING by pid 77 on host host1"),
        (StepRecord(Status.RUNNING), "left RUNNING by a job that no longer holds a lease"),
        (FAILED, "it failed before"),
        (StepRecord(Status.DEP_FAILED), "a step it needs failed before"),
        (StepRecord(Status.CANCELLED), "cancelled before"),
        (StepRecord(Status.SUCCESS), "its manifest is missing"),
        (StepRecord(manifest_problem=None), "no status is recorded"),
        (StepRecord(unreadable_status="???"), "'???', which is not a valid status"),
        (HELD, "held by pid 77 on host host1 (run run1"),
    ],
)
def test_every_reason_says_what_was_found(record, words):
    assert words in plan({"train-2": record})["train-2"].reason


def test_many_users_of_one_value_are_not_all_named():
    made = ExecutorStep("made", do_nothing, [])
    users = [ExecutorStep(f"user-{number}", do_nothing, [borrow(made)]) for number in range(9)]
    graph = build_graph(users, "/p")
    records = {step: DONE if step is made else NEW for step in graph.steps}
    decisions = make_plan(graph, live_order(graph), Situation(records, frozenset(users)))
    assert decisions[made].reason.endswith("user-2 (RUN) and 6 more")


records = st.sampled_from([DONE, NEW, LEFT, FAILED, HELD, StepRecord(Status.SUCCESS)])


@given(st.integers(0, 2**32), st.lists(records, min_size=1, max_size=14), st.booleans())
def test_every_plan_provides_every_live_value_and_runs_no_finished_step(seed, found, force_run_failed):
    choose = random.Random(seed)
    steps: list[ExecutorStep] = []
    free = set[ExecutorStep]()
    for number in range(len(found)):
        uses: list[Any] = []
        for before in choose.sample(steps, k=min(len(steps), choose.randrange(3))):
            if before in free and choose.random() < 0.4:
                free.discard(before)
                uses.append(take(before))
            else:
                uses.append(choose.choice([before, output_path_of(before, "x")]))
        steps.append(ExecutorStep(f"s{number}", do_nothing, uses))
        free.add(steps[-1])
    graph = build_graph(steps, "/p")
    order = live_order(graph)
    recorded = dict(zip(steps, found, strict=True))
    plan = make_plan(graph, order, Situation(recorded, frozenset(steps), force_run_failed=force_run_failed))
    calls = (Action.RUN, Action.REPLAY)
    for step, decision in plan.items():
        needs = [plan[edge.step].action for edge in graph.needs(step)]
        live = [plan[edge.step].action for edge in graph.live_inputs(step)]
        demand = [user for user in order.consumers.get(step, ()) if plan[user].action in calls]
        if decision.action in calls:
            assert Action.BLOCKED not in needs
            assert all(action in (*calls, Action.WAIT) for action in live)
        assert (decision.action in (Action.SKIP, Action.REPLAY)) <= recorded[step].done
        assert (decision.action is Action.REPLAY) <= bool(demand)
        assert (decision.action is Action.BLOCKED) <= (not force_run_failed)
