"""State that the steps of a job share in their process, besides live values: compiled programs and the tracker.

Both are created at first use, so a job that skips every step touches no device and opens no tracker run.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from simpo_pipeline.distributed.config import OFF
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.tracking.tracker import NoTracker, Tracker

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from simpo_pipeline.distributed.compilation_cache import CompilationCache
    from simpo_pipeline.distributed.group import ProcessGroup
    from simpo_pipeline.distributed.programs import Programs


class JobSession:
    """Session of a job, which the executor passes to every step as `run.session`."""

    def __init__(
        self,
        open_tracker: Callable[[], Tracker] = NoTracker,
        group: "ProcessGroup | None" = None,
        *,
        check_launches: bool = False,
        profile: int | None = None,
        compilation_cache: str | None = None,
    ) -> None:
        """Create a session.

        Args:
            open_tracker: Opens the tracker at its first use.
            group: The process group; None in a job of one process.
            check_launches: See `Programs`.
            profile: See `JobFlags`.
            compilation_cache: A folder, a URL or `off`. None keeps jax's own configuration, except that programs that
                span processes are not cached.
        """
        self._open_tracker = open_tracker
        self._group = group
        self._check_launches = check_launches
        self._compilation_cache = compilation_cache
        self._cache: CompilationCache | None = None
        self._closing = contextlib.ExitStack()
        self.profile = profile
        self.has_profiled = False
        """Whether the update to profile has run."""

    @functools.cached_property
    def programs(self) -> "Programs":
        """The device programs of this process and their ledger. The first use forbids stray executions."""
        # Imported here because planning, which also creates a session, must not import jax.
        from simpo_pipeline.distributed.compilation_cache import opened_cache
        from simpo_pipeline.distributed.programs import Programs, forbid_strays

        forbid_strays()
        if self._compilation_cache is not None:
            path = None if self._compilation_cache == OFF else self._compilation_cache
            self._cache = self._closing.enter_context(opened_cache(path))
        return Programs(self._group, check_launches=self._check_launches, cache=self._cache)

    @functools.cached_property
    def tracker(self) -> Tracker:
        """The tracker of the job, which gets metrics in addition to the step outputs; one run per job."""
        return self._open_tracker()

    def close(self, error: BaseException | None) -> None:
        """Close the tracker and the compilation cache, and allow stray executions again.

        In a job of several processes, strays stay forbidden, as they were before the session, and the launches are
        counted and logged: they must be the same in all processes. A warning is logged if the update to profile did not
        run because its step was already done.

        Args:
            error: The exception that ended the job; None if it succeeded.
        """
        if "programs" in self.__dict__ and self._group is not None:
            ledger = self._group.ledger
            spanning = len(ledger.multi_process_launches)
            logger.info(
                "launched %d programs over many processes (ledger %s) and %d on this process's own devices",
                *(spanning, ledger.digest()[:12], len(ledger.launches) - spanning),
            )
        self._closing.close()
        is_leader = self._group is None or self._group.index == 0
        if self._cache is not None and self._cache.counts.requests > 0 and is_leader:
            logger.info("%s", self._cache.summary())
        if "programs" in self.__dict__ and self._group is None:
            # Already imported by `programs`.
            from simpo_pipeline.distributed.programs import allow_strays

            allow_strays()
        if self.profile is not None and not self.has_profiled and error is None:
            logger.warning("--profile %d: this job did not run that update, so there is no trace", self.profile)
        if "tracker" in self.__dict__:
            self.tracker.finish(error)


def session_of(run: StepRun) -> JobSession:
    """Return the session of a step run.

    Raises:
        ConfigError: The job was started without a session.
    """
    if not isinstance(run.session, JobSession):
        raise ConfigError(
            f"step {run.name!r} needs a JobSession, but its session is {type(run.session).__name__}. Replace "
            "executor_main with main(steps=...) of simpo_pipeline.job.main, or pass it session=JobSession(...)."
        )
    return run.session
