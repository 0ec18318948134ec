"""Rounds of a run: make a plan, attempt every step that need not wait, and plan again until no step has to wait.

More than one round is needed only if other jobs hold steps. Live values stay in this process between rounds.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from simpo_pipeline.errors import SimpoPipelineError, StepFailedError
from simpo_pipeline.executor.planning.graph import Step
from simpo_pipeline.executor.planning.order import Order
from simpo_pipeline.executor.planning.plan import Decision, Planner
from simpo_pipeline.executor.records.status import LEASE_FILE
from simpo_pipeline.executor.run import Action, PlanRow
from simpo_pipeline.executor.running.attempt import Attempt, Ending, Job, record_dep_failed, takes_step_run
from simpo_pipeline.executor.running.checkpoint_cleanup import remove_unused_checkpoints
from simpo_pipeline.executor.running.schedule import Schedule
from simpo_pipeline.storage.files import remove_tree
from simpo_pipeline.storage.paths import join

_logger = logging.getLogger("simpo_pipeline.executor")
_DEFAULT_POOL_SIZE = 64
_WAIT_LOG_SECONDS = 60.0


@dataclass(frozen=True)
class StepResult:
    """Outcome of one step of a run."""

    step_name: str
    action: str
    """RUN, SKIP or REPLAY if it succeeded; otherwise FAILED, DEP_FAILED, BLOCKED, WAIT, or NOT_RUN if the job ended."""
    seconds: float | None
    """Time spent in the step's function; None if it was not called."""
    output_path: str


class Rounds:
    """One run of a job, in one or more rounds."""

    def __init__(self, job: Job, order: Order, planner: Planner, max_concurrent: int | None, poll_seconds: float):
        self._job = job
        self._order = order
        self._planner = planner
        self._pool_size = max_concurrent or _DEFAULT_POOL_SIZE
        self._poll_seconds = poll_seconds
        self._needs = {step: [edge.step for edge in job.graph.needs(step)] for step in order.steps}
        self._everywhere = frozenset(step for step in order.steps if self._belongs_everywhere(step))
        self._in_caller = frozenset(step for step in order.steps if max_concurrent == 1 or self._needs_caller(step))
        self._decisions: dict[Step, Decision] = {}
        self._attempted: dict[Step, Decision] = {}
        self._seconds: dict[Step, float] = {}
        self._left_checkpoints: set[Step] = set()
        self._bad_endings: dict[Step, Ending] = {}
        self._errors: dict[Step, SimpoPipelineError] = {}

    def _needs_caller(self, step: Step) -> bool:
        """Return whether the step runs in the caller's thread.

        With several processes all steps do, because thread pools would finish them in different orders.
        """
        return step in self._everywhere or self._job.processes.process_count > 1

    def _belongs_everywhere(self, step: Step) -> bool:
        """Return whether every process calls the step's function: it takes its `StepRun`, or has live values."""
        uses_live = step in self._order.consumers or any(self._job.graph.live_inputs(step))
        return uses_live or takes_step_run(step)

    def run(self, on_plan: Callable[[tuple[PlanRow, ...]], None]) -> None:
        """Run until every step has ended, successfully or not.

        Args:
            on_plan: called with the first plan.

        Raises:
            SimpoPipelineError: the error of the first step that failed, once all steps that do not need it have ended.
        """
        waiting = True
        while waiting:
            first = not self._decisions
            self._decisions = self._planner.decide(self._failure_reasons(), self._job.live.held(), self._attempted)
            if first:
                on_plan(self.rows())
            self._release_live_values()
            endings = self._round()
            waited_for = [step for step, decision in self._decisions.items() if decision.action is Action.WAIT]
            waiting = bool(waited_for) or Ending.POSTPONED in endings.values()
            if waited_for and not {Ending.DONE, Ending.FAILED} & set(endings.values()):
                self._wait(waited_for)
            elif set(endings.values()) == {Ending.POSTPONED} and self._job.processes.is_leader:
                time.sleep(self._poll_seconds)  # another job holds the step, or is about to release it
        try:
            self._job.processes.leader_decides(self._clean_up)
        except SimpoPipelineError as error:
            if not self._errors:
                raise
            _logger.error("could not clean up after the run: %s", error)  # must not hide the error of a step
        self._raise_first_error()

    def _failure_reasons(self) -> dict[Step, str]:
        return {step: f"it failed in this job: {_first_line(error)}" for step, error in self._errors.items()}

    def _release_live_values(self) -> None:
        for step, decision in self._decisions.items():
            if decision.action in (Action.SKIP, Action.BLOCKED):
                self._job.live.consumer_ended(step, failed=False)

    def _round(self) -> dict[Step, Ending]:
        steps = self._attemptable()
        schedule = Schedule(steps, self._needs, self._order.implied, self._in_caller, self._attempt)
        return schedule.run(self._pass_over, self._pool_size, self._job.calls.interrupt)

    def _attemptable(self) -> list[Step]:
        """Return the steps that can be attempted without waiting for another job.

        A replay is included only if a step attempted in this round uses its live value.
        """
        behind_a_wait: set[Step] = set()
        for step, decision in self._decisions.items():
            waits_for = {*self._needs[step], *self._order.implied.get(step, ())}
            if decision.action is Action.WAIT or behind_a_wait & waits_for:
                behind_a_wait.add(step)
        attempted: dict[Step, None] = {}
        for step, decision in reversed(self._decisions.items()):
            used = any(consumer in attempted for consumer in self._order.consumers.get(step, ()))
            if step not in behind_a_wait and (
                decision.action is Action.RUN or (decision.action is Action.REPLAY and used)
            ):
                attempted[step] = None
        return list(reversed(attempted))

    def _attempt(self, step: Step) -> Ending:
        decision = self._decisions[step]
        _logger.info("%s %s: %s -> %s", decision.action, step.name, decision.reason, self._job.graph.output_paths[step])
        replaying = decision.action is Action.REPLAY
        consumers, everywhere = self._future_consumers(step), step in self._everywhere
        forced = self._planner.is_forced(step) and step not in self._attempted
        attempt = Attempt(
            self._job,
            step,
            self.rows(),
            consumers,
            replaying=replaying,
            everywhere=everywhere,
            forced=forced,
            is_used_live=step in self._order.consumers,
        )
        ending = attempt.execute()
        if ending is Ending.POSTPONED:
            _logger.info("%s is postponed: another job holds it", step.name)
            return ending
        self._attempted[step] = decision
        if attempt.left_checkpoints:
            self._left_checkpoints.add(step)
        self._seconds[step] = attempt.seconds
        if attempt.error is not None:
            self._errors[step] = attempt.error
            self._bad_endings[step] = ending
            _logger.error("%s FAILED after %.1f s: %s", step.name, attempt.seconds, attempt.error)
        else:
            _logger.info("%s succeeded after %.1f s", step.name, attempt.seconds)
        if any(self._job.graph.live_inputs(step)):
            self._job.live.consumer_ended(step, failed=ending is Ending.FAILED)
        return ending

    def _future_consumers(self, step: Step) -> list[Step]:
        coming = (Action.RUN, Action.REPLAY, Action.WAIT)
        return [
            consumer
            for consumer in self._order.consumers.get(step, ())
            if consumer in self._decisions
            and self._decisions[consumer].action in coming
            and consumer not in self._bad_endings
        ]

    def _pass_over(self, step: Step, ending: Ending) -> None:
        if ending is Ending.DEP_FAILED:
            self._bad_endings[step] = ending
            self._job.live.consumer_ended(step, failed=False)

    def _wait(self, waited_for: list[Step]) -> None:
        names = ", ".join(f"{step.name} ({self._decisions[step].reason})" for step in waited_for)
        last_logged = -_WAIT_LOG_SECONDS
        while not self._planner.anything_changed(waited_for):
            if time.monotonic() - last_logged > _WAIT_LOG_SECONDS:
                last_logged = time.monotonic()
                _logger.info("waiting for another job: %s", names)
            if self._job.processes.is_leader:
                time.sleep(self._poll_seconds)

    def _clean_up(self) -> None:
        for step, decision in self._decisions.items():
            failed_need = self._bad_endings.get(step) is Ending.DEP_FAILED or decision.action is Action.BLOCKED
            if failed_need and step not in self._errors and any(self._is_bad(need) for need in self._needs[step]):
                record_dep_failed(self._job, step)
        for step in self._planner.with_checkpoints | self._left_checkpoints:
            if all(self._is_done(other) for other in (step, *self._order.consumers.get(step, ()))):
                remove_unused_checkpoints(self._job.graph.output_paths[step], self._job.leases)
        lease = join(self._job.scratch_folder, LEASE_FILE)
        if self._job.leases.holds(lease):
            self._job.leases.release(lease)
            if not self._errors:
                remove_tree(self._job.scratch_folder)

    def _is_done(self, step: Step) -> bool:
        """Return whether the step's outputs are recorded, by this job or earlier."""
        if step in self._bad_endings or step not in self._decisions:
            return False
        return step in self._attempted or self._decisions[step].action in (Action.SKIP, Action.REPLAY)

    def _is_bad(self, step: Step) -> bool:
        blocked = step in self._decisions and self._decisions[step].action is Action.BLOCKED
        return blocked or step in self._bad_endings

    def _raise_first_error(self) -> None:
        error = next(iter(self._errors.values()), None)
        if error is not None:
            raise error
        for step, decision in self._decisions.items():
            if decision.action is Action.BLOCKED:
                raise StepFailedError(f"Step {step.name!r} is BLOCKED: {decision.reason}.")

    def rows(self) -> tuple[PlanRow, ...]:
        """Return the plan. Steps that were already attempted keep the row that they had at that time."""
        return self._planner.rows({step: self._attempted.get(step, now) for step, now in self._decisions.items()})

    def results(self) -> tuple[StepResult, ...]:
        """Return the outcome of each step so far."""
        return tuple(
            StepResult(
                step.name,
                self._result_of(step, row.action),
                self._seconds.get(step),
                row.output_path,
            )
            for step, row in zip(self._decisions, self.rows(), strict=True)
        )

    def _result_of(self, step: Step, planned: Action) -> str:
        if step in self._bad_endings:
            return self._bad_endings[step].name
        attempted = step in self._seconds or planned not in (Action.RUN, Action.REPLAY)
        return planned.value if attempted else "NOT_RUN"


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
