"""What the steps of one job share in their process besides live values: compiled programs and the tracker.

Both are made at first use, so a job in which every step is skipped touches no device and opens no run.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.tracking.tracker import NoTracker, Tracker

if TYPE_CHECKING:
    from simpo_pipeline.distributed.programs import Programs


class JobSession:
    """The per-job object that the executor passes through to every step as `run.session`."""

    def __init__(self, open_tracker: Callable[[], Tracker] = NoTracker) -> None:
        self._open_tracker = open_tracker

    @functools.cached_property
    def programs(self) -> "Programs":
        """The device programs of this process and their ledger; from the first use on, strays are forbidden."""
        # Imported here because planning, which makes a session too, must not import jax.
        from simpo_pipeline.distributed.programs import Programs, forbid_strays

        forbid_strays()
        return Programs()

    @functools.cached_property
    def tracker(self) -> Tracker:
        """Where metrics go besides the step outputs; one run per job."""
        return self._open_tracker()

    def close(self, error: BaseException | None) -> None:
        """Ends the tracker's run if one was opened; `error` is what ended the job, if anything did."""
        if "tracker" in self.__dict__:
            self.tracker.finish(error)


def session_of(run: StepRun) -> JobSession:
    """The session of a step run.

    Raises:
        ConfigError: the job was started without one.
    """
    if not isinstance(run.session, JobSession):
        raise ConfigError(
            f"step {run.name!r} needs a JobSession, got {type(run.session).__name__}; "
            "pass session=JobSession(...) to executor_main"
        )
    return run.session
