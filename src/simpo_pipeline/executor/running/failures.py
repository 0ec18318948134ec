"""Reports of how a step's function ended in each process, and the error message if it failed in some of them."""

import socket
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from simpo_pipeline.errors import PeerFailedError
from simpo_pipeline.executor.records.status import ERROR_FILE

_FAILURE_FIELDS = ("process_index", "host", "exception", "at", "traceback")


def report_end(process_index: int, error: Exception | None, live_digest: str | None) -> dict[str, Any]:
    """Return the report of one process's call: the error it raised, if any, or the digest of its live value."""
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
        traceback.clear_frames(error.__traceback__)  # its local variables would keep device memory alive
    return report


def failure_in(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a failed process's report that goes into the record of the failure."""
    return {name: report[name] for name in _FAILURE_FIELDS}


def sort_failures(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the reports of failed processes. Those that only stopped because another process failed come last."""
    failed = [dict(report) for report in reports if report["exception"] is not None]
    return sorted(failed, key=lambda report: report["followed"])


def describe_failure(
    step_name: str, first: Mapping[str, Any], process_count: int, output_path: str, lost: bool, cancelled: bool
) -> str:
    """Return the message for the user: where the step failed, why, and what to do.

    Args:
        step_name: the name of the step.
        first: the report of the first process that failed.
        process_count: the number of processes in the job.
        output_path: the path that the step wrote to.
        lost: whether the job lost the step's lease to another job.
        cancelled: whether the step was stopped because the job was interrupted.
    """
    where = host_and_process(first, process_count)
    at = f" (at {first['at']})" if first.get("at") else ""
    if lost:
        advice = "Another job now holds the step; start again to use its outputs."
    elif cancelled:
        advice = f"The files that it wrote are in {output_path}. Start again to run the step again."
    else:
        advice = f"The files that it wrote and {ERROR_FILE} are in {output_path}. Fix the cause and start again."
    return f"Step {step_name!r} failed on {where}: {first['exception']}{at}\n{advice}"


def host_and_process(failure: Mapping[str, Any], process_count: int) -> str:
    """Return the host and process of a failure, for use in a message."""
    return f"host {failure['host']} (process {failure['process_index']} of {process_count})"


def _line_of(error: BaseException) -> str | None:
    """Return the innermost line in an error's traceback that is not in an installed package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else None
