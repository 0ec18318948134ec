"""Selection of a tracker by name."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.tracking.jsonl import JsonlTracker
from simpo_pipeline.tracking.tracker import NoTracker, Tracker
from simpo_pipeline.tracking.wandb import WandbTracker

TrackerKind = Literal["wandb", "jsonl", "none"]


def make_tracker(
    kind: str,
    *,
    jsonl_path: str,
    project: str,
    run_name: str,
    config: Mapping[str, Any] | None = None,
    wandb_dir: str | None = None,
) -> Tracker:
    """Open the tracker called `kind`; each kind uses only the other arguments it needs.

    Raises:
        ConfigError: there is no tracker of that name, or wandb cannot open a run.
    """
    if kind == "wandb":
        return WandbTracker(project=project, name=run_name, dir=wandb_dir, config=config)
    if kind == "jsonl":
        return JsonlTracker(jsonl_path)
    if kind == "none":
        return NoTracker()
    raise ConfigError(f"tracker {kind!r} is unknown; choose one of {', '.join(get_args(TrackerKind))}")
