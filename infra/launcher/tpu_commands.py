"""The subcommands `logs`, `status`, `stop` and `clean` for a TPU VM."""

from launcher.bare_job import BareJob
from launcher.docker_job import DockerJob
from launcher.errors import JobFailed, LaunchError, TpuGone, Unreachable
from launcher.gcloud import Gcloud
from launcher.host_job import HostJob, parse_state, report_current_script
from launcher.hosts import Hosts
from launcher.options import TpuLocation
from launcher.ssh_feed import feeds_of
from launcher.tools import LaunchContext


class ExistingTpu:
    """The TPU of an earlier launch, and its job."""

    def __init__(self, place: TpuLocation, run_id: str, tools: LaunchContext) -> None:
        self._place = place
        self._run_id = run_id
        self._tools = tools
        self._gcloud = Gcloud(tools.commands, place, tools.clock, tools.timing.poll)

    def logs(self, follow: bool) -> None:
        """Print the job's output on all hosts. With `follow`, continue until it finishes and report its outcome."""
        tools = self._tools
        hosts = self._hosts()
        job = self._job(hosts)
        feeds = feeds_of(hosts, job, self._gcloud, tools.commands)
        if not follow:
            for feed in feeds:
                for _, line in feed.lines(1, follow=False):
                    tools.console.say(f"[host {feed.host}] {line}")
            return
        failed = tools.follow(feeds, tools.logs / job.run_id / "followed")
        if failed is not None:
            message = f"Job failed: {failed.told(hosts.count)}"
            if failed.state is None:
                raise Unreachable(message)
            raise JobFailed(message, failed.state.exit_code or 1)
        tools.tell_success()

    def status(self) -> None:
        """Print the state of the request, of the TPU, and of the job on each host."""
        console = self._tools.console
        request, node = self._gcloud.queued_resource(), self._gcloud.node()
        if request is None and node is None:
            console.say(f"TPU {self._place.tpu_name}: not found in {self._place.zone}; it costs nothing.")
            return
        if request is not None:
            console.say(f"request  {request.state}" + (f" ({request.reason})" if request.reason else ""))
        if node is None:
            return
        console.say(f"TPU      {node.accelerator_type}, {node.state}, {node.health or 'health unknown'}; it is billed")
        if node.is_healthy:
            hosts = self._hosts()
            job = self._job(hosts)
            for host in range(hosts.count):
                answer = hosts.ask(host, job.state())
                state = parse_state(answer.facts)
                word = "does not respond" if state is None else state.word
                code = f", exit code {state.exit_code}" if state is not None and state.word == "exited" else ""
                console.say(f"host {host}   {job.run_id}: {word}{code}")

    def stop(self) -> None:
        """Stop the job on all hosts. The TPU remains."""
        hosts = self._hosts()
        job = self._job(hosts)
        hosts.require("stopping the job", job.stop())
        self._tools.console.say(
            f"The job {job.run_id} is stopped. The TPU remains and is billed; delete it: "
            f"{self._place.command_line('clean')}"
        )

    def clean(self) -> None:
        """Delete the request and the TPU, even if a job is running on it. Returns when both are gone."""
        name = f"TPU {self._place.tpu_name}"
        request = self._gcloud.queued_resource()
        if request is not None:
            self._gcloud.delete_queued_resource()
        elif self._gcloud.node() is not None:
            self._gcloud.delete_node()
        else:
            self._tools.console.say(f"{name}: not found in {self._place.zone}; it costs nothing.")
            return
        self._tools.console.say(f"{name} is deleted; it is no longer billed.")

    def _hosts(self) -> Hosts:
        tools = self._tools
        node = self._gcloud.node()
        if node is None:
            raise TpuGone(f"there is no TPU {self._place.tpu_name} in {self._place.zone}")
        if not node.is_healthy:
            raise TpuGone(f"TPU {self._place.tpu_name} is {node.state}, {node.health}: its hosts cannot be reached")
        return Hosts(tools.commands, self._gcloud, node.hosts, tools.timing, tools.clock, 1 if tools.is_dry else 0)

    def _job(self, hosts: Hosts) -> HostJob:
        """Return the job with the given run id, or the last started job if none was given."""
        answer = hosts.ask(0, report_current_script())
        if answer.code != 0:
            raise Unreachable(f"host 0 of TPU {self._place.tpu_name} could not be queried: {answer.error}")
        facts = [fact.split() for fact in answer.facts]
        current = next((words[1:] for words in facts if len(words) == 3 and words[0] == "current"), None)
        if current is None:
            raise LaunchError(f"this launcher has not started a job on TPU {self._place.tpu_name}")
        run_id, kind = current
        return BareJob(self._run_id or run_id) if kind == "bare" else DockerJob(self._run_id or run_id)
