"""The kubectl commands of a launch, and the interpretation of their output."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

from launcher.clock import Clock
from launcher.commands import CommandResult, Commands, run_with_retries
from launcher.errors import CommandFailed
from launcher.gcloud import require
from launcher.host_job import HostState
from launcher.jobset import secret_name

_JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
_ATTEMPT_LABEL = "jobset.sigs.k8s.io/restart-attempt"
_HOST_LABEL = "batch.kubernetes.io/job-completion-index"
_TRANSIENT = ("connection refused", "i/o timeout", "TLS handshake timeout", "ServiceUnavailable", "EOF", "etcdserver")
_ADVICE = {
    'no matches for kind "JobSet"': "The cluster lacks JobSet; see the GKE section of infra/README.md.",
    "Forbidden": "The account lacks the permission in the namespace; see the GKE section of infra/README.md.",
    "connection refused": "kubectl is not connected to a cluster; give --cluster NAME --zone LOCATION.",
    "current-context is not set": "kubectl is not connected to a cluster; give --cluster NAME --zone LOCATION.",
}


@dataclasses.dataclass(frozen=True)
class JobSet:
    """A JobSet as described by the cluster. `end` is Completed, Failed or ""."""

    uid: str
    hosts: int
    end: str
    reason: str
    restarts: int
    is_suspended: bool


@dataclasses.dataclass(frozen=True)
class Pod:
    """One host of a JobSet in one attempt."""

    name: str
    host: int
    phase: str
    exit_code: int | None
    is_out_of_memory: bool
    ended: str
    waiting_for: str

    @property
    def host_state(self) -> HostState:
        """The state of the pod as a host of the job."""
        if self.exit_code is not None:
            return HostState("exited", self.exit_code, self.is_out_of_memory, self.ended)
        if self.phase == "Failed":
            return HostState("evicted", 137)
        return HostState("running")


class Kubectl:
    """The kubectl commands in one namespace of a cluster."""

    def __init__(self, commands: Commands, namespace: str, clock: Clock, poll_seconds: float) -> None:
        self._commands = commands
        self._clock = clock
        self._poll_seconds = poll_seconds
        self._base = ("kubectl", "--namespace", namespace)

    def jobset(self, name: str) -> JobSet | None:
        """Return the JobSet, or None if it does not exist."""
        done = self._run_with_retries("get", "jobset", name, "--output", "json")
        if done.code != 0 and "NotFound" in done.err:
            return None
        return _jobset(json.loads(_require(done).out))

    def pods(self, name: str, attempt: int) -> list[Pod]:
        """Return the pods of one attempt, sorted by host."""
        selector = f"{_JOBSET_LABEL}={name},{_ATTEMPT_LABEL}={attempt}"
        done = _require(self._run_with_retries("get", "pods", "--selector", selector, "--output", "json"))
        items = cast(list[dict[str, Any]], json.loads(done.out).get("items", []))
        return sorted((_pod(item) for item in items), key=lambda pod: pod.host)

    def create(self, manifest: Mapping[str, Any], about: str) -> None:
        """Create an object from the manifest. `about` describes it where the command is only printed."""
        text = json.dumps(manifest).encode()
        _require(self._commands.run([*self._base, "create", "--filename", "-"], text, about))

    def delete(self, name: str) -> None:
        """Delete a JobSet with its pods and its Secret, and wait until they are gone."""
        how = ["--ignore-not-found", "--cascade=foreground", "--wait=true"]
        # The Secret is deleted by name: of the objects that a JobSet owns, its deletion waits only for the pods.
        for kind, named in (("jobset", name), ("secret", secret_name(name))):
            _require(self._commands.run([*self._base, "delete", kind, named, *how]))

    def logs(self, pod: str, follow: bool) -> list[str]:
        """Return the command that prints a pod's lines from the first one on."""
        return [*self._base, "logs", pod, "--container", "job", *(["--follow"] if follow else [])]

    def _run_with_retries(self, *words: str) -> CommandResult:
        return run_with_retries(self._commands, [*self._base, *words], _TRANSIENT, self._clock, self._poll_seconds)


def _require(done: CommandResult) -> CommandResult:
    if done.code != 0:
        advice = next((advice for sign, advice in _ADVICE.items() if sign in done.err), "")
        raise CommandFailed(done.argv, done.code, done.err, advice)
    return require(done)


def _jobset(found: dict[str, Any]) -> JobSet:
    status = cast(dict[str, Any], found.get("status", {}))
    conditions = cast(list[dict[str, Any]], status.get("conditions", []))
    ended = [c for c in conditions if c.get("type") in ("Completed", "Failed") and c.get("status") == "True"]
    end = str(ended[0]["type"]) if ended else ""
    reason = str(ended[0].get("message", "")) if ended else ""
    spec = found["spec"]
    hosts = int(spec["replicatedJobs"][0]["template"]["spec"]["parallelism"])
    is_suspended = bool(spec.get("suspend", False))
    return JobSet(str(found["metadata"]["uid"]), hosts, end, reason, int(status.get("restarts", 0)), is_suspended)


def _pod(found: dict[str, Any]) -> Pod:
    metadata, status = found["metadata"], found.get("status", {})
    statuses = cast(list[dict[str, Any]], status.get("containerStatuses", []))
    state = cast(dict[str, Any], statuses[0].get("state", {})) if statuses else {}
    ended = cast(dict[str, Any], state.get("terminated", {}))
    waiting = cast(dict[str, Any], state.get("waiting", {}))
    return Pod(
        name=str(metadata["name"]),
        host=int({**metadata.get("annotations", {}), **metadata.get("labels", {})}[_HOST_LABEL]),
        phase=str(status.get("phase", "Pending")),
        exit_code=int(ended["exitCode"]) if "exitCode" in ended else None,
        is_out_of_memory=ended.get("reason") == "OOMKilled",
        ended=str(ended.get("finishedAt", "")).removesuffix("Z"),
        waiting_for=str(waiting.get("reason", "")),
    )
