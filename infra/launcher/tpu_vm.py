"""The whole life cycle of a job on a TPU VM, including the attempts after preemptions."""

import pathlib

from launcher.bare_job import BareJob
from launcher.docker_job import DockerJob
from launcher.errors import BadUsage, Busy, CommandFailed, JobFailed, LaunchError, TpuGone, TpuLost, Unreachable
from launcher.gcloud import Gcloud, Node
from launcher.host_job import HostJob, name_current, report_jobs_script
from launcher.hosts import Hosts
from launcher.options import JobOptions, TpuOptions
from launcher.outcome import HostResult
from launcher.provisioning import Provisioner
from launcher.source import Source
from launcher.ssh_feed import feeds_of
from launcher.tools import LaunchContext


class TpuVmLaunch:
    """A launch of one job on one TPU."""

    def __init__(
        self, tpu: TpuOptions, options: JobOptions, job: HostJob, source: Source | None, tools: LaunchContext
    ) -> None:
        self._tpu = tpu
        self._options = options
        self._job = job
        self._source = source
        self._tools = tools
        self._gcloud = Gcloud(tools.commands, tpu.place, tools.clock, tools.timing.poll)
        self._provisioner = Provisioner(self._gcloud, tpu, tools.timing, tools.clock, tools.console)
        self._has_tpu = False
        self._hosts: Hosts | None = None

    def run(self) -> None:
        """Run the job until it finishes, or only until it is started if it is not followed.

        A lost TPU is re-created at most `retries` times. A failed command is not run again. With `autodelete`, the
        TPU is deleted at the end, unless a job may still be running there.

        Raises:
            LaunchError: the job failed.
        """
        try:
            self._run()
        except (BadUsage, Busy, TpuGone):
            raise
        except LaunchError as failure:
            if self._options.autodelete and not (isinstance(failure, Unreachable) and self._hosts is not None):
                self._delete_after_failure()
            raise
        if not self._options.foreground:
            self._print_next_commands()
            return
        if self._options.autodelete:
            self._provisioner.delete()
        self._tools.tell_success()

    def interrupted(self) -> None:
        """Ask after Ctrl-C whether to stop the job too, or to delete the TPU or request that it waits for."""
        console = self._tools.console
        if self._hosts is None:
            what = f"TPU {self._tpu.place.tpu_name}"
            if console.confirm(f"Delete {what}{'' if self._has_tpu else ' and its request'} too?"):
                self._provisioner.delete()
                console.say(f"{what} is deleted." if self._has_tpu else "The request is deleted.")
            elif self._has_tpu:
                console.say(f"{what} remains and is billed; delete it: {self._command('clean')}")
            else:
                console.say(f"The request remains in the queue. Delete it: {self._command('clean')}")
        elif console.confirm(f"Stop the job {self._job.run_id} on all hosts too?"):
            self._hosts.require("stopping the job", self._job.stop())
            console.say(f"The job is stopped. The TPU remains and is billed; delete it: {self._command('clean')}")
        else:
            console.say("The job keeps running.")
            self._print_next_commands()

    def _run(self) -> None:
        attempt = 1
        while True:
            try:
                self._attempt(attempt)
                break
            except TpuLost as lost:
                self._hosts, self._has_tpu = None, False
                if 0 <= self._options.retries < attempt:
                    raise TpuLost(f"{lost} (attempt {attempt}, and --retries is {self._options.retries})") from lost
                self._tools.console.complain(f"Attempt {attempt} lost its TPU: {lost}. Trying again.")
                self._provisioner.discard()
                attempt += 1

    def _delete_after_failure(self) -> None:
        try:
            self._provisioner.delete()
        except LaunchError as error:  # must not hide the original failure
            self._tools.console.complain(f"The TPU could not be deleted: {error}\ndelete it: {self._command('clean')}")

    def _attempt(self, attempt: int) -> None:
        node = self._provisioner.acquire()
        self._has_tpu = True
        try:
            hosts = self._start(node)
        except Busy:
            raise
        except LaunchError as failure:
            self._raise_if_lost(failure)
            if self._hosts is not None:
                self._hosts.attempt(self._job.stop())
            raise
        if not self._options.foreground:
            return
        failed = self._follow(hosts, attempt)
        if failed is None:
            return
        self._raise_if_lost(JobFailed(failed.told(hosts.count), 1))
        if failed.state is not None:  # a silent host may still be working
            hosts.attempt(self._job.stop())
        self._fail(failed, hosts.count, attempt)

    def _start(self, node: Node) -> Hosts:
        tools = self._tools
        hosts = Hosts(tools.commands, self._gcloud, node.hosts, tools.timing, tools.clock, 1 if tools.is_dry else 0)
        self._raise_if_busy(hosts)
        if isinstance(self._job, BareJob) and self._source is not None:
            archive = self._source.archive
            about = f"(a tar file of {len(self._source.files)} tracked files)"
            hosts.require("sending the sources", self._job.receive_source(len(archive)), archive, about)
        tools.console.say(f"Preparing {hosts.count} hosts.")
        named = name_current(self._job.run_id, "docker" if isinstance(self._job, DockerJob) else "bare")
        hosts.require("preparing", f"{self._job.remove_stale()} && {named} && {self._job.prepare()}")
        variables = self._job.environment_text(self._options).encode()
        about = f"(the values of {', '.join(sorted(self._options.environment))})"
        tools.console.say(f"Starting the job {self._job.run_id}.")
        self._hosts = hosts
        hosts.require("starting the job", self._job.start(self._options, len(variables)), variables, about)
        return hosts

    def _raise_if_busy(self, hosts: Hosts) -> None:
        """Raise Busy if a job is running on the TPU, which has room for one. Finished jobs are left alone."""
        for answer in hosts.require("looking for other jobs", report_jobs_script()):
            for fact in answer.facts:
                words = fact.split()
                if words[0] == "job" and words[2] in ("running", "restarting", "paused"):
                    raise Busy(
                        f"the job {words[1]} is running on host {answer.host} of TPU {self._tpu.place.tpu_name}. "
                        f"Follow it: {self._command('logs --foreground')}\nor stop it: {self._command('stop')}"
                    )

    def _follow(self, hosts: Hosts, attempt: int) -> HostResult | None:
        tools = self._tools
        feeds = feeds_of(hosts, self._job, self._gcloud, tools.commands)
        return tools.follow(feeds, self._folder(attempt))

    def _folder(self, attempt: int) -> pathlib.Path:
        return self._tools.logs / self._job.run_id / f"attempt_{attempt}"

    def _raise_if_lost(self, failure: LaunchError) -> None:
        try:
            reason = self._provisioner.why_lost()
        except CommandFailed as error:
            self._tools.console.complain(f"Could not determine whether the TPU was lost: {error}")
            return
        if reason:
            raise TpuLost(f"{reason}; before that, {failure}") from failure

    def _fail(self, failed: HostResult, count: int, attempt: int) -> None:
        message = f"Job failed: {failed.told(count)}\nAll lines: {self._folder(attempt)}"
        if failed.state is None:
            raise Unreachable(
                f"{message}\nThe TPU is healthy and billed, and its job may still be running; check it: "
                f"{self._command('status')}\nor delete it: {self._command('clean')}"
            )
        raise JobFailed(message, failed.state.exit_code or 1)

    def _command(self, subcommand: str) -> str:
        return self._tpu.place.command_line(subcommand)

    def _print_next_commands(self) -> None:
        self._tools.console.say(
            f"The job {self._job.run_id} is started on TPU {self._tpu.place.tpu_name}. It keeps running without "
            "this terminal. It is not restarted if the TPU is preempted. The TPU is billed until it is deleted.\n"
            f"    follow: {self._command('logs --foreground')}\n"
            f"    status: {self._command('status')}\n"
            f"    stop:   {self._command('stop')}\n"
            f"    delete: {self._command('clean')}"
        )
