"""How a step's function ended in one process, and what is said when it failed in some of them."""

import socket
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from simpo_pipeline.errors import PeerFailedError
from simpo_pipeline.executor.records.status import ERROR_FILE

_FAILURE_FIELDS = ("process_index", "host", "exception", "at", "traceback")


def report_end(process_index: int, error: Exception | None, live_digest: str | None) -> dict[str, Any]:
    """What a process tells the others of its call: the error it ended with, if any, or its live value's digest."""
    report = {
        "process_index": process_index,
        "host": socket.gethostname(),
        "exception": None,
        "at": None,
        "traceback": None,
        "followed": isinstance(error, PeerFailedError),
        "live_digest": live_digest,
    }
    if error is not None:
        report["exception"] = f"{type(error).__name__}: {error}"
        report["at"] = _line_of(error)
        report["traceback"] = "".join(traceback.format_exception(error))
        traceback.clear_frames(error.__traceback__)  # its locals would keep device memory alive
    return report


def failure_in(report: Mapping[str, Any]) -> dict[str, Any]:
    """What of the report of a failed process goes into the record of the failure."""
    return {name: report[name] for name in _FAILURE_FIELDS}


def sort_failures(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The reports of those that failed; who merely stopped because another failed is not the first."""
    failed = [dict(report) for report in reports if report["exception"] is not None]
    return sorted(failed, key=lambda report: report["followed"])


def describe_failure(step_name: str, first: Mapping[str, Any], process_count: int, output_path: str, lost: bool) -> str:
    """What the user is told: where the step failed, why, and what to do. `lost`: it lost its lease to another job."""
    where = place_of(first, process_count)
    at = f" (at {first['at']})" if first.get("at") else ""
    advice = (
        "Another job has the step now; start again to use what that one makes."
        if lost
        else f"What it wrote and {ERROR_FILE} are in {output_path}. Repair the cause and start again."
    )
    return f"Step {step_name!r} failed on {where}: {first['exception']}{at}\n{advice}"


def place_of(failure: Mapping[str, Any], process_count: int) -> str:
    """The host and process of a failure, for a message."""
    return f"host {failure['host']} (process {failure['process_index']} of {process_count})"


def _line_of(error: BaseException) -> str | None:
    """The innermost line of code in an error's traceback that is not an installed package's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else None
