"""Plans that every process of a job shares: the leader reads storage and decides, the others are told."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from simpo_pipeline.errors import PlanError
from simpo_pipeline.executor.explain import recorded_config, siblings_by_stem, stem_of, what_changed
from simpo_pipeline.executor.graph import Graph, Step
from simpo_pipeline.executor.lease import LeaseConfig, LeaseWatch
from simpo_pipeline.executor.order import Order
from simpo_pipeline.executor.plan import Decision, Situation, make_plan
from simpo_pipeline.executor.processes import Processes
from simpo_pipeline.executor.run import Action, PlanRow
from simpo_pipeline.executor.status import StepRecord, read_record
from simpo_pipeline.storage.files import list_names
from simpo_pipeline.storage.paths import base_name, join, parent

_READERS = 32
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Planner:
    """Makes the plans of one run; remembers, between them, the leases it saw and what it found out about new steps."""

    def __init__(
        self,
        graph: Graph,
        order: Order,
        wanted: frozenset[Step],
        processes: Processes,
        lease: LeaseConfig,
        force_run_failed: bool,
    ):
        self.watch = LeaseWatch(lease)
        self._graph = graph
        self._order = order
        self._wanted = wanted
        self._processes = processes
        self._force_run_failed = force_run_failed
        self._what_changed: dict[Step, str | None] | None = None

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

    def decide(self, ended: Mapping[Step, str], held: Collection[Step]) -> dict[Step, Decision]:
        """The plan now, the same in every process; `ended` and `held` as in Situation."""
        index_of = {step: index for index, step in enumerate(self._order.steps)}

        def decide() -> list[list[Any]]:
            situation = Situation(self._read_records(), self._wanted, held, ended, self._force_run_failed)
            plan = make_plan(self._graph, self._order, situation)
            return [[index_of[step], decision.action.value, decision.reason] for step, decision in plan.items()]

        agreed: list[list[Any]] = self._processes.leader_decides(decide)
        return {self._order.steps[index]: Decision(Action(action), reason) for index, action, reason in agreed}

    def anything_changed(self, waited_for: Collection[Step]) -> bool:
        """Whether another job finished, or gave up, one of these steps; asks storage in the leader alone."""
        return self._processes.leader_decides(lambda: any(self._may_proceed(step) for step in waited_for))

    def _may_proceed(self, step: Step) -> bool:
        record = read_record(self._graph.output_paths[step], self.watch)
        return record.done or record.lease is None or not record.lease.fresh

    def rows(self, decisions: Mapping[Step, Decision]) -> tuple[PlanRow, ...]:
        """The plan as the steps and the tables show it."""
        identities, paths = self._graph.identities, self._graph.output_paths
        return tuple(
            PlanRow(step.name, decision.action, decision.reason, identities[step].short_hash, paths[step])
            for step, decision in decisions.items()
        )

    def _read_records(self) -> dict[Step, StepRecord]:
        paths = self._graph.output_paths
        found = _in_parallel(lambda step: read_record(paths[step], self.watch), self._order.steps)
        records = dict(zip(self._order.steps, found, strict=True))
        if self._what_changed is None:
            self._what_changed = self._explain([step for step, record in records.items() if record.status is None])
        for step, text in self._what_changed.items():
            records[step] = replace(records[step], what_changed=text)
        return records

    def _explain(self, new_steps: list[Step]) -> dict[Step, str | None]:
        """How each step that never ran differs from the nearest that did; each folder and record is read once."""
        paths = self._graph.output_paths
        folders = list(dict.fromkeys(parent(paths[step]) for step in new_steps))
        stems = {
            folder: siblings_by_stem(names)
            for folder, names in zip(folders, _in_parallel(list_names, folders), strict=True)
        }
        siblings = {
            step: [
                join(parent(paths[step]), name)
                for name in stems[parent(paths[step])].get(stem_of(paths[step]), [])
                if name != base_name(paths[step])
            ]
            for step in new_steps
        }
        beside = list(dict.fromkeys(path for found in siblings.values() for path in found))
        configs = dict(zip(beside, _in_parallel(recorded_config, beside), strict=True))

        def explain(step: Step) -> str | None:
            recorded = {base_name(path): configs[path] for path in siblings[step]}
            known = {name: config for name, config in recorded.items() if config is not None}
            return what_changed(self._graph.identities[step].version["config"], known)

        return {step: explain(step) for step in new_steps}


def _in_parallel(work: Callable[[ItemT], ResultT], items: Collection[ItemT]) -> list[ResultT]:
    with ThreadPoolExecutor(_READERS, thread_name_prefix="plan") as pool:
        return list(pool.map(work, items))
