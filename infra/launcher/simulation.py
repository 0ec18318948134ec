"""Simulated command output for a dry run: everything succeeds, and nothing existed before."""

import json
from collections.abc import Sequence
from typing import Any

from launcher.commands import CommandResult
from launcher.options import TpuOptions


class SimulatedTpu:
    """A simulated TPU that does not exist until it is requested, and whose job then exits with code 0."""

    def __init__(self, tpu: TpuOptions | None = None) -> None:
        self._tpu = tpu
        self._is_there = tpu is None

    def answer(self, argv: Sequence[str]) -> CommandResult:
        """Return the simulated result of a gcloud or docker command."""
        words = tuple(argv)
        if "images" in words:
            return CommandResult(words, 1, "", "NOT_FOUND")
        if "create" in words:
            self._is_there = True
        if "describe" in words:
            return self._describe(words)
        if "ssh" in words:
            return CommandResult(words, 0, _host_answer(words[-1]), "")
        return CommandResult(words, 0, "", "")

    def _describe(self, words: tuple[str, ...]) -> CommandResult:
        if not self._is_there:
            return CommandResult(words, 1, "", "NOT_FOUND")
        if "queued-resources" in words:
            return CommandResult(words, 0, '{"state": {"state": "ACTIVE"}}', "")
        hosts = 1 if self._tpu is None else self._tpu.tpu_type.hosts
        kind = "" if self._tpu is None else self._tpu.tpu_type.name
        node = {"state": "READY", "health": "HEALTHY", "acceleratorType": kind, "networkEndpoints": ["host"] * hosts}
        return CommandResult(words, 0, json.dumps(node), "")


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
        words = tuple(argv)
        if "images" in words:
            return CommandResult(words, 1, "", "NOT_FOUND")
        if "create" in words:
            self._is_there = True
        if "logs" in words:
            self._has_ended = True
        if "get" in words and "jobset" in words:
            return (
                CommandResult(words, 0, json.dumps(self._jobset()), "")
                if self._is_there
                else CommandResult(words, 1, "", "NotFound")
            )
        if "get" in words and "pods" in words:
            return CommandResult(words, 0, json.dumps({"items": [self._pod(host) for host in range(self._hosts)]}), "")
        return CommandResult(words, 0, "", "")

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
