"""A tracker that writes to Weights & Biases, online or offline according to the user's settings and WANDB_MODE.

wandb drops values that are logged under a step lower than its own counter. The tracker therefore does not set that
counter. It logs steps as ordinary values (`train/step` for everything named `train/...`) and declares them as x-axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.tracking.tracker import Metrics, Summary, check_json, check_metrics

_SAMPLES = "samples"


class WandbTracker:
    """One wandb run for one job.

    `dir` is the folder for wandb's files; None means WANDB_DIR, or the working directory if that is not set. `config`
    holds the settings that wandb shows for the run.

    Raises:
        ConfigError: wandb cannot open the run, for instance because no user is logged in.
    """

    def __init__(
        self, *, project: str, name: str, dir: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        import wandb  # imported here because it takes a second and only this tracker needs it

        self._wandb = wandb
        try:
            # With create_new, a run that the caller may already have open is left alone.
            self._run = wandb.init(project=project, name=name, dir=dir, config=dict(config or {}), reinit="create_new")
        except wandb.Error as error:
            raise ConfigError(
                f"wandb could not open a run in project {project!r}: {error} Run `wandb login`, or set "
                f"WANDB_MODE=offline, or choose another tracker (jsonl, none)"
            ) from error
        self._declared: set[str] = set()
        self._finished = False

    def log(self, metrics: Metrics, *, step: int) -> None:
        """See Tracker.log."""
        check_metrics(metrics)
        axes = {self._axis_of(name): step for name in metrics}
        self._run.log({**axes, **metrics})

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """See Tracker.log_samples."""
        check_json({"samples": list(rows)})
        columns: list[Any] = list(dict.fromkeys(name for row in rows for name in row))
        table = self._wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
        name = f"{_SAMPLES}/rows"
        self._run.log({self._axis_of(name): step, name: table})

    def summary(self, values: Summary) -> None:
        """See Tracker.summary."""
        check_json({"summary": dict(values)})
        self._run.summary.update(dict(values))

    def finish(self, error: BaseException | None = None) -> None:
        """See Tracker.finish."""
        if self._finished:
            return
        self._finished = True
        if error is not None:
            self._run.summary.update({"error": f"{type(error).__name__}: {error}"})
        exit_code = 0 if error is None else 1
        self._run.finish(exit_code=exit_code)
        # finish() leaves the last writes to wandb's own process. Only teardown() waits for them, and a job that exits
        # through os._exit would lose them. teardown() ends all runs of this process, so it is skipped while the caller
        # has one.
        if self._wandb.run is None:
            self._wandb.teardown(exit_code=exit_code)

    def _axis_of(self, name: str) -> str:
        """Return the metric with the steps of `name`, which is declared as its x-axis at first use."""
        group, slash, _ = name.partition("/")
        axis, members = (f"{group}/step", f"{group}/*") if slash else ("step", name)
        if members not in self._declared:
            self._declared.add(members)
            self._run.define_metric(axis)
            self._run.define_metric(members, step_metric=axis)
        return axis
