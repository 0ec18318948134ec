"""One step, once: call its function in every process, then let the leader record what came of it.

A function that neither asks for its run nor deals in live values knows nothing of processes: it reads and writes files,
and the leader alone calls it.

A RUN begins on whatever an earlier attempt left in the output path (a step may resume from it); the manifest lists what
is there at the end. A REPLAY happens in a scratch path and never touches what is recorded.
"""

import inspect
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
from simpo_pipeline.executor.planning.resolve import Resolver
from simpo_pipeline.executor.processes import Processes
from simpo_pipeline.executor.records.holder import utc_now
from simpo_pipeline.executor.records.info import Ended, info_record, read_info
from simpo_pipeline.executor.records.lease import LeaseFence, LeaseKeeper, LeaseReader
from simpo_pipeline.executor.records.provenance import Provenance
from simpo_pipeline.executor.records.status import ERROR_FILE, LEASE_FILE, Status, read_record
from simpo_pipeline.executor.run import PlanRow, StepRun
from simpo_pipeline.executor.running.checkpoints import remove_checkpoints
from simpo_pipeline.executor.running.commit import StepFiles
from simpo_pipeline.executor.running.failures import describe_failure, failure_in, place_of, report_end, sort_failures
from simpo_pipeline.executor.running.live import Live, LiveStore, joint_digest
from simpo_pipeline.executor.running.stopping import StoppableCall
from simpo_pipeline.executor.step import LiveInput
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.fence import fenced
from simpo_pipeline.storage.files import remove_tree, write_json
from simpo_pipeline.storage.paths import join

_logger = logging.getLogger("simpo_pipeline.executor")


REPLAY_FOLDER = ".replay"


class Ending(Enum):
    """What came of one attempt."""

    DONE = auto()
    FAILED = auto()
    DEP_FAILED = auto()
    """Not attempted: something it needs failed."""
    POSTPONED = auto()
    """Not attempted: another job has it, or has done it meanwhile. Plan again."""


@dataclass(frozen=True)
class Job:
    """What every attempt of one run shares; only the leader holds `leases` and has a `provenance`."""

    graph: Graph
    infos: dict[Step, dict[str, Any]]
    prefix: str
    run_id: str
    processes: Processes
    session: Any
    leases: LeaseKeeper
    files: ConditionalFiles
    live: LiveStore
    provenance: Provenance | None
    heartbeat_seconds: float
    calls: list[StoppableCall] = field(default_factory=list[StoppableCall])
    """The step functions that run just now in this process and hold a lease."""

    def lease_path(self, step: Step) -> str:
        """The lease of a step's output path."""
        return join(self.graph.output_paths[step], LEASE_FILE)

    @property
    def scratch_folder(self) -> str:
        """Where the replays of this run write."""
        return join(self.prefix, REPLAY_FOLDER, self.run_id)

    def scratch_path(self, step: Step) -> str:
        """Where a replay of a step writes."""
        name = f"{step.name}-{self.graph.identities[step].short_hash}"
        return join(self.scratch_folder, name)


def wants_run(step: Step) -> bool:
    """Whether the step's function asks for the StepRun: its second parameter is named `run`.

    Only such functions can reach the session, so only they and users of live values are kept off the pool.
    """
    if step.fn is None:
        return False
    return list(inspect.signature(step.fn).parameters)[1:2] == ["run"]


class Attempt:
    """One attempt at one step, by all processes.

    `consumers` are the steps that will use its live value. Unless `everywhere`, the step's function is called in the
    leader alone, and the other processes wait for it. A `forced` step runs also if it is done. `is_used_live`: the
    experiment has steps that use its live value, whether or not they are to run.
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
        self._outcome = threading.Lock()
        self._past_phase = False
        self._committed = False
        self.seconds = 0.0
        self.left_checkpoints = False

    def execute(self) -> Ending:
        """Call the step's function and record the outcome; what goes wrong in the step is kept in `error`."""
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
        except BaseException:  # a keyboard interrupt: the other processes may be gone, so nobody is asked
            if self._job.processes.is_leader:
                self._record(Status.CANCELLED)
            raise
        decide(self._release)
        if live is not None:
            self._job.live.publish(self._step, live, self._consumers)
        return Ending.DONE

    def _begin(self) -> bool:
        """Take the lease and say so; False when another job has the step, or has done it since the plan was made."""
        lease, leases = self._job.lease_path(self._step), self._job.leases
        if not leases.acquire(lease):
            return False
        while True:
            record = read_record(self._output_path, None)
            if record.done and not self._forced:
                leases.release(lease)
                return False
            self._files.adopt(record)
            leases.check(lease)  # after the look: else a holder that was frozen before it goes over the next one's
            if self._files.try_status(Status.RUNNING):
                break
            leases.confirm(lease)  # a former holder's last word came between, perhaps that it is done
        if record.has_error:
            self._files.remove_error()
        self._write_info(None)
        return True

    def _begin_replay(self) -> bool:
        """Show by a lease that the scratch of this run is in use."""
        lease = join(self._job.scratch_folder, LEASE_FILE)
        return self._job.leases.holds(lease) or self._job.leases.acquire(lease)

    def _write_info(self, ended: Ended | None) -> None:
        job = self._job
        assert job.provenance is not None, "only the leader writes"
        self._files.put_info(info_record(job.infos[self._step], job.run_id, job.provenance, self._started, ended))

    def _call_everywhere(self) -> tuple[Live | None, str | None]:
        """Call the function wherever it belongs, and learn how it went in every process."""
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
        try:
            if self._job.leases.holds(self._lease_path):
                return self._call_with_lease()
            return self._call() if self._replaying else self._call_beside_the_leader()
        except Exception as error:
            self._own_error = error
        except SystemExit as error:
            self._own_error = StepError(f"the step called sys.exit({error.code!r}); let it raise an error instead")
        return None

    @property
    def _lease_path(self) -> str:
        return join(self._output_path, LEASE_FILE)

    def _call_with_lease(self) -> Live | None:
        """In the process that holds the lease: should it be lost, writes are refused and the call is stopped."""
        leases, call = self._job.leases, StoppableCall(self._job.heartbeat_seconds)
        leases.when_lost(self._lease_path, call.stop)
        self._job.calls.append(call)
        try:
            with fenced(self._output_path, LeaseFence(leases, self._lease_path, call.shielded)):
                return call.call(self._call)
        finally:
            self._job.calls.remove(call)
            leases.when_lost(self._lease_path, None)

    def _call_beside_the_leader(self) -> Live | None:
        """In the other processes: they look whether their leader still holds the lease before they write."""
        job = self._job
        with fenced(self._output_path, LeaseReader(self._lease_path, job.run_id, job.files, job.heartbeat_seconds)):
            return self._call()

    def _call(self) -> Live | None:
        job, step = self._job, self._step
        if step.fn is None:
            raise StepError("the step has no function; its outputs were expected to be there")
        resolver = Resolver(job.prefix, self._output_path, job.graph.output_paths, self._live_value)
        config = resolver.resolve(step.config)
        if wants_run(step):
            run = StepRun(
                *(step.name, self._output_path, job.processes, job.session, self._plan, self._replaying),
                recorded_path=job.graph.output_paths[step],
                version=job.graph.identities[step].hash,
                is_used_live=self._is_used_live,
            )
            result = step.fn(config, run)
        else:
            result = step.fn(config)
        if self._consumers and not isinstance(result, Live):
            users = ", ".join(consumer.name for consumer in self._consumers)
            raise StepError(
                f"it returned {type(result).__name__}, but its live value is used by {users}. Return Live(value)."
            )
        return result if isinstance(result, Live) else None

    def _live_value(self, marker: LiveInput) -> Any:
        return self._job.live.give(self._job.graph.canonical[marker.step], self._step, marker.use)

    def _failed(self) -> StepError:
        first, count = self._failures[0], self._job.processes.process_count
        lost = isinstance(self._own_error, LeaseLostError)
        message = describe_failure(self._step.name, first, count, self._output_path, lost)
        error = LeaseLostError(message) if lost else StepFailedError(message)
        if self._own_error is None and first["traceback"]:
            error.add_note(f"On {place_of(first, count)}:\n{first['traceback']}")
        error.__cause__ = self._own_error
        return error

    def _commit(self, digest: str | None) -> None:
        """Make the outputs believable, or check that a replay gave what the first run gave."""
        if self._replaying:
            self._check_replay(digest)
            remove_tree(self._output_path)
            return
        self._files.put_manifest()
        self._write_info(Ended(round(self.seconds, 3), digest))
        self._files.put_status(Status.SUCCESS)
        self._committed = True
        self.left_checkpoints = self._files.has_checkpoints
        if self.left_checkpoints and not self._is_used_live:
            remove_checkpoints(self._output_path)

    def _check_replay(self, digest: str | None) -> None:
        try:
            recorded = read_info(self._job.graph.output_paths[self._step]).get("live_digest")
        except PathNotFoundError as error:
            raise StorageError(
                f"{error} The replay needs it to compare with. Remove the step's status to run it again."
            ) from error
        if recorded is None:
            _logger.warning("%s: its first run recorded no digest, so the replay is not compared", self._step.name)
        elif recorded != digest:
            recorded_path = self._job.graph.output_paths[self._step]
            raise ReplayMismatchError(
                f"Step {self._step.name!r} gave another live value when replayed: digest {digest}, but {recorded} at "
                "its first run. Its code, inputs or machine changed, or it is not deterministic. What it wrote is in "
                f"{self._output_path}. To accept the change, remove {recorded_path} and the output paths of the steps "
                "that depend on it."
            )

    def _leave_phase(self) -> None:
        """From here on the outcome is recorded by this thread alone."""
        with self._outcome:
            self._past_phase = True
        if self.error is not None:
            raise self.error  # the watch ends the process in a moment

    def _record_abort(self, failure: Mapping[str, Any]) -> None:
        """In the leader, from another thread: the job ends while this step is stuck."""
        with self._outcome:
            if not self._past_phase:
                self._failures = [dict(failure)]
                self.error = self._failed()
                self._record_failure()

    def _record_failure(self) -> None:
        # Processes that parted, or a commit that failed, are no process's own failure.
        common = {"process_index": None, "host": None, "exception": str(self.error), "traceback": None}
        error = {"step": self._step.name, "error": str(self.error), "failures": self._failures or [common]}
        cancelled = isinstance(self._own_error, StepCancelledError)
        self._record(Status.CANCELLED if cancelled else Status.FAILED, None if cancelled else error)

    def _record(self, token: Status, error: dict[str, Any] | None = None) -> None:
        """Record a bad end and give the lease up; what goes wrong here must not hide what went wrong before.

        A status that is not as this attempt left it stays: it may be a SUCCESS, another job's, or this one's whose
        answer was lost.
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
            _logger.error("%s: could not record that it %s: %s", self._step.name, token, second)

    def _release(self) -> None:
        if not self._replaying:
            self._job.leases.release(self._job.lease_path(self._step))


def record_dep_failed(job: Job, step: Step) -> None:
    """Record that a step did not run because one it needs failed, unless another job has it or has done it."""
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
