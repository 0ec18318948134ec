"""Joining the other processes of the job, and leaving them, well or not."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Generator
from typing import TYPE_CHECKING, NoReturn

from simpo_pipeline.distributed.config import WatchConfig, find_membership
from simpo_pipeline.errors import ConfigError, CoordinationError
from simpo_pipeline.executor.processes import Processes

if TYPE_CHECKING:
    from simpo_pipeline.distributed.coordination import Coordination
    from simpo_pipeline.distributed.group import ProcessGroup
    from simpo_pipeline.distributed.monitor import Monitor

# How long a process that fails waits for the others to fail alike before it accuses itself.
_COMMON_EXIT_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class JoinedJob:
    """This process's place in the job; without a group it is the whole job."""

    processes: Processes
    group: "ProcessGroup | None" = None


@contextlib.contextmanager
def joined_job(watch: WatchConfig) -> Generator[JoinedJob]:
    """Joins the job that the environment names, for as long as the block runs.

    From then on a process of many may only launch `Program`s, and all of them end together: when the block raises, or
    a process is killed, frozen or stuck, the job is ended in every process, past jax's shutdown barrier.
    """
    try:
        membership = find_membership(os.environ)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if membership is None:
        yield JoinedJob(Processes())
        return
    # Imported here because planning in a job of one process must not import jax.
    from simpo_pipeline.distributed.coordination import JaxCoordination, join, leave
    from simpo_pipeline.distributed.group import ProcessGroup
    from simpo_pipeline.distributed.monitor import Monitor
    from simpo_pipeline.distributed.programs import forbid_strays

    index, count = join(membership)
    coordination = JaxCoordination()
    group = ProcessGroup(coordination, index, count, watch)
    monitor = Monitor(group, coordination, watch)
    forbid_strays()
    monitor.start()
    processes = Processes(index, count, agree=group.agree, gather=group.gather, watch=group)
    try:
        yield JoinedJob(processes, group)
        group.gather("done")
    except BaseException as error:
        _leave_with(error, coordination, monitor, is_leader=index == 0)
    monitor.stop()
    leave()


def _leave_with(error: BaseException, coordination: "Coordination", monitor: "Monitor", *, is_leader: bool) -> NoReturn:
    """Ends this process with the others if they end alike, else tells them of it first."""
    from simpo_pipeline.distributed.monitor import end_process

    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        traceback.print_exception(error)
    if not _all_leave(coordination):
        monitor.leave(f"{type(error).__name__}: {error}")
    elif not is_leader:
        end_process(code)
    monitor.stop()  # the leader's process is the coordination service, so it goes last
    end_process(code)


def _all_leave(coordination: "Coordination") -> bool:
    try:
        return coordination.barrier("leaving", _COMMON_EXIT_SECONDS)
    except CoordinationError:
        return False
