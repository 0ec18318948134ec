"""A tracker that writes to Weights & Biases, online or offline as the user's settings and WANDB_MODE say.

wandb drops what is logged under a step lower than its own counter. That counter is therefore left alone: the steps
travel as ordinary values, `train/step` for everything named `train/...`, and are declared as the x-axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.tracking.tracker import Metrics, Summary, check_numbers

_SAMPLES = "samples"


class WandbTracker:
    """One wandb run for one job.

    `dir` is where wandb keeps its files (None: WANDB_DIR, else the working directory), `config` what its page shows as
    the run's settings.

    Raises:
        ConfigError: wandb cannot open the run, for instance because nobody is logged in.
    """

    def __init__(
        self, *, project: str, name: str, dir: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        import wandb  # here, because it takes a second and only this tracker needs it

        self._wandb = wandb
        try:
            # create_new: a run the caller may have open already stays his own.
            self._run = wandb.init(project=project, name=name, dir=dir, config=dict(config or {}), reinit="create_new")
        except wandb.Error as error:
            raise ConfigError(
                f"wandb could not open a run of project {project!r}: {error} Run `wandb login`, or set "
                f"WANDB_MODE=offline, or choose another tracker (jsonl, none)"
            ) from error
        self._declared: set[str] = set()
        self._finished = False

    def log(self, metrics: Metrics, *, step: int) -> None:
        """See Tracker.log."""
        check_numbers(metrics)
        axes = {self._axis_of(name): step for name in metrics}
        self._run.log({**axes, **metrics})

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """See Tracker.log_samples."""
        columns: list[Any] = list(dict.fromkeys(name for row in rows for name in row))
        table = self._wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
        name = f"{_SAMPLES}/rows"
        self._run.log({self._axis_of(name): step, name: table})

    def summary(self, values: Summary) -> None:
        """See Tracker.summary."""
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
        # finish() hands the end to wandb's own process; only teardown() waits until that has written everything, which
        # a job that leaves by os._exit would lose. It ends all runs of this process, so not while the caller has one.
        if self._wandb.run is None:
            self._wandb.teardown(exit_code=exit_code)

    def _axis_of(self, name: str) -> str:
        """Return the metric that holds the steps of `name`, declared as its x-axis at first use."""
        group, slash, _ = name.partition("/")
        axis, members = (f"{group}/step", f"{group}/*") if slash else ("step", name)
        if members not in self._declared:
            self._declared.add(members)
            self._run.define_metric(axis)
            self._run.define_metric(members, step_metric=axis)
        return axis
