"""Flags of every experiment: those of the executor and those of a job."""

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from simpo_pipeline.distributed.config import OFF, WatchConfig, compilation_cache_path
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.main import ExecutorMainConfig
from simpo_pipeline.job.session import JobSession
from simpo_pipeline.tracking.factory import TrackerKind
from simpo_pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from simpo_pipeline.distributed.group import ProcessGroup


@dataclasses.dataclass(frozen=True)
class JobFlags(ExecutorMainConfig):
    """Flags of the executor and of a job with any number of processes."""

    tracker: TrackerKind | None = None
    """Where metrics go in addition to the step outputs: wandb, jsonl or none. The experiment sets the default."""
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    """Timeouts after which the processes of a job end it."""
    check_launches: bool = False
    """Compare every launch across processes before it happens, instead of shortly after."""
    profile: int | None = None
    """Trace this update, counted over the whole run. The trace is written to `profile` in its step's outputs."""
    compilation_cache: str | None = None
    """Where compiled programs are cached for later jobs: a folder, gs://bucket/path, or off. Default:
    JAX_COMPILATION_CACHE_DIR, or ~/.cache/simpo_pipeline/compiled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None and self.profile < 1:
            raise ConfigError(f"--profile is {self.profile}; updates are counted from 1, so give at least 1")
        compilation_cache_path(self.compilation_cache, os.environ)

    def job_session(self, open_tracker: Callable[[], Tracker], group: "ProcessGroup | None") -> JobSession:
        """Return the session of a job with these flags."""
        return JobSession(
            open_tracker,
            group,
            check_launches=self.check_launches,
            profile=self.profile,
            compilation_cache=compilation_cache_path(self.compilation_cache, os.environ) or OFF,
        )
