"""A tracker that writes JSON lines to one file.

Each line has `kind` (`metrics`, `samples`, `summary` or `finish`) and `time` (seconds since 1970).
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from simpo_pipeline.storage.jsonl import JsonlWriter
from simpo_pipeline.tracking.tracker import Metrics, Summary, check_metrics


class JsonlTracker:
    """Writes the record of a job to `path` (local or any fsspec URL), replacing any existing file."""

    def __init__(self, path: str) -> None:
        self._writer = JsonlWriter(path)
        self._finished = False

    def log(self, metrics: Metrics, *, step: int) -> None:
        """See Tracker.log."""
        check_metrics(metrics)
        self._write("metrics", step=step, metrics=dict(metrics))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """See Tracker.log_samples."""
        self._write("samples", step=step, rows=[dict(row) for row in rows])
        self._writer.flush()

    def summary(self, values: Summary) -> None:
        """See Tracker.summary."""
        self._write("summary", values=dict(values))

    def finish(self, error: BaseException | None = None) -> None:
        """See Tracker.finish."""
        if self._finished:
            return
        self._finished = True
        if error is None:
            self._write("finish", state="finished")
        else:
            self._write("finish", state="failed", error=f"{type(error).__name__}: {error}")
        self._writer.close()

    def _write(self, kind: str, **fields: Any) -> None:
        self._writer.write({"kind": kind, "time": time.time(), **fields})
