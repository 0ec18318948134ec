"""Verdicts: when a job has to be stopped from outside its main threads, and which process to blame.

All functions are pure functions of what the leader knows. A job is stopped in these cases:

gone       a process left because of its own error, or was not heard from for a while: it was killed or is frozen
failed     a process failed, and the others do not reach the end of the step: they wait for it in a collective
diverged   two processes launched different programs, or one reached a meeting where the other launched a program
stalled    a process makes no progress
"""

import dataclasses
from collections.abc import Mapping, Sequence

from simpo_pipeline.distributed.config import WatchConfig
from simpo_pipeline.distributed.group import describe_divergence
from simpo_pipeline.distributed.ledger import Event, first_divergence
from simpo_pipeline.distributed.standing import StatusReport
from simpo_pipeline.processes import Failure

# A process whose last report came less than this after another's failure is considered to have gone first.
_SAME_MOMENT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The reason why the job stops.

    Attributes:
        process_index: The process to blame, or the first one if there are several.
        message: Description of that process and of what it did.
        dump: Whether the stacks of all threads give more information.
        failure: The failure that the process itself reported, if any.
    """

    process_index: int
    message: str
    dump: bool
    failure: Failure | None = None


@dataclasses.dataclass(frozen=True)
class ProcessState:
    """The leader's knowledge of one process.

    Attributes:
        report: Its last report; None before the first.
        silent_seconds: Time since that report, or since the start.
        failed_seconds: Time since it was first seen to have failed in the current step; None if it has not failed.
        events: Events of the current page, except the first `num_equal`, which are equal in all processes.
        num_equal: Number of events that were compared before.
    """

    report: StatusReport | None
    silent_seconds: float
    failed_seconds: float | None
    events: Sequence[Event]
    num_equal: int = 0


def judge(known: Sequence[ProcessState], config: WatchConfig) -> Verdict | None:
    """Return the verdict if the job has to be stopped, otherwise None."""
    count = len(known)
    reports = {index: process.report for index, process in enumerate(known) if process.report is not None}
    for find in (_left, _silent, _failed, _diverged, _stalled):
        verdict = find(known, reports, config, count)
        if verdict is not None:
            return verdict
    return None


def _left(
    known: Sequence[ProcessState], reports: Mapping[int, StatusReport], config: WatchConfig, count: int
) -> Verdict | None:
    del known, config
    for index, report in reports.items():
        if report.leaving:
            return Verdict(index, f"{report.describe(index, count)} left the job: {report.leaving}", False)
    return None


def _silent(
    known: Sequence[ProcessState], reports: Mapping[int, StatusReport], config: WatchConfig, count: int
) -> Verdict | None:
    longest_failed = max((process.failed_seconds or 0.0 for process in known), default=0.0)
    for index, process in enumerate(known):
        silent, report = process.silent_seconds, reports.get(index)
        # A killed process breaks the others' collectives, which fail immediately. The silent process still went first.
        went_first = longest_failed > config.grace_seconds and silent > longest_failed - _SAME_MOMENT_SECONDS
        if silent > config.silence_seconds or (went_first and process.failed_seconds is None):
            who = report.describe(index, count) if report is not None else f"process {index} of {count}"
            last = f". It was last in {report.phase!r}" if report is not None else ""
            return Verdict(
                index, f"{who} has not been heard from for {silent:.0f} s: it was killed, or is frozen{last}", False
            )
    return None


def _failed(
    known: Sequence[ProcessState], reports: Mapping[int, StatusReport], config: WatchConfig, count: int
) -> Verdict | None:
    failed = [
        (-process.failed_seconds, index) for index, process in enumerate(known) if process.failed_seconds is not None
    ]
    if not failed or -min(failed)[0] <= config.grace_seconds:
        return None
    _, index = min(failed)
    report = reports[index]
    assert report.failure is not None, "a failed process must report its failure"
    at = f" (at {report.failure['at']})" if report.failure.get("at") else ""
    return Verdict(
        index,
        f"{report.describe(index, count)} failed in {report.phase!r}: {report.failure['exception']}{at}. The others "
        f"did not reach the end of the step within {config.grace_seconds:.0f} s",
        False,
        report.failure,
    )


def _diverged(
    known: Sequence[ProcessState], reports: Mapping[int, StatusReport], config: WatchConfig, count: int
) -> Verdict | None:
    del config
    pages = {report.page for report in reports.values()}
    if len(reports) < count or len(pages) > 1 or any(report.failure for report in reports.values()):
        return None
    divergence = first_divergence([process.events for process in known])
    if divergence is None:
        return None
    position, events = divergence
    identities = [event.identity for event in events if event is not None]
    rarest = min(identities, key=identities.count)
    culprit = next(index for index, event in enumerate(events) if event is not None and event.identity == rarest)
    message = describe_divergence(reports[culprit].phase, known[0].num_equal + position, events)
    # If the processes split into two halves, neither can be called wrong.
    if identities.count(rarest) * 2 < len(identities):
        message = f"{reports[culprit].describe(culprit, count)} differs from most processes: {message}"
    return Verdict(culprit, message, True)


def _stalled(
    known: Sequence[ProcessState], reports: Mapping[int, StatusReport], config: WatchConfig, count: int
) -> Verdict | None:
    del known, config
    stalled = [index for index, report in reports.items() if report.stalled]
    if not stalled:
        return None
    # A process that waits, at a meeting or in a collective, has done more than the process that it waits for.
    moving = [index for index, report in reports.items() if report.waiting is None]
    behind = min((reports[index].page, reports[index].num_events) for index in moving)
    culprits = [index for index in moving if (reports[index].page, reports[index].num_events) == behind]
    names = "; ".join(
        f"{reports[index].describe(index, count)} in {reports[index].phase!r} for {reports[index].idle_seconds:.0f} s"
        for index in culprits
    )
    return Verdict(culprits[0], f"no progress: {names}. The stacks of all threads are in its log", True)
