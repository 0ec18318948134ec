"""What every tracker does: take numbers the host already holds, and put them somewhere.

A tracker never does device work. It refuses anything but Python numbers, so that no tracker can pull a value from a
device, or start a program there, behind the caller's back and on one host only. The choice of tracker never changes
what a job computes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from simpo_pipeline.errors import DataError

Metrics = Mapping[str, int | float]
Summary = Mapping[str, int | float | str]


@runtime_checkable
class Tracker(Protocol):
    """The record of one job outside its step outputs. The leader owns it and calls it from one thread."""

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Record numbers that belong to `step` (finished updates); steps may come in any order, none is dropped.

        Raises:
            DataError: a value is not a Python number; it is named.
        """
        ...

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Record rows of generated text that belong to `step`."""
        ...

    def summary(self, values: Summary) -> None:
        """Record final figures of the job; later values replace earlier ones of the same name."""
        ...

    def finish(self, error: BaseException | None = None) -> None:
        """End the record, as failed if `error` ended the job; further calls do nothing."""
        ...


class NoTracker:
    """Records nothing, but refuses what the others refuse, so that a job does not fail only once it is tracked."""

    def log(self, metrics: Metrics, *, step: int) -> None:
        """See Tracker.log."""
        check_numbers(metrics)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """See Tracker.log_samples."""

    def summary(self, values: Summary) -> None:
        """See Tracker.summary."""

    def finish(self, error: BaseException | None = None) -> None:
        """See Tracker.finish."""


def check_numbers(metrics: Mapping[str, object]) -> None:
    """Refuse a metric that is not a Python number.

    Raises:
        DataError: a value is of another type; it is named.
    """
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(
                f"metric {name!r} is {type(value).__module__}.{type(value).__qualname__}, expected a Python int or "
                f"float; convert it where it is computed, on every host, before it is logged"
            )
