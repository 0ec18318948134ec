"""A job on GKE: creates a JobSet and follows it. The cluster handles queueing and restarts."""

import dataclasses
import json
from collections.abc import Iterator

from launcher.commands import Commands, Stream
from launcher.errors import Busy, JobFailed, LaunchError, TpuGone, TpuLost
from launcher.host_job import HostState
from launcher.jobset import jobset_manifest, secret_manifest
from launcher.kubectl import JobSet, Kubectl, Pod
from launcher.options import GkeOptions, JobOptions
from launcher.outcome import HostResult
from launcher.tools import LaunchContext

# Waiting reasons from which a container does not recover.
_FATAL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerError", "RunContainerError")


class PodFeed:
    """A feed of a pod's lines and state, read with kubectl."""

    def __init__(self, pod: Pod, name: str, attempt: int, kubectl: Kubectl, commands: Commands) -> None:
        self._pod = pod
        self._jobset = name
        self._attempt = attempt
        self._kubectl = kubectl
        self._commands = commands
        self._stream: Stream | None = None

    @property
    def host(self) -> int:
        return self._pod.host

    def lines(self, first: int, follow: bool = True) -> Iterator[tuple[int, str]]:
        self._stream = self._commands.open(self._kubectl.logs(self._pod.name, follow))
        for number, line in enumerate(self._stream.lines(), start=1):
            if number >= first and (line.endswith("\n") or self._has_ended()):
                yield number, line.rstrip("\n")

    def state(self) -> HostState | None:
        try:
            pods = self._kubectl.pods(self._jobset, self._attempt)
        except LaunchError:
            return None
        return next((pod.host_state for pod in pods if pod.name == self._pod.name), HostState("evicted", 137))

    @property
    def was_cut(self) -> bool:
        return self._stream is None or not self._stream.has_succeeded

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _has_ended(self) -> bool:
        """Return whether a line without a newline is the last one, rather than cut off with the connection."""
        state = self.state()
        return state is not None and not state.is_running


@dataclasses.dataclass(frozen=True)
class GkeJob:
    """The JobSet of a job, with the job's name."""

    name: str
    namespace: str
    kubectl: Kubectl
    tools: LaunchContext

    def start(self, gke: GkeOptions, job: JobOptions, image: str) -> None:
        """Create the JobSet. A finished JobSet of the same name is replaced.

        Raises:
            Busy: the JobSet is already queued or running.
        """
        there = self.kubectl.jobset(self.name)
        if there is not None and not there.end:
            raise Busy(
                f"the JobSet {self.name} already exists ({_status_text(there)}). Follow it: "
                f"{self._command('logs --foreground')}\nor stop it: {self._command('stop')}"
            )
        if there is not None:
            self.tools.console.say(
                f"The JobSet {self.name} is left over from an earlier launch ({_status_text(there)}): "
                "deleting and re-creating it."
            )
            self._save_logs(there)
            self.kubectl.delete(self.name)
        manifest = jobset_manifest(gke, job, image)
        self.kubectl.create(manifest, json.dumps(manifest))
        made = self.kubectl.jobset(self.name)
        if made is None:
            raise TpuGone(f"the JobSet {self.name} was deleted by someone right after it was created")
        names = ", ".join(sorted(job.environment))
        try:
            self.kubectl.create(secret_manifest(job, made.uid), f"(a Secret with the values of {names})")
        except LaunchError:
            # Without the Secret, its pods would occupy their TPUs and wait.
            self.kubectl.delete(self.name)
            raise

    def follow(self) -> None:
        """Follow the JobSet through all its attempts.

        Raises:
            JobFailed: the job failed.
            TpuGone: the JobSet was deleted.
        """
        last: HostResult | None = None
        while True:
            jobset = self._wait_for_pods()
            hosts, attempt = jobset.hosts, jobset.restarts
            pods = self.kubectl.pods(self.name, attempt)
            if pods:
                last = self._follow_pods(pods, attempt) or last
            jobset = self._wait_for_verdict(attempt)
            if jobset.end == "Completed":
                self.tools.tell_success()
                return
            if jobset.end == "Failed":
                description = "" if last is None else f"\n{last.told(hosts)}"
                code = last.state.exit_code if last is not None and last.state is not None else 0
                raise JobFailed(f"Job failed: {jobset.reason}{description}", code or 1)
            self.tools.console.complain(f"Attempt {attempt + 1} was lost; JobSet restarts the job.")

    def print_lines(self) -> None:
        """Print the output so far of the pods of the last attempt."""
        jobset = self._require_jobset()
        for pod in self.kubectl.pods(self.name, jobset.restarts):
            feed = PodFeed(pod, self.name, jobset.restarts, self.kubectl, self.tools.commands)
            for _, line in feed.lines(1, follow=False):
                self.tools.console.say(f"[host {pod.host}] {line}")

    def status(self) -> None:
        """Print the state of the JobSet and of its pods."""
        jobset = self.kubectl.jobset(self.name)
        if jobset is None:
            self.tools.console.say(f"JobSet {self.name}: not found in namespace {self.namespace}.")
            return
        self.tools.console.say(f"JobSet   {self.name}, {_status_text(jobset)}, {jobset.restarts} restarts")
        for pod in self.kubectl.pods(self.name, jobset.restarts):
            code = "" if pod.exit_code is None else f", exit code {pod.exit_code}"
            waiting = f" ({pod.waiting_for})" if pod.waiting_for else ""
            self.tools.console.say(f"host {pod.host}   {pod.name}: {pod.phase}{waiting}{code}")

    def delete(self) -> None:
        """Delete the JobSet, its pods and its Secret. The output of the pods is kept on this machine."""
        jobset = self.kubectl.jobset(self.name)
        if jobset is not None:
            self._save_logs(jobset)
        self.kubectl.delete(self.name)
        self.tools.console.say(f"The JobSet {self.name} is deleted. Its node pool is billed as long as it has nodes.")

    def interrupted(self) -> None:
        """Ask after Ctrl-C whether to delete the JobSet too."""
        if self.tools.console.confirm(f"Delete the JobSet {self.name} too?"):
            self.delete()
        else:
            self.tools.console.say("The job keeps running.")
            self.tell_how_to_follow()

    def tell_how_to_follow(self) -> None:
        """Print the commands to follow, inspect and delete the JobSet."""
        self.tools.console.say(
            f"The JobSet {self.name} is created. Kueue starts it when there is room. It keeps running without this "
            "terminal.\n"
            f"    follow: {self._command('logs --foreground')}\n"
            f"    status: {self._command('status')}\n"
            f"    delete: {self._command('clean')}"
        )

    def _require_jobset(self) -> JobSet:
        jobset = self.kubectl.jobset(self.name)
        if jobset is None:
            raise TpuGone(f"there is no JobSet {self.name} in namespace {self.namespace}")
        return jobset

    def _wait_for_pods(self) -> JobSet:
        """Wait until all pods of an attempt have started, or the JobSet has finished."""
        last_printed = ""
        deadline = float("inf")
        while True:
            jobset = self._require_jobset()
            hosts = jobset.hosts
            pods = self.kubectl.pods(self.name, jobset.restarts)
            started = [pod for pod in pods if pod.phase in ("Running", "Succeeded", "Failed")]
            if jobset.end or len(started) >= hosts:
                return jobset
            self._raise_if_stuck(pods)
            state = f"{_status_text(jobset)}, {len(started)} of {hosts} pods have started"
            if last_printed != (last_printed := state):
                self.tools.console.say(f"JobSet {self.name}: {state}")
            if jobset.is_suspended or not pods:
                deadline = float("inf")
            elif deadline == float("inf"):
                deadline = self.tools.clock.now() + self.tools.timing.start
            if self.tools.clock.now() >= deadline:
                raise TpuLost(
                    f"JobSet {self.name}: {state}, {self.tools.timing.start:.0f} s after Kueue admitted it. See "
                    f"`kubectl --namespace {self.namespace} describe pods --selector simpo-launch={self.name}`"
                )
            self.tools.clock.sleep(self.tools.timing.poll)

    def _raise_if_stuck(self, pods: list[Pod]) -> None:
        for pod in pods:
            if pod.waiting_for in _FATAL_REASONS:
                raise LaunchError(
                    f"pod {pod.name} cannot start: {pod.waiting_for}. Can the node's service account read the image? "
                    f"`kubectl --namespace {self.namespace} describe pod {pod.name}` shows more; then "
                    f"{self._command('stop')}"
                )

    def _wait_for_verdict(self, attempt: int) -> JobSet:
        jobset = self._require_jobset()
        while not jobset.end and jobset.restarts == attempt:
            self.tools.clock.sleep(self.tools.timing.poll)
            jobset = self._require_jobset()
        return jobset

    def _follow_pods(self, pods: list[Pod], attempt: int) -> HostResult | None:
        tools = self.tools
        feeds = [PodFeed(pod, self.name, attempt, self.kubectl, tools.commands) for pod in pods]
        return tools.follow(feeds, tools.logs / self.name / f"attempt_{attempt + 1}")

    def _save_logs(self, jobset: JobSet) -> None:
        for pod in self.kubectl.pods(self.name, jobset.restarts):
            done = self.tools.commands.run(self.kubectl.logs(pod.name, follow=False)).out
            path = self.tools.logs / self.name / f"{pod.name}.log"
            if done and not self.tools.is_dry:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self.tools.console.masked(done))

    def _command(self, subcommand: str) -> str:
        return f"python infra/launch.py {subcommand} --backend gke --run_id {self.name} --namespace {self.namespace}"


def _status_text(jobset: JobSet) -> str:
    return jobset.end or ("waiting in the queue" if jobset.is_suspended else "running")
