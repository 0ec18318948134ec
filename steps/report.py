"""Step `report`: writes one page about the whole run, as Markdown and as self-contained HTML."""

import dataclasses

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import imported_step, unwrap_versioned_value


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Outputs to report on.

    Attributes:
        title: Heading of the page.
        train_outputs: Outputs of `train` steps, in the order of their updates.
        infer_outputs: Outputs of `infer` steps.
        num_samples: Number of generated samples to show per `infer` step, spaced evenly over its rows.
    """

    title: str
    train_outputs: tuple[str, ...] = ()
    infer_outputs: tuple[str, ...] = ()
    num_samples: int = 8

    def __post_init__(self) -> None:
        num_samples = unwrap_versioned_value(self.num_samples)
        if num_samples < 0:
            raise ConfigError(f"num_samples is {num_samples}; expected at least 0")


report = imported_step("steps.bodies.report.report", module=__name__, takes=("run",))
"""Write `report.html`, `report.md` and `summary.json`. Only the leader writes."""
