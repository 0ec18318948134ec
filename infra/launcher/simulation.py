"""Simulated command output for a dry run: everything succeeds, and nothing existed before."""

import json
from collections.abc import Sequence
from typing import Any

from launcher.commands import CommandResult
from launcher.options import TpuOptions


def _succeeded(argv: Sequence[str], out: str = "") -> CommandResult:
    return CommandResult(tuple(argv), 0, out, "")


def _not_found(argv: Sequence[str]) -> CommandResult:
    # As kubectl and as gcloud word it.
    return CommandResult(tuple(argv), 1, "", "NotFound" if argv[0] == "kubectl" else "NOT_FOUND")


class SimulatedTpu:
    """A simulated TPU that does not exist until it is requested, and whose job then exits with code 0."""

    def __init__(self, tpu: TpuOptions | None = None) -> None:
        self._tpu = tpu
        self._is_there = tpu is None

    def answer(self, argv: Sequence[str]) -> CommandResult:
        """Return the simulated result of a gcloud or docker command."""
        if "images" in argv:
            return _not_found(argv)
        if "create" in argv:
            self._is_there = True
        if "describe" in argv:
            return _succeeded(argv, self._description(argv)) if self._is_there else _not_found(argv)
        return _succeeded(argv, _host_answer(argv[-1]) if "ssh" in argv else "")

    def _description(self, argv: Sequence[str]) -> str:
        if "queued-resources" in argv:
            return '{"state": {"state": "ACTIVE"}}'
        hosts = 1 if self._tpu is None else self._tpu.tpu_type.hosts
        kind = "" if self._tpu is None else self._tpu.tpu_type.name
        return json.dumps(
            {"state": "READY", "health": "HEALTHY", "acceleratorType": kind, "networkEndpoints": ["host"] * hosts}
        )


def _host_answer(script: str) -> str:
    if "@launch state" in script:
        return "@launch state exited 0 false\n"
    if "@launch current" in script:
        return "@launch current JOB docker\n"
    return ""


class SimulatedCluster:
    """A simulated cluster in which a JobSet starts as soon as it is created, and exits with code 0."""

    def __init__(self, name: str, hosts: int, is_there: bool = False) -> None:
        self._name = name
        self._hosts = hosts
        self._is_there = is_there
        self._has_ended = False

    def answer(self, argv: Sequence[str]) -> CommandResult:
        """Return the simulated result of a kubectl, gcloud or docker command."""
        if "images" in argv:
            return _not_found(argv)
        if "create" in argv:
            self._is_there = True
        if "logs" in argv:
            self._has_ended = True
        if "get" in argv and "jobset" in argv:
            return _succeeded(argv, json.dumps(self._jobset())) if self._is_there else _not_found(argv)
        if "get" in argv and "pods" in argv:
            return _succeeded(argv, json.dumps({"items": [self._pod(host) for host in range(self._hosts)]}))
        return _succeeded(argv)

    def _jobset(self) -> dict[str, Any]:
        conditions = [{"type": "Completed", "status": "True"}] if self._has_ended else []
        slice_job = {"template": {"spec": {"parallelism": self._hosts}}}
        return {
            "metadata": {"uid": "UID"},
            "spec": {"replicatedJobs": [slice_job]},
            "status": {"conditions": conditions},
        }

    def _pod(self, host: int) -> dict[str, Any]:
        labels = {"batch.kubernetes.io/job-completion-index": str(host)}
        return {"metadata": {"name": f"{self._name}-slice-0-{host}", "labels": labels}, "status": {"phase": "Running"}}
