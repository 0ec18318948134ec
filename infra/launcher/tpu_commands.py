"""`logs`, `status`, `stop` and `clean` for a TPU VM."""

from launcher.bare_job import BareJob
from launcher.docker_job import DockerJob
from launcher.errors import JobFailed, LaunchError, TpuGone, Unreachable
from launcher.gcloud import Gcloud
from launcher.host_job import HostJob, parse_state, tell_current
from launcher.hosts import Hosts
from launcher.options import Place
from launcher.outcome import Following
from launcher.ssh_feed import feeds_of
from launcher.tools import Tools, follow_dry


class ExistingTpu:
    """A TPU that a launch has made, and the job that it was made for."""

    def __init__(self, place: Place, run_id: str, tools: Tools) -> None:
        self._place = place
        self._run_id = run_id
        self._tools = tools
        self._gcloud = Gcloud(tools.commands, place, tools.clock, tools.timing.poll)

    def logs(self, follow: bool) -> None:
        """Prints the job's lines on all hosts; followed to its end, with the job's verdict, if asked to."""
        tools = self._tools
        hosts = self._hosts()
        job = self._job(hosts)
        feeds = feeds_of(hosts, job, self._gcloud, tools.commands)
        if not follow:
            for feed in feeds:
                for _, line in feed.lines(1, follow=False):
                    tools.console.say(f"[host {feed.host}] {line}")
            return
        folder = tools.logs / job.run_id / "followed"
        if tools.is_dry:
            failed = follow_dry(feeds)
        else:
            failed = Following(feeds, tools.timing, tools.clock, tools.console, folder).first_failed()
        if failed is not None:
            message = f"Job failed: {failed.told(hosts.count)}"
            if failed.state is None:
                raise Unreachable(message)
            raise JobFailed(message, failed.state.exit_code or 1)
        tools.tell_success()

    def status(self) -> None:
        """Prints what there is: the request, the TPU, and the job on each host."""
        console = self._tools.console
        request, node = self._gcloud.queued_resource(), self._gcloud.node()
        if request is None and node is None:
            console.say(f"TPU {self._place.tpu_name}: nothing of that name in {self._place.zone}; it costs nothing.")
            return
        if request is not None:
            console.say(f"request  {request.state}" + (f" ({request.reason})" if request.reason else ""))
        if node is None:
            return
        console.say(f"TPU      {node.accelerator_type}, {node.state}, {node.health or 'health unknown'}; it costs")
        if node.is_healthy:
            hosts = self._hosts()
            job = self._job(hosts)
            for host in range(hosts.count):
                answer = hosts.ask(host, job.state())
                state = parse_state(answer.facts)
                told = "does not answer" if state is None else state.word
                code = f", exit code {state.exit_code}" if state is not None and state.word == "exited" else ""
                console.say(f"host {host}   {job.run_id}: {told}{code}")

    def stop(self) -> None:
        """Ends the job on all hosts; the TPU stays."""
        hosts = self._hosts()
        job = self._job(hosts)
        hosts.require("stopping the job", job.stop())
        self._tools.console.say(
            f"The job {job.run_id} is stopped. The TPU stays, and costs; delete it: python infra/launch.py clean "
            f"{self._place.flags}"
        )

    def clean(self) -> None:
        """Deletes the request and the TPU, whatever runs on it; returns when both are gone."""
        name = f"TPU {self._place.tpu_name}"
        request = self._gcloud.queued_resource()
        if request is not None:
            self._gcloud.delete_queued_resource()
        elif self._gcloud.node() is not None:
            self._gcloud.delete_node()
        else:
            self._tools.console.say(f"{name}: nothing of that name in {self._place.zone}; it costs nothing.")
            return
        self._tools.console.say(f"{name} is deleted; it costs nothing any more.")

    def _hosts(self) -> Hosts:
        tools = self._tools
        node = self._gcloud.node()
        if node is None:
            raise TpuGone(f"there is no TPU {self._place.tpu_name} in {self._place.zone}")
        if not node.is_healthy:
            raise TpuGone(f"TPU {self._place.tpu_name} is {node.state}, {node.health}: no host can be asked")
        return Hosts(tools.commands, self._gcloud, node.hosts, tools.timing, tools.clock, 1 if tools.is_dry else 0)

    def _job(self, hosts: Hosts) -> HostJob:
        """The job of the run id that was given, else the one that was started last."""
        answer = hosts.ask(0, tell_current())
        if answer.code != 0:
            raise Unreachable(f"host 0 of TPU {self._place.tpu_name} could not be asked: {answer.error}")
        facts = [fact.split() for fact in answer.facts]
        current = next((words[1:] for words in facts if len(words) == 3 and words[0] == "current"), None)
        if current is None:
            raise LaunchError(f"no job was started on TPU {self._place.tpu_name} by this launcher")
        run_id, kind = current
        return BareJob(self._run_id or run_id) if kind == "bare" else DockerJob(self._run_id or run_id)
