"""`main`, which runs an experiment in one call."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.main import executor_main, parse_main_config
from simpo_pipeline.executor.records.provenance import script_name
from simpo_pipeline.executor.step import ExecutorStep, InputName
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.joining import joined_job
from simpo_pipeline.storage.files import make_parent
from simpo_pipeline.storage.paths import is_local, join
from simpo_pipeline.tracking.factory import TrackerKind, make_tracker
from simpo_pipeline.tracking.tracker import Tracker


@dataclasses.dataclass(frozen=True)
class TrackerChoice:
    """Where an experiment's metrics go in addition to the step outputs; `--tracker` overrides the kind.

    Attributes:
        kind: `wandb`, `jsonl` or `none`.
        name: Name of the run; its start time is appended. Default: the name of the script.
        project: The wandb project.
    """

    kind: str = "jsonl"
    name: str | None = None
    project: str = "simpo-pipeline"

    def __post_init__(self) -> None:
        if self.kind not in get_args(TrackerKind):
            raise ConfigError(f"the tracker is {self.kind!r}; expected one of {', '.join(get_args(TrackerKind))}")


def main(
    flags: JobFlags | None = None,
    *,
    steps: Sequence[ExecutorStep[Any] | InputName],
    description: str | None = None,
    tracker: TrackerChoice | None = None,
) -> None:
    """Run an experiment: read its flags, join the other processes of the job, and plan and run its steps.

    The steps of all processes share live values, compiled programs and one tracker. The script exits with the codes of
    `executor_main`.

    Args:
        flags: Flags of an experiment that parses its own. None: parse them from the command line.
        steps: The DAG. Steps that these depend on are included automatically.
        description: One line for the records.
        tracker: Where metrics go if `--tracker` is not given; None: to a JSONL file.
    """
    flags = flags if flags is not None else parse_main_config(JobFlags)
    open_tracker = _tracker_opener(flags, tracker or TrackerChoice())
    with joined_job(flags) as job:
        executor_main(
            flags,
            steps=steps,
            description=description,
            session=flags.job_session(open_tracker, job.group),
            processes=job.processes,
        )


def _tracker_opener(flags: JobFlags, choice: TrackerChoice) -> Callable[[], Tracker]:
    """Return a function that opens the job's tracker, with its files below `{prefix}/tracking/`."""
    kind = flags.tracker or choice.kind

    def open_tracker() -> Tracker:
        run_name = f"{choice.name or script_name()}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = join(flags.effective_prefix, "tracking")
        # wandb only writes local files; with a remote prefix, it uses its own default folder.
        wandb_dir = None
        if kind == "wandb" and is_local(folder):
            make_parent(join(folder, run_name))
            wandb_dir = folder
        path = join(folder, f"{run_name}.jsonl")
        return make_tracker(kind, jsonl_path=path, project=choice.project, run_name=run_name, wandb_dir=wandb_dir)

    return open_tracker
