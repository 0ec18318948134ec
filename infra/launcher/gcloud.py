"""The gcloud commands of a launch, and the interpretation of their output."""

import dataclasses
import json
from typing import Any, cast

from launcher.clock import Clock
from launcher.commands import CommandResult, Commands, run_with_retries
from launcher.errors import CommandFailed
from launcher.options import TpuLocation, TpuOptions

_CAPACITY_FLAGS = {
    "on-demand": (),
    "spot": ("--spot",),
    "reserved": ("--reserved",),
    "best-effort": ("--best-effort",),
}
# Only the alpha commands support these.
_ALPHA_CAPACITIES = ("best-effort",)
# Transient errors of Google Cloud, as gcloud words them.
_TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL:", "503", "502", "Connection reset", "Remote end closed")
# A preempted host does not close its connections: ssh has to detect the loss by itself, within a minute.
_SSH_OPTIONS = ("ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=4")
_SSH_FLAGS = tuple(f"--ssh-flag=-o{option}" for option in _SSH_OPTIONS)
_ADVICE = {
    "RESOURCE_EXHAUSTED": "The project's quota for these chips is used up or zero; see step 2 of infra/README.md.",
    "Quota": "The project's quota for these chips is used up or zero; see step 2 of infra/README.md.",
    "PERMISSION_DENIED": "The account lacks the permission; see step 1 of infra/README.md, and `gcloud auth list`.",
    "SERVICE_DISABLED": "Enable the API: `gcloud services enable tpu.googleapis.com` (infra/README.md, step 1).",
    "active account": "Log in with `gcloud auth login`.",
    "Reauthentication": "Log in again with `gcloud auth login`.",
    "is not found in zone": "The zone lacks this type; see `gcloud compute tpus accelerator-types list --zone ZONE`.",
}


@dataclasses.dataclass(frozen=True)
class Node:
    """A TPU VM as described by Google Cloud."""

    state: str
    health: str
    accelerator_type: str
    hosts: int

    @property
    def is_healthy(self) -> bool:
        """Whether jobs can run on the TPU."""
        return self.state == "READY" and self.health in ("", "HEALTH_UNSPECIFIED", "HEALTHY")


@dataclasses.dataclass(frozen=True)
class QueuedResource:
    """A request for a TPU. It continues to exist after the TPU is created."""

    state: str
    reason: str


def advice_for(text: str) -> str:
    """Return advice for the user on an error of gcloud; "" if there is none."""
    return next((advice for sign, advice in _ADVICE.items() if sign in text), "")


def require(done: CommandResult) -> CommandResult:
    """Return the command's result if it succeeded.

    Raises:
        CommandFailed: the command failed.
    """
    if done.code != 0:
        raise CommandFailed(done.argv, done.code, done.err or done.out, advice_for(done.err))
    return done


class Gcloud:
    """The gcloud commands for one TPU."""

    def __init__(self, commands: Commands, place: TpuLocation, clock: Clock, poll_seconds: float) -> None:
        self._commands = commands
        self._place = place
        self._clock = clock
        self._poll_seconds = poll_seconds
        self._where = ("--zone", place.zone, "--project", place.project)

    def node(self) -> Node | None:
        """Return the TPU VM, or None if it does not exist."""
        found = self._describe("tpu-vm")
        if found is None:
            return None
        kind = str(found.get("acceleratorType", "")).rpartition("/")[2]
        endpoints = cast(list[object], found.get("networkEndpoints", []))
        return Node(str(found.get("state", "")), str(found.get("health", "")), kind, len(endpoints))

    def queued_resource(self) -> QueuedResource | None:
        """Return the queued resource, or None if it does not exist."""
        found = self._describe("queued-resources")
        if found is None:
            return None
        state = cast(dict[str, Any], found.get("state", {}))
        error = state.get("failedData", {}).get("error", {})
        return QueuedResource(str(state.get("state", "")), str(error.get("message", "")))

    def create(self, tpu: TpuOptions) -> None:
        """Request the TPU. Returns when the request is in the queue."""
        track = ("alpha",) if tpu.capacity in _ALPHA_CAPACITIES else ()
        name = self._place.tpu_name
        argv = ["gcloud", *track, "compute", "tpus", "queued-resources", "create", name, "--node-id", name]
        argv += [*self._where, "--accelerator-type", tpu.tpu_type.name, "--runtime-version", tpu.runtime_version]
        argv += ["--scopes", "https://www.googleapis.com/auth/cloud-platform"]
        argv += ["--service-account", tpu.service_account] if tpu.service_account else []
        argv += [*_CAPACITY_FLAGS[tpu.capacity], "--quiet"]
        done = self._commands.run(argv)
        # A request that is repeated after a lost response finds the first one.
        if done.code != 0 and "ALREADY_EXISTS" not in done.err:
            require(done)

    def delete_queued_resource(self) -> None:
        """Delete the queued resource and, with --force, its TPU. Returns when both are gone."""
        self._delete("queued-resources", "--force")

    def delete_node(self) -> None:
        """Delete a TPU that has no queued resource. Returns when it is gone."""
        self._delete("tpu-vm")

    def ssh(self, host: int, script: str) -> list[str]:
        """Return the command that runs a shell script on a host."""
        name = self._place.tpu_name
        argv = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, *self._where, "--worker", str(host)]
        return [*argv, *_SSH_FLAGS, "--quiet", "--command", script]

    def _describe(self, kind: str) -> dict[str, Any] | None:
        argv = ["gcloud", "compute", "tpus", kind, "describe", self._place.tpu_name, *self._where, "--format", "json"]
        done = run_with_retries(self._commands, argv, _TRANSIENT, self._clock, self._poll_seconds)
        if done.code != 0 and "NOT_FOUND" in done.err:
            return None
        return cast(dict[str, Any], json.loads(require(done).out))

    def _delete(self, kind: str, *flags: str) -> None:
        argv = ["gcloud", "compute", "tpus", kind, "delete", self._place.tpu_name, *self._where, *flags, "--quiet"]
        done = self._commands.run(argv)
        if done.code != 0 and "NOT_FOUND" not in done.err:
            require(done)


def config_value(commands: Commands, name: str) -> str:
    """Return a setting of gcloud, such as compute/zone; "" if it is not set."""
    done = require(commands.run(["gcloud", "config", "get-value", name, "--quiet"]))
    value = done.out.strip()
    return "" if value == "(unset)" else value
