"""One attempt at one step: every process calls its function, then the leader records the outcome.

A step function that neither takes its `StepRun` nor uses live values is independent of processes. It only reads and
writes files, so only the leader calls it.

A RUN starts with whatever an earlier attempt left in the output path, because a step may resume from it. The manifest
lists the files that exist at the end. A REPLAY writes to a scratch path and never changes recorded outputs.
"""

import functools
import inspect
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from simpo_pipeline.errors import (
    LeaseLostError,
    PathNotFoundError,
    ReplayMismatchError,
    SimpoPipelineError,
    StepCancelledError,
    StepError,
    StepFailedError,
    StorageError,
)
from simpo_pipeline.executor.planning.graph import Graph, Step
from simpo_pipeline.executor.planning.identity import changed_files
from simpo_pipeline.executor.planning.resolve import Resolver
from simpo_pipeline.executor.records.holder import utc_now
from simpo_pipeline.executor.records.info import Ended, info_record, read_info
from simpo_pipeline.executor.records.lease import LeaseFence, LeaseKeeper, LeaseReader
from simpo_pipeline.executor.records.provenance import Provenance
from simpo_pipeline.executor.records.status import ERROR_FILE, LEASE_FILE, OWN_FILES, Status, read_record
from simpo_pipeline.executor.run import Live, PlanRow, StepRun
from simpo_pipeline.executor.running.checkpoint_cleanup import remove_checkpoints
from simpo_pipeline.executor.running.commit import StepFiles
from simpo_pipeline.executor.running.failures import (
    describe_failure,
    failure_in,
    host_and_process,
    report_end,
    sort_failures,
)
from simpo_pipeline.executor.running.live import LiveStore
from simpo_pipeline.executor.running.stopping import RunningCalls, StoppableCall
from simpo_pipeline.executor.step import LiveInput
from simpo_pipeline.processes import Processes, joint_digest
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.fence import OPEN, Fence
from simpo_pipeline.storage.files import remove_tree, write_json
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join

_logger = logging.getLogger("simpo_pipeline.executor")


REPLAY_FOLDER = ".replay"


class Ending(Enum):
    """Outcome of one attempt."""

    DONE = auto()
    FAILED = auto()
    DEP_FAILED = auto()
    """Not attempted, because a step that it needs failed."""
    POSTPONED = auto()
    """Not attempted, because another job holds the step or has finished it in the meantime. Plan again."""


@dataclass(frozen=True)
class Job:
    """State shared by all attempts of one run. Only the leader acquires leases and has a `provenance`."""

    graph: Graph
    infos: dict[Step, dict[str, Any]]
    code: dict[Step, dict[str, str]]
    prefix: str
    run_id: str
    processes: Processes
    session: Any
    leases: LeaseKeeper
    files: ConditionalFiles
    live: LiveStore
    provenance: Provenance | None
    heartbeat_seconds: float
    calls: RunningCalls
    """The calls of step functions in this process."""

    def lease_path(self, step: Step) -> str:
        """Return the path of the lease of a step's output path."""
        return join(self.graph.output_paths[step], LEASE_FILE)

    @property
    def scratch_folder(self) -> str:
        """Folder that the replays of this run write to."""
        return join(self.prefix, REPLAY_FOLDER, self.run_id)

    def scratch_path(self, step: Step) -> str:
        """Return the path that a replay of a step writes to."""
        name = f"{step.name}-{self.graph.identities[step].short_hash}"
        return join(self.scratch_folder, name)


def handles_of(step: Step) -> frozenset[str]:
    """Return which of the parameters "output" and "run" the step's function has after its config.

    Parameters that `functools.partial` has already given a value do not count.
    """
    if step.fn is None:
        return frozenset()
    parameters = list(inspect.signature(step.fn).parameters.values())[1:]
    fn: Any = step.fn
    given = fn.keywords if isinstance(fn, functools.partial) else {}
    by_name = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    return frozenset({"output", "run"} & by_name - given.keys())


def takes_step_run(step: Step) -> bool:
    """Return whether the step's function takes a `StepRun`.

    Only such functions can use the session. So only they, and steps with live values, are kept out of the thread pool.
    """
    return "run" in handles_of(step)


class Attempt:
    """One attempt at one step, by all processes of the job.

    Args:
        job: the state shared by all attempts of the run.
        step: the step to attempt.
        plan: the plan, which is passed to the step function in its `StepRun`.
        consumers: the steps that will use the step's live value.
        replaying: whether this is a REPLAY, not a RUN.
        everywhere: whether every process calls the step's function. Otherwise only the leader calls it, and the other
            processes wait for it.
        forced: whether to run the step even if it is done.
        is_used_live: whether the experiment has steps that use the live value, whether or not they will run.
    """

    def __init__(
        self,
        job: Job,
        step: Step,
        plan: tuple[PlanRow, ...],
        consumers: Iterable[Step],
        *,
        replaying: bool,
        everywhere: bool,
        forced: bool,
        is_used_live: bool = False,
    ):
        self._job = job
        self._step = step
        self._plan = plan
        self._consumers = tuple(consumers)
        self._replaying = replaying
        self._everywhere = everywhere
        self._forced = forced
        self._is_used_live = is_used_live
        self._started = utc_now()
        self._output_path = job.scratch_path(step) if replaying else job.graph.output_paths[step]
        self._files = StepFiles(self._output_path, job.files, job.leases)
        self._own_error: Exception | None = None
        self._failures: list[dict[str, Any]] = []
        self.error: SimpoPipelineError | None = None
        self._outcome_lock = threading.Lock()
        self._past_phase = False
        self._committed = False
        self.seconds = 0.0
        self.left_checkpoints = False

    def execute(self) -> Ending:
        """Call the step's function and record the outcome. An error of the step is stored in `error`."""
        decide = self._job.processes.leader_decides
        clock = time.monotonic()
        try:
            if not decide(self._begin_replay if self._replaying else self._begin):
                return Ending.POSTPONED
            live, digest = self._call_everywhere()
            self.seconds = time.monotonic() - clock
            decide(lambda: self._commit(digest))
        except SimpoPipelineError as error:
            self.error = error
            self.seconds = time.monotonic() - clock
            decide(self._record_failure)
            return Ending.FAILED
        except BaseException:  # a keyboard interrupt: the other processes may be gone, so skip them
            if self._job.processes.is_leader:
                self._record(Status.CANCELLED)
            raise
        decide(self._release)
        if live is not None:
            self._job.live.publish(self._step, live, self._consumers)
        return Ending.DONE

    def _begin(self) -> bool:
        """Acquire the lease and record RUNNING.

        Returns:
            False if another job holds the step, or has finished it since the plan was made.
        """
        if self._job.calls.interrupted:
            raise StepCancelledError("The step was not started because its job was interrupted.")
        lease, leases = self._job.lease_path(self._step), self._job.leases
        if not leases.acquire(lease):
            return False
        while True:
            record = read_record(self._output_path, None)
            if record.done and not self._forced:
                leases.release(lease)
                return False
            self._files.adopt(record)
            # Check after reading: otherwise a holder that was frozen before the read could overwrite the next holder's
            # status.
            leases.check(lease)
            if self._files.try_status(Status.RUNNING):
                break
            leases.confirm(lease)  # a former holder wrote its last status in between, perhaps SUCCESS
        if record.has_error:
            self._files.remove_error()
        self._write_info(None)
        return True

    def _begin_replay(self) -> bool:
        """Acquire the lease which shows that the scratch folder of this run is in use. Return whether it is held."""
        lease = join(self._job.scratch_folder, LEASE_FILE)
        return self._job.leases.holds(lease) or self._job.leases.acquire(lease)

    def _write_info(self, ended: Ended | None) -> None:
        job = self._job
        assert job.provenance is not None, "only the leader writes"
        self._files.put_info(info_record(job.infos[self._step], job.run_id, job.provenance, self._started, ended))

    def _call_everywhere(self) -> tuple[Live | None, str | None]:
        """Call the function in the processes that should call it, and gather the outcome of every process."""
        processes = self._job.processes
        watch = processes.watch
        with watch.phase(self._step.name, files_only=not self._everywhere, on_abort=self._record_abort):
            live = self._call_here() if self._everywhere or processes.is_leader else None
            report = report_end(processes.process_index, self._own_error, live.digest if live is not None else None)
            if self._own_error is not None:
                watch.failed(failure_in(report))
            reports: list[dict[str, Any]] = processes.gather(report)
            watch.step_ended(self._step.name)
        self._leave_phase()
        self._failures = sort_failures(reports)
        if self._failures:
            raise self._failed()
        return live, joint_digest([report["live_digest"] for report in reports])

    def _call_here(self) -> Live | None:
        job = self._job
        try:
            if job.leases.holds(self._lease_path):
                return self._call_with_lease()
            # The leader of a replay holds one lease for all scratch paths. Otherwise the leader holds the step's lease,
            # and this process reads it before it writes.
            reader = LeaseReader(self._lease_path, job.run_id, job.files, job.heartbeat_seconds)
            return self._call(OPEN if self._replaying else reader)
        except Exception as error:
            self._own_error = error
        except SystemExit as error:
            self._own_error = StepError(f"the step called sys.exit({error.code!r}); raise an exception instead")
        return None

    @property
    def _lease_path(self) -> str:
        return join(self._output_path, LEASE_FILE)

    def _call_with_lease(self) -> Live | None:
        """Call the function in the process that holds the lease. If it is lost, refuse writes and stop the call."""
        job, fence = self._job, LeaseFence(self._job.leases, self._lease_path)
        call = StoppableCall(self._step.name, fence, lambda: self._record(Status.CANCELLED))
        job.leases.when_lost(self._lease_path, call.lose)
        try:
            return job.calls.call(call, lambda: self._call(call))
        finally:
            job.leases.when_lost(self._lease_path, None)

    def _call(self, fence: Fence) -> Live | None:
        job, step = self._job, self._step
        if step.fn is None:
            raise StepError("the step has no function; its outputs were expected to exist")
        self._check_outside_files()
        resolver = Resolver(job.prefix, self._output_path, job.graph.output_paths, self._live_value)
        config = resolver.resolve(step.config)
        output = OutputFolder(self._output_path, fence, reserved=OWN_FILES)
        run = StepRun(
            name=step.name,
            output=output,
            processes=job.processes,
            session=job.session,
            plan=self._plan,
            replaying=self._replaying,
            recorded_path=job.graph.output_paths[step],
            version=job.graph.identities[step].hash,
            is_used_live=self._is_used_live,
        )
        handles = {"output": output, "run": run}
        result = step.fn(config, **{name: handles[name] for name in handles_of(step)})
        if self._consumers and not isinstance(result, Live):
            users = ", ".join(consumer.name for consumer in self._consumers)
            raise StepError(
                f"the step returned {type(result).__name__}, but its live value is used by {users}. Return Live(value)."
            )
        return result if isinstance(result, Live) else None

    def _check_outside_files(self) -> None:
        """Check that the files which no step wrote are still those that the step's identity covers."""
        graph, step = self._job.graph, self._step
        changed = changed_files(step.config, graph.identities[step].version["config"], graph.files[step])
        if changed:
            raise StepError(
                f"{', '.join(changed)} changed after this job made its plan. Start the job again, so that the step "
                "gets the version of what it reads. If a step of this job writes it, refer to it with output_path_of."
            )

    def _live_value(self, marker: LiveInput) -> Any:
        return self._job.live.give(self._job.graph.canonical[marker.step], self._step, marker.use)

    def _failed(self) -> StepError:
        first, count = self._failures[0], self._job.processes.process_count
        lost, cancelled = (isinstance(self._own_error, kind) for kind in (LeaseLostError, StepCancelledError))
        message = describe_failure(self._step.name, first, count, self._output_path, lost, cancelled)
        error = LeaseLostError(message) if lost else StepFailedError(message)
        if self._own_error is None and first["traceback"]:
            error.add_note(f"On {host_and_process(first, count)}:\n{first['traceback']}")
        error.__cause__ = self._own_error
        return error

    def _commit(self, digest: str | None) -> None:
        """Commit the outputs, or check that a replay produced the same live value as the first run."""
        if self._replaying:
            self._check_replay(digest)
            remove_tree(self._output_path)
            return
        self._files.put_manifest()
        self._files.put_code(self._job.code[self._step])
        self._write_info(Ended(round(self.seconds, 3), digest))
        self._files.put_status(Status.SUCCESS)
        self._committed = True
        self.left_checkpoints = self._files.has_checkpoints
        if self.left_checkpoints and not self._is_used_live:
            remove_checkpoints(self._output_path, self._job.leases)

    def _check_replay(self, digest: str | None) -> None:
        try:
            recorded = read_info(self._job.graph.output_paths[self._step]).get("live_digest")
        except PathNotFoundError as error:
            raise StorageError(
                f"{error} The replay needs it for comparison. Remove the step's status to run it again."
            ) from error
        if recorded is None:
            _logger.warning("%s: the first run recorded no digest, so the replay is not checked", self._step.name)
        elif recorded != digest:
            recorded_path = self._job.graph.output_paths[self._step]
            raise ReplayMismatchError(
                f"The replay of step {self._step.name!r} produced a different live value: digest {digest}, but "
                f"{recorded} in its first run. Its code, inputs or machine changed, or it is not deterministic. The "
                f"outputs of the replay are in {self._output_path}. To accept the change, remove {recorded_path} and "
                "the output paths of the steps that depend on it."
            )

    def _leave_phase(self) -> None:
        """Leave the watched phase: from now on only this thread records the outcome."""
        with self._outcome_lock:
            self._past_phase = True
        if self.error is not None:
            raise self.error  # the watch is about to end the process

    def _record_abort(self, failure: Mapping[str, Any]) -> None:
        """Record a failure in the leader, from another thread, when the job ends while this step is stuck."""
        with self._outcome_lock:
            if not self._past_phase:
                self._failures = [dict(failure)]
                self.error = self._failed()
                self._record_failure()

    def _record_failure(self) -> None:
        # If the processes diverged or the commit failed, no single process failed.
        common = {"process_index": None, "host": None, "exception": str(self.error), "traceback": None}
        error = {"step": self._step.name, "error": str(self.error), "failures": self._failures or [common]}
        cancelled = isinstance(self._own_error, StepCancelledError)
        self._record(Status.CANCELLED if cancelled else Status.FAILED, None if cancelled else error)

    def _record(self, token: Status, error: dict[str, Any] | None = None) -> None:
        """Record an unsuccessful outcome and release the lease. An error here must not hide the original error.

        A status that changed since this attempt wrote it is kept. It may be a SUCCESS: that of another job, or one
        that this job wrote but whose response was lost.
        """
        lease = self._job.lease_path(self._step)
        try:
            if self._replaying and error is not None:
                write_json(join(self._output_path, ERROR_FILE), error)
            elif self._job.leases.holds(lease):
                self._job.leases.confirm(lease)
                if not self._committed and self._files.try_status(token) and error is not None:
                    self._files.put_error(error)
                self._release()
        except (StorageError, StepError) as second:
            _logger.error("%s: could not record the status %s: %s", self._step.name, token, second)

    def _release(self) -> None:
        if not self._replaying:
            self._job.leases.release(self._job.lease_path(self._step))


def record_dep_failed(job: Job, step: Step) -> None:
    """Record that a step did not run because a step it needs failed, unless another job holds it or has finished it."""
    lease, output_path = job.lease_path(step), job.graph.output_paths[step]
    if not job.leases.acquire(lease):
        return
    try:
        record, files = read_record(output_path, None), StepFiles(output_path, job.files, job.leases)
        files.adopt(record)
        job.leases.check(lease)
        if not record.done:
            files.try_status(Status.DEP_FAILED)
    finally:
        job.leases.release(lease)
