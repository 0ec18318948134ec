"""What to do with each step, and why: a function of the graph and of what storage says. It reads and writes nothing.

done        = SUCCESS is recorded and a manifest lists the outputs
demanded(p) = a step that will RUN or REPLAY uses the live value of p
SKIP        done, not forced, and not (demanded and not held by this process)
REPLAY      done, demanded and not held; then its own live inputs are demanded too
WAIT        not done, and another job holds a fresh lease
BLOCKED     failed in this job, failed before (when that counts), has no function, or needs what is BLOCKED
RUN         otherwise
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from simpo_pipeline.executor.graph import Graph, Step
from simpo_pipeline.executor.order import Order
from simpo_pipeline.executor.run import Action
from simpo_pipeline.executor.status import Status, StepRecord


@dataclass(frozen=True)
class Decision:
    """An action and its reason."""

    action: Action
    reason: str


@dataclass(frozen=True)
class Situation:
    """What a plan depends on besides the graph."""

    records: Mapping[Step, StepRecord]
    wanted: frozenset[Step]
    """The steps asked for; others are in the plan only if a wanted one that is not done needs them."""
    held: Collection[Step] = field(default_factory=frozenset[Step])
    """The producers whose live values this process holds."""
    ended: Mapping[Step, str] = field(default_factory=dict[Step, str])
    """The steps that failed in this job, with a word on how."""
    force_run_failed: bool = True
    forced: frozenset[Step] = frozenset()
    """Steps to run also if they are done."""


def make_plan(graph: Graph, order: Order, situation: Situation) -> dict[Step, Decision]:
    """The decision for each step that matters, in the order they run."""
    decisions: dict[Step, Decision] = {}
    for step in order.steps:
        decisions[step] = _first_decision(step, graph, situation, decisions)
    needed = _decide_backwards(graph, order, situation, decisions)
    while _block_forwards(graph, order, decisions):
        needed = _decide_backwards(graph, order, situation, decisions)
    return {step: decisions[step] for step in order.steps if step in needed}


def _first_decision(step: Step, graph: Graph, situation: Situation, decisions: Mapping[Step, Decision]) -> Decision:
    """The decision without regard to who uses the step."""
    record = situation.records[step]
    if record.done and step not in situation.forced:
        return Decision(Action.SKIP, _skip_reason(step, graph, situation))
    if step in situation.ended:
        return Decision(Action.BLOCKED, situation.ended[step])
    if step.fn is None:
        return Decision(Action.BLOCKED, "it has no function, and no SUCCESS is recorded: its outputs were expected")
    if record.lease is not None and record.lease.fresh:
        return Decision(Action.WAIT, f"held by {record.lease.describe()}")
    blocked = _blocked_need(step, graph, decisions)
    if blocked is not None:
        return blocked
    if record.status is Status.FAILED and not situation.force_run_failed:
        return Decision(Action.BLOCKED, "it failed before, and --force_run_failed is false")
    return Decision(Action.RUN, "forced; SUCCESS is recorded" if record.done else _run_reason(record))


def _skip_reason(step: Step, graph: Graph, situation: Situation) -> str:
    """A forced step keeps its version, so those that used it stay done; that must not go unsaid."""
    forced = [edge.step.name for edge in graph.needs(step) if edge.step in situation.forced]
    if not forced:
        return "SUCCESS is recorded"
    names = _named(list(dict.fromkeys(forced)))
    return f"SUCCESS is recorded, of what {names} gave before; to run it again too, force it"


def _run_reason(record: StepRecord) -> str:
    if record.status is Status.SUCCESS:
        return f"SUCCESS is recorded, but its manifest {record.manifest}"
    if record.status is Status.RUNNING:
        left_by = f"{record.lease.describe()}, which is gone" if record.lease else "a job that holds no lease any more"
        return f"left RUNNING by {left_by}"
    if record.unreadable_status is not None:
        return f"its status file holds {record.unreadable_status!r}, which is no status"
    if record.status is not None:
        words = {
            Status.FAILED: "it failed before",
            Status.DEP_FAILED: "a step it needs failed before",
            Status.CANCELLED: "it was cancelled before",
        }
        return words[record.status]
    if record.manifest is None:
        return "a manifest is there, but no status is recorded"
    return record.what_changed or "never ran"


def _blocked_need(step: Step, graph: Graph, decisions: Mapping[Step, Decision]) -> Decision | None:
    for edge in graph.needs(step):
        if decisions[edge.step].action is Action.BLOCKED:
            return Decision(Action.BLOCKED, f"needs {edge.step.name}, which is BLOCKED")
    return None


def _decide_backwards(graph: Graph, order: Order, situation: Situation, decisions: dict[Step, Decision]) -> set[Step]:
    """Turn done steps with demanded live values into REPLAY, and collect the steps that matter, consumers first."""
    needed: set[Step] = set(situation.wanted)
    for step in reversed(order.steps):
        if decisions[step].action in (Action.SKIP, Action.REPLAY):
            decisions[step] = _skip_or_replay(step, graph, order, situation, decisions, needed)
        if step in needed and decisions[step].action is not Action.SKIP:
            needed.update(edge.step for edge in graph.needs(step))
    return needed


def _skip_or_replay(
    step: Step,
    graph: Graph,
    order: Order,
    situation: Situation,
    decisions: Mapping[Step, Decision],
    needed: Collection[Step],
) -> Decision:
    demand = [
        consumer
        for consumer in order.consumers.get(step, ())
        if consumer in needed and decisions[consumer].action in (Action.RUN, Action.REPLAY)
    ]
    if not demand:
        return Decision(Action.SKIP, _skip_reason(step, graph, situation))
    users = _named([f"{consumer.name} ({decisions[consumer].action})" for consumer in demand])
    if step in situation.held:
        return Decision(Action.SKIP, f"SUCCESS is recorded, and its live value is held for {users}")
    if step in situation.ended:
        return Decision(Action.BLOCKED, situation.ended[step])
    return Decision(Action.REPLAY, f"SUCCESS is recorded, but its live value is needed by {users}")


def _named(users: list[str]) -> str:
    more = len(users) - 3
    return ", ".join(users[:3]) + (f" and {more} more" if more > 0 else "")


def _block_forwards(graph: Graph, order: Order, decisions: dict[Step, Decision]) -> bool:
    """Block what needs a blocked step; whether anything changed."""
    changed = False
    for step in order.steps:
        if decisions[step].action in (Action.RUN, Action.REPLAY):
            blocked = _blocked_need(step, graph, decisions)
            if blocked is not None:
                decisions[step] = blocked
                changed = True
    return changed
