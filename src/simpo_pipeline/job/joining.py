"""Joining the other processes of the job, and leaving them after success or failure."""

import contextlib
import dataclasses
import os
import time
import traceback
from collections.abc import Generator
from typing import TYPE_CHECKING, NoReturn

from simpo_pipeline.distributed.config import find_membership
from simpo_pipeline.errors import CoordinationError
from simpo_pipeline.executor.main import usage_errors_reported
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.processes import Processes

if TYPE_CHECKING:
    from simpo_pipeline.distributed.group import ProcessGroup
    from simpo_pipeline.distributed.monitor import Monitor

# How long a failed process waits for the others to fail too, before it reports that it failed alone.
_COMMON_EXIT_SECONDS = 3.0
# The executor exits in all processes alike. The leader then closes its tracker, which may have much to upload.
_ORDERLY_EXIT_SECONDS = 120.0
# The leader's process runs the coordination service, so it exits a little later than the others.
_FAREWELL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class JoinedJob:
    """The job as seen by this process. Without a group, this process is the whole job."""

    processes: Processes
    group: "ProcessGroup | None" = None


@contextlib.contextmanager
def joined_job(flags: JobFlags) -> Generator[JoinedJob]:
    """Join the job that the environment describes, until the end of the `with` block.

    In a job with several processes, a process may then only launch `Program`s, and all processes end together. If the
    block raises, or a process is killed, frozen or stuck, every process is ended, bypassing jax's shutdown barrier. A
    dry run on one machine of a cluster does not wait for the others.
    """
    with usage_errors_reported():
        membership = find_membership(os.environ)
    if membership is None or (flags.dry_run and membership.coordinator_address is None):
        yield JoinedJob(Processes())
        return
    # Imported here because planning in a job of one process must not import jax.
    from simpo_pipeline.distributed.coordination import JaxCoordination, join, leave
    from simpo_pipeline.distributed.group import ProcessGroup
    from simpo_pipeline.distributed.monitor import Monitor
    from simpo_pipeline.distributed.programs import forbid_strays

    index, count = join(membership)
    coordination = JaxCoordination()
    group = ProcessGroup(coordination, index, count, flags.watch)
    monitor = Monitor(group, coordination, flags.watch)
    forbid_strays()
    monitor.start()
    processes = Processes(index, count, agree=group.agree, gather=group.gather, watch=group)
    try:
        yield JoinedJob(processes, group)
        group.step_ended("the end of the job")
    except BaseException as error:
        _leave_with(error, group, monitor)
    monitor.stop()
    leave()


def _leave_with(error: BaseException, group: "ProcessGroup", monitor: "Monitor") -> NoReturn:
    """End this process together with the others if they fail too; otherwise report the failure to them first."""
    from simpo_pipeline.distributed.monitor import end_process

    orderly = isinstance(error, SystemExit)
    if not orderly:
        traceback.print_exception(error)
    if _all_leave(group, _ORDERLY_EXIT_SECONDS if orderly else _COMMON_EXIT_SECONDS):
        monitor.stop()
        if group.index == 0:
            time.sleep(_FAREWELL_SECONDS)
    else:
        monitor.leave(f"{type(error).__name__}: {error.__cause__ or error}")
        monitor.stop()
    end_process(exit_code_of(error))


def exit_code_of(error: BaseException) -> int:
    """Return the exit code that Python would use for this error."""
    match error:
        case SystemExit(code=None):
            return 0
        case SystemExit(code=int(code)):
            return code
        case KeyboardInterrupt():
            return 130
        case _:
            return 1


def _all_leave(group: "ProcessGroup", timeout_seconds: float) -> bool:
    try:
        return group.barrier("leaving", timeout_seconds)
    except CoordinationError:
        return False
