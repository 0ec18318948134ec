"""The gcloud commands of a launch, and what their answers mean."""

import dataclasses
import json
from typing import Any, cast

from launcher.clock import Clock
from launcher.commands import Commands, Done
from launcher.errors import CommandFailed
from launcher.options import Place, TpuOptions

_CAPACITY_FLAGS = {
    "on-demand": (),
    "spot": ("--spot",),
    "reserved": ("--reserved",),
    "best-effort": ("--best-effort",),
}
# Only the alpha commands know these.
_ALPHA_CAPACITIES = ("best-effort",)
# Google Cloud's passing troubles, as gcloud words them.
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL:", "503", "502", "Connection reset", "Remote end closed")
_LOOKS = 5
# A host that is taken does not say goodbye: ssh has to notice by itself, within a minute.
_SSH_OPTIONS = ("ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=4")
_SSH_FLAGS = tuple(f"--ssh-flag=-o{option}" for option in _SSH_OPTIONS)
_ADVICE = {
    "RESOURCE_EXHAUSTED": "The project's quota for these chips is used up or zero: see step 2 of infra/README.md.",
    "Quota": "The project's quota for these chips is used up or zero: see step 2 of infra/README.md.",
    "PERMISSION_DENIED": "The account may not do this: see step 1 of infra/README.md, and `gcloud auth list`.",
    "SERVICE_DISABLED": "Enable the API: `gcloud services enable tpu.googleapis.com` (infra/README.md, step 1).",
    "active account": "Log in with `gcloud auth login`.",
    "Reauthentication": "Log in again with `gcloud auth login`.",
    "is not found in zone": "The zone has no such TPU: `gcloud compute tpus accelerator-types list --zone ZONE`.",
}


@dataclasses.dataclass(frozen=True)
class Node:
    """A TPU VM, as Google Cloud describes it."""

    state: str
    health: str
    accelerator_type: str
    hosts: int

    @property
    def is_healthy(self) -> bool:
        """Whether jobs can run on it."""
        return self.state == "READY" and self.health in ("", "HEALTH_UNSPECIFIED", "HEALTHY")


@dataclasses.dataclass(frozen=True)
class QueuedResource:
    """A request for a TPU, which lives on beside the TPU that it led to."""

    state: str
    reason: str


def advice_for(text: str) -> str:
    """What a user can do about an error of gcloud; "" if nothing is known."""
    return next((advice for sign, advice in _ADVICE.items() if sign in text), "")


def require(done: Done) -> Done:
    """The command's result, if it succeeded.

    Raises:
        CommandFailed: it did not.
    """
    if done.code != 0:
        raise CommandFailed(done.argv, done.code, done.err or done.out, advice_for(done.err))
    return done


class Gcloud:
    """Everything that a launch asks of Google Cloud about one TPU."""

    def __init__(self, commands: Commands, place: Place, clock: Clock, poll_seconds: float) -> None:
        self._commands = commands
        self._place = place
        self._clock = clock
        self._poll_seconds = poll_seconds
        self._where = ("--zone", place.zone, "--project", place.project)

    def node(self) -> Node | None:
        """The TPU VM; None if there is none of that name."""
        found = self._described("tpu-vm")
        if found is None:
            return None
        kind = str(found.get("acceleratorType", "")).rpartition("/")[2]
        endpoints = cast(list[object], found.get("networkEndpoints", []))
        return Node(str(found.get("state", "")), str(found.get("health", "")), kind, len(endpoints))

    def queued_resource(self) -> QueuedResource | None:
        """The request; None if there is none of that name."""
        found = self._described("queued-resources")
        if found is None:
            return None
        state = cast(dict[str, Any], found.get("state", {}))
        error = state.get("failedData", {}).get("error", {})
        return QueuedResource(str(state.get("state", "")), str(error.get("message", "")))

    def create(self, tpu: TpuOptions) -> None:
        """Asks for the TPU; returns when the request stands in the queue."""
        track = ("alpha",) if tpu.capacity in _ALPHA_CAPACITIES else ()
        name = self._place.tpu_name
        argv = ["gcloud", *track, "compute", "tpus", "queued-resources", "create", name, "--node-id", name]
        argv += [*self._where, "--accelerator-type", tpu.tpu_type.name, "--runtime-version", tpu.runtime_version]
        argv += ["--scopes", "https://www.googleapis.com/auth/cloud-platform"]
        argv += ["--service-account", tpu.service_account] if tpu.service_account else []
        argv += [*_CAPACITY_FLAGS[tpu.capacity], "--quiet"]
        done = self._commands.run(argv)
        # A request repeated after a lost answer finds itself.
        if done.code != 0 and "ALREADY_EXISTS" not in done.err:
            require(done)

    def delete_queued_resource(self) -> None:
        """Removes the request and, with --force, the TPU; returns when both are gone."""
        self._delete("queued-resources", "--force")

    def delete_node(self) -> None:
        """Removes a TPU that no request stands behind; returns when it is gone."""
        self._delete("tpu-vm")

    def ssh(self, host: int, script: str) -> list[str]:
        """The command that runs a shell script on a host."""
        name = self._place.tpu_name
        argv = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, *self._where, "--worker", str(host)]
        return [*argv, *_SSH_FLAGS, "--quiet", "--command", script]

    def _described(self, kind: str) -> dict[str, Any] | None:
        argv = ["gcloud", "compute", "tpus", kind, "describe", self._place.tpu_name, *self._where, "--format", "json"]
        done = self._commands.run(argv)
        for _ in range(_LOOKS):
            if done.code == 0 or not any(sign in done.err for sign in _PASSING):
                break
            self._clock.sleep(self._poll_seconds)
            done = self._commands.run(argv)
        if done.code != 0 and "NOT_FOUND" in done.err:
            return None
        return cast(dict[str, Any], json.loads(require(done).out))

    def _delete(self, kind: str, *flags: str) -> None:
        argv = ["gcloud", "compute", "tpus", kind, "delete", self._place.tpu_name, *self._where, *flags, "--quiet"]
        done = self._commands.run(argv)
        if done.code != 0 and "NOT_FOUND" not in done.err:
            require(done)


def config_value(commands: Commands, name: str) -> str:
    """A setting of gcloud such as compute/zone; "" if it is not set."""
    done = require(commands.run(["gcloud", "config", "get-value", name, "--quiet"]))
    value = done.out.strip()
    return "" if value == "(unset)" else value
