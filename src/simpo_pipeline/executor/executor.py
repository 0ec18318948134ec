"""Executor of a DAG of steps: makes a plan and carries it out, in one process or together with the others of its job.

    prefix/<name>-<hash>/           outputs and records of a step (status.py)
    prefix/experiments/<script>-<hash>.json   the record of an experiment
    prefix/.replay/<run id>/        scratch folder of replays

A run has rounds, because other jobs may hold steps: it makes a plan, attempts every step that need not wait, and plans
again if a step was postponed. Only the leader reads and writes storage. Every process follows the leader's decisions.
"""

import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from simpo_pipeline.errors import ConfigError, PlanError, StorageError
from simpo_pipeline.executor.planning.explanation import Explanation, explain_step
from simpo_pipeline.executor.planning.graph import Graph, Step, build_graph
from simpo_pipeline.executor.planning.identity import EdgeKind
from simpo_pipeline.executor.planning.order import Order, live_order
from simpo_pipeline.executor.planning.plan import Planner
from simpo_pipeline.executor.planning.resolve import Resolver
from simpo_pipeline.executor.planning.selection import named, select_steps
from simpo_pipeline.executor.records.code import SourceFingerprints
from simpo_pipeline.executor.records.holder import utc_now
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseKeeper
from simpo_pipeline.executor.records.provenance import find_provenance, script_name
from simpo_pipeline.executor.run import PlanRow
from simpo_pipeline.executor.running.attempt import Job
from simpo_pipeline.executor.running.live import LiveStore
from simpo_pipeline.executor.running.rounds import Rounds, StepResult
from simpo_pipeline.executor.running.step_info import run_record_path, step_info
from simpo_pipeline.executor.running.stopping import RunningCalls
from simpo_pipeline.executor.step import ExecutorStep, InputName
from simpo_pipeline.executor.table import plan_table
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.files import exists, write_json
from simpo_pipeline.storage.paths import absolute, join

PROBE_PREFIX = ".shared-"
_logger = logging.getLogger("simpo_pipeline.executor")


class Executor:
    """Executor of steps below a prefix. The first group of attributes is Marin's, and `run` fills them."""

    def __init__(
        self,
        prefix: str,
        executor_info_base_path: str | None = None,
        description: str | None = None,
        *,
        session: Any = None,
        processes: Processes | None = None,
        lease: LeaseConfig | None = None,
        unsafe_locks: bool = False,
    ):
        self.prefix = absolute(prefix)
        self.executor_info_base_path = absolute(executor_info_base_path or join(self.prefix, "experiments"))
        self.description = description
        self.steps: list[Step] = []
        self.output_paths: dict[Step, str] = {}
        self.configs: dict[Step, Any] = {}
        self.versions: dict[Step, Mapping[str, Any]] = {}
        self.version_strs: dict[Step, str] = {}
        self.dependencies: dict[Step, list[Step]] = {}
        self.executor_info_path: str | None = None
        self.plan: tuple[PlanRow, ...] = ()
        """Steps with their latest action, in the order in which they run."""
        self.results: tuple[StepResult, ...] = ()
        """Outcome of each step of the plan, also if `run` raises."""
        self._session = session
        self._processes = processes or Processes()
        self._lease = lease or LeaseConfig()
        self._files = ConditionalFiles(unsafe_locks)
        self._graph: Graph | None = None
        self._order: Order | None = None

    def run(
        self,
        steps: Sequence[ExecutorStep[Any] | InputName],
        *,
        dry_run: bool = False,
        run_only: Sequence[str] | None = None,
        force_run_failed: bool = True,
        max_concurrent: int | None = None,
        until: Sequence[str] | None = None,
        force: Sequence[str] | None = None,
    ) -> tuple[StepResult, ...]:
        """Run the steps, and all steps they need, until each has SUCCESS.

        A step that failed before runs again. This differs from Marin, because users nearly always restart after they
        have fixed the cause. `force_run_failed=False` blocks such a step instead.

        Args:
            steps: the steps to run.
            dry_run: only make the plan. Nothing is written, no lease is acquired, and the session is not used.
            run_only: regular expressions that are searched in step names. Only matching steps, and the steps they need,
                are run.
            force_run_failed: whether to run steps again that failed before.
            max_concurrent: the maximum number of steps without live values or session that run at the same time. 1 runs
                every step in the caller's thread. None sets no limit.
            until: names of steps. Only these steps, and the steps before them, are run.
            force: names of steps to run even if they are done. Steps that used them keep their version and stay done.

        Raises:
            PlanError: the DAG, or a name in `run_only`, `until` or `force`, is invalid. Nothing has run.
            StepFailedError: a step failed. The message names the first one, and its own error is chained. Independent
                steps have run.
            StepError, StorageError: another failure of the first step that did not succeed.
        """
        if max_concurrent is not None and max_concurrent < 1:
            raise ConfigError(f"max_concurrent is {max_concurrent}. Set it to at least 1, or omit it for no limit.")
        graph = build_graph(steps, self.prefix)
        order = live_order(graph)
        self._fill_marin_attributes(graph)
        self._graph, self._order = graph, order
        if self._processes.is_leader:
            for warning in graph.warnings:
                _logger.warning("%s", warning)
        selection = select_steps(
            graph, order, run_only=run_only, until=until, force=force, force_run_failed=force_run_failed
        )
        planner = Planner(graph, order, selection, self._processes, self._lease)
        planner.check_same_steps()
        if dry_run:
            self.plan = planner.rows(planner.decide({}, ()))
            return ()
        for step in order.steps:
            self._files.check(graph.output_paths[step])
        run_id: str = self._processes.leader_decides(lambda: uuid.uuid4().hex[:12])
        self._check_prefix(run_id)
        with LeaseKeeper(run_id, self._lease, planner.watch, self._files) as leases:
            job = self._job(graph, run_id, leases)
            self._run_rounds(Rounds(job, order, planner, max_concurrent, self._lease.poll_seconds), job)
        return self.results

    def _job(self, graph: Graph, run_id: str, leases: LeaseKeeper) -> Job:
        processes, fingerprints = self._processes, SourceFingerprints()
        return Job(
            graph=graph,
            infos={step: step_info(graph, step, self.configs[step]) for step in graph.steps},
            code={step: fingerprints.of(step.fn) for step in graph.steps},
            prefix=self.prefix,
            run_id=run_id,
            processes=processes,
            session=self._session,
            leases=leases,
            files=self._files,
            live=LiveStore(),
            provenance=find_provenance(processes.process_count) if processes.is_leader else None,
            heartbeat_seconds=self._lease.heartbeat_seconds,
            calls=RunningCalls(self._lease.heartbeat_seconds),
        )

    def explain(self, name: str) -> list[Explanation]:
        """Return all that is known about the steps with a name, after `run` made a plan.

        Raises:
            PlanError: no step has that name.
        """
        assert self._graph is not None and self._order is not None, "run() makes the plan"
        graph, order = self._graph, self._order
        rows = {row.output_path: row for row in self.plan}
        steps = named(graph, order, name, "explain")
        return [explain_step(graph, order, step, rows.get(graph.output_paths[step])) for step in steps]

    def _run_rounds(self, rounds: Rounds, job: Job) -> None:
        started = utc_now()

        def on_plan(rows: tuple[PlanRow, ...]) -> None:
            write = self._processes.leader_decides
            self.executor_info_path = write(lambda: self._write_run_record(job, started, None))
            if self._processes.is_leader:
                _logger.info("the plan:\n%s", plan_table(rows))

        try:
            rounds.run(on_plan)
        finally:
            job.live.free_all()
            self.plan, self.results = rounds.rows(), rounds.results()
            if self._processes.is_leader and self.executor_info_path is not None:
                self._end_run_record(job, started)

    def _end_run_record(self, job: Job, started: str) -> None:
        """Record the end of the run. An error only logs a warning, because each step has already recorded its end."""
        try:
            self._write_run_record(job, started, utc_now())
        except StorageError as error:
            _logger.warning("could not record the end of this run: %s", error)

    def _check_prefix(self, run_id: str) -> None:
        """Check that the leader can write below the prefix, and that every process sees what it writes there.

        Raises:
            StorageError: the leader cannot write.
            PlanError: some processes do not see it. Every process raises this error, which names them.
        """
        probe = join(self.prefix, f"{PROBE_PREFIX}{run_id}")
        version: str | None = self._processes.leader_decides(lambda: self._files.create(probe, run_id.encode()))
        views: list[list[Any]] = self._processes.gather([self.prefix, _sees(probe)])
        self._processes.leader_decides(lambda: self._files.remove(probe, version or ""))
        blind = [str(index) for index, (prefix, sees) in enumerate(views) if prefix != views[0][0] or not sees]
        if blind:
            raise PlanError(
                f"The leader wrote a file below {views[0][0]!r}, but process {', '.join(blind)} does not see it, or "
                "has a different prefix. All hosts of a job must use the same prefix: set --prefix to the absolute "
                "path of a folder that they share, or to gs://bucket/path."
            )

    def _fill_marin_attributes(self, graph: Graph) -> None:
        self.steps = list(graph.steps)
        self.output_paths = dict(graph.output_paths)
        self.versions = {step: identity.version for step, identity in graph.identities.items()}
        self.version_strs = {step: identity.version_str for step, identity in graph.identities.items()}
        self.dependencies = {}
        for step, stand_in in graph.canonical.items():
            needs = (edge.step for edge in graph.edges[stand_in] if edge.kind is not EdgeKind.PSEUDO)
            self.dependencies[step] = list(dict.fromkeys(needs))
            resolver = Resolver(self.prefix, graph.output_paths[step], graph.output_paths, lambda marker: marker)
            self.configs[step] = resolver.resolve(step.config)

    def _write_run_record(self, job: Job, started: str, finished: str | None) -> str:
        assert job.provenance is not None, "only the leader writes"
        infos = [job.infos[step] for step in self.steps]
        results = {result.output_path: result.action for result in self.results}
        path = run_record_path(self.executor_info_base_path, infos)
        record = {
            "caller_path": script_name(),
            "run_id": job.run_id,
            **job.provenance.as_json(),
            "prefix": self.prefix,
            "description": self.description,
            "created_date": started,
            "finished_date": finished,
            "actions": results,
            "steps": infos,
        }
        write_json(path, record)
        return path


def _sees(path: str) -> bool:
    try:
        return exists(path)
    except StorageError:
        return False
