"""What the steps of one job share in their process besides live values: compiled programs and the tracker.

Both are made at first use, so a job in which every step is skipped touches no device and opens no run.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from simpo_pipeline.distributed.config import OFF, WatchConfig, compilation_cache_path
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.main import ExecutorMainConfig
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.storage.files import make_parent
from simpo_pipeline.storage.paths import is_local, join
from simpo_pipeline.tracking.factory import TrackerKind, make_tracker
from simpo_pipeline.tracking.tracker import NoTracker, Tracker

logger = logging.getLogger(f"simpo_pipeline.{__name__}")

if TYPE_CHECKING:
    from simpo_pipeline.distributed.compilation_cache import CompilationCache
    from simpo_pipeline.distributed.group import ProcessGroup
    from simpo_pipeline.distributed.programs import Programs


class JobSession:
    """The per-job object that the executor passes through to every step as `run.session`."""

    def __init__(
        self,
        open_tracker: Callable[[], Tracker] = NoTracker,
        group: "ProcessGroup | None" = None,
        *,
        check_launches: bool = False,
        profile: int | None = None,
        compilation_cache: str | None = None,
    ) -> None:
        """`group` is None in a job of one process; for `check_launches` see `Programs`, for `profile` `JobFlags`.

        `compilation_cache` is a folder, a URL or `off`; None leaves jax as it is configured, but for
        programs that span processes, which are not cached then.
        """
        self._open_tracker = open_tracker
        self._group = group
        self._check_launches = check_launches
        self._compilation_cache = compilation_cache
        self._cache: CompilationCache | None = None
        self._closing = contextlib.ExitStack()
        self.profile = profile
        self.has_profiled = False
        """Whether the update to be profiled has run."""

    @functools.cached_property
    def programs(self) -> "Programs":
        """The device programs of this process and their ledger; from the first use on, strays are forbidden."""
        # Imported here because planning, which makes a session too, must not import jax.
        from simpo_pipeline.distributed.compilation_cache import opened_cache
        from simpo_pipeline.distributed.programs import Programs, forbid_strays

        forbid_strays()
        if self._compilation_cache is not None:
            path = None if self._compilation_cache == OFF else self._compilation_cache
            self._cache = self._closing.enter_context(opened_cache(path))
        return Programs(self._group, check_launches=self._check_launches, cache=self._cache)

    @functools.cached_property
    def tracker(self) -> Tracker:
        """Where metrics go besides the step outputs; one run per job."""
        return self._open_tracker()

    def close(self, error: BaseException | None) -> None:
        """Ends what was begun: tracker, compilation cache, ban on strays. `error` is what ended the job, if any did.

        Says so when the update to be profiled did not run, for its step was done already.

        A process of many stays under the ban, which it joined the job with, and says what it launched: its peers must
        have launched the same.
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
            # Imported already, by `programs`.
            from simpo_pipeline.distributed.programs import allow_strays

            allow_strays()
        if self.profile is not None and not self.has_profiled and error is None:
            logger.warning("--profile %d: this job did not run that update, so there is no trace", self.profile)
        if "tracker" in self.__dict__:
            self.tracker.finish(error)


@dataclasses.dataclass(frozen=True)
class JobFlags(ExecutorMainConfig):
    """The executor's flags, and those of a job of many processes."""

    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    """When the processes of a job give it up."""
    check_launches: bool = False
    """Compare every launch across processes before it is made, instead of soon after."""
    profile: int | None = None
    """Trace this update, counted over the whole run, into `profile` below its training step's outputs."""
    compilation_cache: str | None = None
    """Where compiled programs are kept for later jobs: a folder, gs://bucket/path, or off. Default:
    JAX_COMPILATION_CACHE_DIR, or ~/.cache/simpo_pipeline/compiled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None and self.profile < 1:
            raise ConfigError(f"--profile {self.profile}: updates are counted from 1")
        compilation_cache_path(self.compilation_cache, os.environ)

    def job_session(self, open_tracker: Callable[[], Tracker], group: "ProcessGroup | None") -> JobSession:
        """The session of a job with these flags."""
        return JobSession(
            open_tracker,
            group,
            check_launches=self.check_launches,
            profile=self.profile,
            compilation_cache=compilation_cache_path(self.compilation_cache, os.environ) or OFF,
        )


def tracker_for(kind: TrackerKind, config: ExecutorMainConfig, *, name: str, project: str) -> Callable[[], Tracker]:
    """Opens the job's tracker when it is called; files go below `{prefix}/tracking/`.

    Args:
        kind: `wandb`, `jsonl` or `none`.
        config: The job's flags.
        name: What the run is called; the time of its start is added.
        project: wandb's project.
    """

    def open_tracker() -> Tracker:
        run_name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = join(config.effective_prefix, "tracking")
        # wandb writes local files only; beside a remote prefix it uses its own default.
        wandb_dir = None
        if kind == "wandb" and is_local(folder):
            make_parent(join(folder, run_name))
            wandb_dir = folder
        path = join(folder, f"{run_name}.jsonl")
        return make_tracker(kind, jsonl_path=path, project=project, run_name=run_name, wandb_dir=wandb_dir)

    return open_tracker


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
