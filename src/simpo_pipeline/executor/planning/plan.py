"""The plan: an action for each step, and the reason for it.

`make_plan` is a pure function of the graph and of the records in storage. `Planner` reads storage in the leader and
shares its plans with every process of the job.

done        = SUCCESS is recorded and a manifest lists the outputs
demanded(p) = a step that will RUN or REPLAY uses the live value of p

The first line that applies decides:
SKIP        done, not forced, and its live value is not demanded or is held by this process
REPLAY      done, not forced; its own live inputs are then demanded too
BLOCKED     failed in this job, or has no function
WAIT        another job holds a fresh lease
BLOCKED     needs a BLOCKED step, or failed before and --force_run_failed is false
RUN         otherwise
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from simpo_pipeline.errors import PlanError
from simpo_pipeline.executor.planning.changed_code import CodeComparison, with_changed_code
from simpo_pipeline.executor.planning.explanation import explain_new_steps
from simpo_pipeline.executor.planning.graph import Graph, Step
from simpo_pipeline.executor.planning.order import Order
from simpo_pipeline.executor.planning.selection import Selection
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseWatch
from simpo_pipeline.executor.records.status import Status, StepRecord, read_record
from simpo_pipeline.executor.run import Action, PlanRow
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.files import in_parallel, list_names
from simpo_pipeline.storage.paths import base_name, parent


@dataclass(frozen=True)
class Decision:
    """An action and its reason."""

    action: Action
    reason: str


@dataclass(frozen=True)
class Situation:
    """The inputs of a plan other than the graph."""

    records: Mapping[Step, StepRecord]
    selected: frozenset[Step]
    """The selected steps. Other steps are in the plan only if a selected step that is not done needs them."""
    held: Collection[Step] = field(default_factory=frozenset[Step])
    """The producers whose live values this process holds."""
    ended: Mapping[Step, str] = field(default_factory=dict[Step, str])
    """The steps that failed in this job, with the reason to show for each."""
    force_run_failed: bool = True
    forced: frozenset[Step] = frozenset()
    """Steps to run even if they are done."""


def make_plan(graph: Graph, order: Order, situation: Situation) -> dict[Step, Decision]:
    """Return the decision for each relevant step, in execution order."""
    decisions: dict[Step, Decision] = {}
    for step in order.steps:
        decisions[step] = _first_decision(step, graph, situation, decisions)
    needed = _decide_backwards(graph, order, situation, decisions)
    while _block_forwards(graph, order, decisions):
        needed = _decide_backwards(graph, order, situation, decisions)
    return {step: _with_changed_code(step, decisions[step], situation) for step in order.steps if step in needed}


def _first_decision(step: Step, graph: Graph, situation: Situation, decisions: Mapping[Step, Decision]) -> Decision:
    """Return the decision for a step, ignoring the steps that use it."""
    record = situation.records[step]
    if record.done and step not in situation.forced:
        return Decision(Action.SKIP, _skip_reason(step, graph, situation))
    if step in situation.ended:
        return Decision(Action.BLOCKED, situation.ended[step])
    if step.fn is None:
        return Decision(Action.BLOCKED, "it has no function and no recorded SUCCESS: its outputs must already exist")
    if record.lease is not None and record.lease.fresh:
        return Decision(Action.WAIT, f"held by {record.lease.describe()}")
    blocked = _blocked_need(step, graph, decisions)
    if blocked is not None:
        return blocked
    if record.status is Status.FAILED and not situation.force_run_failed:
        return Decision(Action.BLOCKED, "it failed before, and --force_run_failed is false")
    return Decision(Action.RUN, "forced; SUCCESS is recorded" if record.done else _run_reason(record))


def _skip_reason(step: Step, graph: Graph, situation: Situation) -> str:
    """Return the reason for SKIP. It mentions forced inputs: their versions stay the same, so their users stay done."""
    forced = [edge.step.name for edge in graph.needs(step) if edge.step in situation.forced]
    if not forced:
        return "SUCCESS is recorded"
    names = _named(list(dict.fromkeys(forced)))
    return f"SUCCESS is recorded, based on earlier results of {names}; to run this step again too, force it"


def _with_changed_code(step: Step, decision: Decision, situation: Situation) -> Decision:
    if decision.action not in (Action.SKIP, Action.REPLAY):
        return decision
    changed = situation.records[step].changed_code
    return replace(decision, reason=with_changed_code(decision.reason, step.name, changed))


def _run_reason(record: StepRecord) -> str:
    if record.status is Status.SUCCESS:
        return f"SUCCESS is recorded, but its manifest {record.manifest_problem}"
    if record.status is Status.RUNNING:
        left_by = f"{record.lease.describe()}, which is gone" if record.lease else "a job that no longer holds a lease"
        return f"left RUNNING by {left_by}"
    if record.unreadable_status is not None:
        return f"its status file contains {record.unreadable_status!r}, which is not a valid status"
    if record.status is not None:
        words = {
            Status.FAILED: "it failed before",
            Status.DEP_FAILED: "a step it needs failed before",
            Status.CANCELLED: "it was cancelled before",
        }
        return words[record.status]
    if record.manifest_problem is None:
        return "a manifest exists, but no status is recorded"
    return record.what_changed or "never ran"


def _blocked_need(step: Step, graph: Graph, decisions: Mapping[Step, Decision]) -> Decision | None:
    for edge in graph.needs(step):
        if decisions[edge.step].action is Action.BLOCKED:
            return Decision(Action.BLOCKED, f"needs {edge.step.name}, which is BLOCKED")
    return None


def _decide_backwards(graph: Graph, order: Order, situation: Situation, decisions: dict[Step, Decision]) -> set[Step]:
    """Turn done steps with demanded live values into REPLAY, and collect the relevant steps, consumers first."""
    needed: set[Step] = set(situation.selected)
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
    """Block the steps that need a blocked step. Return whether any decision changed."""
    changed = False
    for step in order.steps:
        if decisions[step].action in (Action.RUN, Action.REPLAY):
            blocked = _blocked_need(step, graph, decisions)
            if blocked is not None:
                decisions[step] = blocked
                changed = True
    return changed


_MANY_IN_ONE_FOLDER = 16


class Planner:
    """Makes the plans of one run. Remembers, between plans, the leases it saw and how new steps differ."""

    def __init__(self, graph: Graph, order: Order, selection: Selection, processes: Processes, lease: LeaseConfig):
        self.watch = LeaseWatch(lease)
        self._graph = graph
        self._order = order
        self._selection = selection
        self._processes = processes
        self._what_changed: dict[Step, str] | None = None
        self._changed_code: dict[Step, tuple[str, ...]] = {}
        self.with_checkpoints: set[Step] = set()
        """In the leader, the steps that had checkpoints when their records were last read."""

    def check_same_steps(self) -> None:
        """Check that all processes of the job built the same DAG.

        Raises:
            PlanError: The DAGs differ. Raised in every process; the message names the first step that differs.
        """
        labels = [f"{step.name}-{self._graph.identities[step].hash}" for step in self._order.steps]
        everyones: list[list[str]] = self._processes.gather(labels)
        for index, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                pairs = zip([*everyones[0], "nothing"], [*theirs, "nothing"], strict=False)
                ours_first, theirs_first = next(pair for pair in pairs if pair[0] != pair[1])
                raise PlanError(
                    f"Process {index} built a different DAG than process 0: {theirs_first} instead of {ours_first}. "
                    "Start every process with the same code, config, environment and input files."
                )

    def decide(
        self, ended: Mapping[Step, str], held: Collection[Step], attempted: Collection[Step] = ()
    ) -> dict[Step, Decision]:
        """Return the current plan, which is the same in every process.

        Args:
            ended: As in Situation.
            held: As in Situation.
            attempted: Steps that were attempted in this run. They are no longer forced.
        """
        index_of = {step: index for index, step in enumerate(self._order.steps)}

        def decide() -> list[list[Any]]:
            selection = self._selection
            situation = Situation(
                self._read_records(),
                selection.selected,
                held,
                ended,
                selection.force_run_failed,
                selection.forced.difference(attempted),
            )
            plan = make_plan(self._graph, self._order, situation)
            return [[index_of[step], decision.action.value, decision.reason] for step, decision in plan.items()]

        agreed: list[list[Any]] = self._processes.leader_decides(decide)
        return {self._order.steps[index]: Decision(Action(action), reason) for index, action, reason in agreed}

    def is_forced(self, step: Step) -> bool:
        """Return whether the step was selected to run even if it is done."""
        return step in self._selection.forced

    def anything_changed(self, waited_for: Collection[Step]) -> bool:
        """Return whether another job finished or abandoned one of these steps. Only the leader reads storage."""
        return self._processes.leader_decides(lambda: any(self._may_proceed(step) for step in waited_for))

    def _may_proceed(self, step: Step) -> bool:
        record = read_record(self._graph.output_paths[step], self.watch)
        return record.lease is None or not record.lease.fresh or (record.done and not self.is_forced(step))

    def rows(self, decisions: Mapping[Step, Decision]) -> tuple[PlanRow, ...]:
        """Return the plan as rows, for the steps and for the tables."""
        identities, paths = self._graph.identities, self._graph.output_paths
        return tuple(
            PlanRow(step.name, decision.action, decision.reason, identities[step].short_hash, paths[step])
            for step, decision in decisions.items()
        )

    def _read_records(self) -> dict[Step, StepRecord]:
        """Return the record of every step. Each is read once; most steps that never ran need no read at all."""
        paths = {step: self._graph.output_paths[step] for step in self._order.steps}
        names_beside = self._list_shared_folders(paths.values())
        there = [
            path
            for path in paths.values()
            if parent(path) not in names_beside or base_name(path) in names_beside[parent(path)]
        ]
        found = dict(zip(there, in_parallel(lambda path: read_record(path, self.watch), there), strict=True))
        records = {step: found.get(path, StepRecord()) for step, path in paths.items()}
        if self._what_changed is None:
            new = [step for step, record in records.items() if record.status is None]
            self._what_changed = self._explain(new, names_beside)
            self._changed_code = self._compare_code(records)
        self.with_checkpoints = {step for step, record in records.items() if record.has_checkpoints}
        for step, text in self._what_changed.items():
            records[step] = replace(records[step], what_changed=text)
        for step, modules in self._changed_code.items():
            records[step] = replace(records[step], changed_code=modules)
        return records

    def _list_shared_folders(self, paths: Collection[str]) -> dict[str, frozenset[str]]:
        """Return the names in each folder that contains many output paths."""
        counts = Counter(parent(path) for path in paths)
        return _list_folders([folder for folder, count in counts.items() if count >= _MANY_IN_ONE_FOLDER])

    def _explain(self, new_steps: list[Step], names_beside: Mapping[str, frozenset[str]]) -> dict[Step, str]:
        paths = {self._graph.output_paths[step]: step for step in new_steps if step.override_output_path is None}
        missing = list(dict.fromkeys(folder for path in paths if (folder := parent(path)) not in names_beside))
        names = {folder: sorted(found) for folder, found in {**names_beside, **_list_folders(missing)}.items()}
        configs = {path: self._graph.identities[step].version["config"] for path, step in paths.items()}
        files = {path: self._graph.files[step] for path, step in paths.items()}
        return {paths[path]: text for path, text in explain_new_steps(configs, names, files).items()}

    def _compare_code(self, records: Mapping[Step, StepRecord]) -> dict[Step, tuple[str, ...]]:
        """Return the modules whose source changed since a step that is done ran, by step."""
        done = [step for step, record in records.items() if record.done]
        comparison, paths = CodeComparison(), self._graph.output_paths
        changed = in_parallel(lambda step: comparison.changed_modules(paths[step], records[step].code, step.fn), done)
        return {step: modules for step, modules in zip(done, changed, strict=True) if modules}


def _list_folders(folders: Collection[str]) -> dict[str, frozenset[str]]:
    return dict(zip(folders, map(frozenset, in_parallel(list_names, folders)), strict=True))
