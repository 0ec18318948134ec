"""The tracker interface: a tracker records numbers that are already on the host.

A tracker never does device work. It rejects anything but Python numbers. No tracker can therefore copy a value from a
device, or start a program there, unnoticed by the caller and on one host only. The choice of tracker never changes the
results of a job.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.json_text import json_text

Metrics = Mapping[str, int | float]
Summary = Mapping[str, int | float | str]


@runtime_checkable
class Tracker(Protocol):
    """The record of one job outside its step outputs. The leader owns it and calls it from one thread."""

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Record numbers for `step` (finished updates); steps may come in any order, and none is dropped.

        Raises:
            DataError: a value is not a finite Python number; the message names it.
        """
        ...

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Record rows of generated text for `step`.

        Raises:
            DataError: a row holds NaN, an infinity, or something else that JSON does not have; the message names it.
        """
        ...

    def summary(self, values: Summary) -> None:
        """Record final values of the job; later values replace earlier ones with the same name.

        Raises:
            DataError: as for `log_samples`.
        """
        ...

    def finish(self, error: BaseException | None = None) -> None:
        """Finish the record, as failed if `error` ended the job; further calls do nothing."""
        ...


class NoTracker:
    """A tracker that records nothing.

    It rejects what the other trackers reject. A job therefore does not start to fail when a tracker is turned on.
    """

    def log(self, metrics: Metrics, *, step: int) -> None:
        """See Tracker.log."""
        check_metrics(metrics)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """See Tracker.log_samples."""
        check_json({"samples": list(rows)})

    def summary(self, values: Summary) -> None:
        """See Tracker.summary."""
        check_json({"summary": dict(values)})

    def finish(self, error: BaseException | None = None) -> None:
        """See Tracker.finish."""


def check_json(record: Mapping[str, Any]) -> None:
    """Reject a record that is not JSON.

    Raises:
        DataError: the record holds NaN, an infinity, or something else that JSON does not have; the message names it.
    """
    json_text(dict(record), "the tracker")


def check_metrics(metrics: Mapping[str, object]) -> None:
    """Reject metrics that are not finite Python numbers.

    Raises:
        DataError: a value has another type, or is NaN or infinite; the message names it.
    """
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(
                f"metric {name!r} is {type(value).__module__}.{type(value).__qualname__}, expected a Python int or "
                f"float; convert it where it is computed, on every host, before it is logged"
            )
        if not math.isfinite(value):
            raise DataError(
                f"metric {name!r} is {value}, but metrics must be finite; find out why the computation gave it, on "
                "every host: something before it has diverged"
            )
