"""Plans that every process of a job shares: the leader reads storage and decides, the others are told."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from simpo_pipeline.errors import PlanError
from simpo_pipeline.executor.explain import explain_new_steps
from simpo_pipeline.executor.graph import Graph, Step
from simpo_pipeline.executor.lease import LeaseConfig, LeaseWatch
from simpo_pipeline.executor.order import Order
from simpo_pipeline.executor.parallel import in_parallel
from simpo_pipeline.executor.plan import Decision, Situation, make_plan
from simpo_pipeline.executor.processes import Processes
from simpo_pipeline.executor.run import Action, PlanRow
from simpo_pipeline.executor.status import StepRecord, read_record
from simpo_pipeline.storage.files import list_names
from simpo_pipeline.storage.paths import base_name, parent

_MANY_IN_ONE_FOLDER = 16


@dataclass(frozen=True)
class Request:
    """What was asked of the executor besides the DAG."""

    wanted: frozenset[Step]
    """The steps asked for; others run only if one of these needs them."""
    forced: frozenset[Step] = frozenset()
    """The steps to run also if they are done, once."""
    force_run_failed: bool = True


class Planner:
    """Makes the plans of one run; remembers, between them, the leases it saw and what it found out about new steps."""

    def __init__(self, graph: Graph, order: Order, request: Request, processes: Processes, lease: LeaseConfig):
        self.watch = LeaseWatch(lease)
        self._graph = graph
        self._order = order
        self._request = request
        self._processes = processes
        self._what_changed: dict[Step, str] | None = None
        self.with_checkpoints: set[Step] = set()
        """In the leader, the steps that had checkpoints when they were last looked at."""

    def check_same_steps(self) -> None:
        """Make sure that all processes of the job built the same DAG.

        Raises:
            PlanError: in every process, naming the first step at which two of them part.
        """
        labels = [f"{step.name}-{self._graph.identities[step].hash}" for step in self._order.steps]
        everyones: list[list[str]] = self._processes.gather(labels)
        for index, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                pairs = zip([*everyones[0], "nothing"], [*theirs, "nothing"], strict=False)
                ours_first, theirs_first = next(pair for pair in pairs if pair[0] != pair[1])
                raise PlanError(
                    f"Process {index} built another DAG than process 0: {theirs_first} in place of {ours_first}. "
                    "Start every process with the same code, config and environment."
                )

    def decide(
        self, ended: Mapping[Step, str], held: Collection[Step], attempted: Collection[Step] = ()
    ) -> dict[Step, Decision]:
        """The plan now, the same in every process; `ended` and `held` as in Situation.

        What was `attempted` in this run is forced no more.
        """
        index_of = {step: index for index, step in enumerate(self._order.steps)}

        def decide() -> list[list[Any]]:
            request = self._request
            situation = Situation(
                self._read_records(),
                request.wanted,
                held,
                ended,
                request.force_run_failed,
                request.forced.difference(attempted),
            )
            plan = make_plan(self._graph, self._order, situation)
            return [[index_of[step], decision.action.value, decision.reason] for step, decision in plan.items()]

        agreed: list[list[Any]] = self._processes.leader_decides(decide)
        return {self._order.steps[index]: Decision(Action(action), reason) for index, action, reason in agreed}

    def is_forced(self, step: Step) -> bool:
        """Whether the step was to run also if it is done."""
        return step in self._request.forced

    def anything_changed(self, waited_for: Collection[Step]) -> bool:
        """Whether another job finished, or gave up, one of these steps; asks storage in the leader alone."""
        return self._processes.leader_decides(lambda: any(self._may_proceed(step) for step in waited_for))

    def _may_proceed(self, step: Step) -> bool:
        record = read_record(self._graph.output_paths[step], self.watch)
        return record.lease is None or not record.lease.fresh or (record.done and not self.is_forced(step))

    def rows(self, decisions: Mapping[Step, Decision]) -> tuple[PlanRow, ...]:
        """The plan as the steps and the tables show it."""
        identities, paths = self._graph.identities, self._graph.output_paths
        return tuple(
            PlanRow(step.name, decision.action, decision.reason, identities[step].short_hash, paths[step])
            for step, decision in decisions.items()
        )

    def _read_records(self) -> dict[Step, StepRecord]:
        """What storage says of every step: it is asked once for each, not at all for most that never ran."""
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
        self.with_checkpoints = {step for step, record in records.items() if record.has_checkpoints}
        for step, text in self._what_changed.items():
            records[step] = replace(records[step], what_changed=text)
        return records

    def _list_shared_folders(self, paths: Collection[str]) -> dict[str, frozenset[str]]:
        """The names in each folder that holds many output paths."""
        counts = Counter(parent(path) for path in paths)
        return _list_folders([folder for folder, count in counts.items() if count >= _MANY_IN_ONE_FOLDER])

    def _explain(self, new_steps: list[Step], names_beside: Mapping[str, frozenset[str]]) -> dict[Step, str]:
        paths = {self._graph.output_paths[step]: step for step in new_steps if step.override_output_path is None}
        missing = list(dict.fromkeys(folder for path in paths if (folder := parent(path)) not in names_beside))
        names = {folder: sorted(found) for folder, found in {**names_beside, **_list_folders(missing)}.items()}
        configs = {path: self._graph.identities[step].version["config"] for path, step in paths.items()}
        return {paths[path]: text for path, text in explain_new_steps(configs, names).items()}


def _list_folders(folders: Collection[str]) -> dict[str, frozenset[str]]:
    return dict(zip(folders, map(frozenset, in_parallel(list_names, folders)), strict=True))
