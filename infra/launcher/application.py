"""The launcher's application: runs what the command line asks for."""

import argparse
import dataclasses
import pathlib
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from launcher.accelerators import parse_tpu_type
from launcher.arguments import parse
from launcher.bare_job import BareJob
from launcher.clock import Clock, WallClock
from launcher.commands import Commands, PrintedCommands, RealCommands
from launcher.console import Console
from launcher.docker_job import DockerJob
from launcher.environment import given_variables, is_secret, job_environment
from launcher.errors import BadUsage, LaunchError
from launcher.gcloud import config_value
from launcher.gke import GkeJob
from launcher.host_job import HostJob
from launcher.image import Registry, ensure_image
from launcher.kubectl import Kubectl
from launcher.local import host_environment, run_local
from launcher.options import GkeOptions, ImageOptions, JobOptions, PollTiming, TpuLocation, TpuOptions, parse_capacity
from launcher.simulation import SimulatedCluster, SimulatedTpu
from launcher.source import Source, check_shipped, read_source
from launcher.tools import LaunchContext
from launcher.tpu_commands import ExistingTpu
from launcher.tpu_vm import TpuVmLaunch

INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class LaunchEnvironment:
    """The environment of a launch; tests substitute their own."""

    root: pathlib.Path
    variables: Mapping[str, str]
    clock: Clock = dataclasses.field(default_factory=WallClock)
    console: Console = dataclasses.field(default_factory=Console)
    timing: PollTiming = dataclasses.field(default_factory=PollTiming)

    @property
    def logs(self) -> pathlib.Path:
        """Folder for the output of the hosts."""
        return self.root / "runs" / "launches"


class Application:
    """One call of the launcher."""

    def __init__(self, flags: argparse.Namespace, around: LaunchEnvironment) -> None:
        self._flags = flags
        self._around = around
        # Commands that only read local state also run in a dry run.
        self._local_commands: Commands = RealCommands()

    def run(self) -> int:
        """Run what the flags ask for and return the exit code."""
        flags, around = self._flags, self._around
        # The output of a job that was started earlier may contain these values too.
        around.console.keep_secret(value for name, value in around.variables.items() if is_secret(name))
        if flags.backend == "local":
            if flags.subcommand:
                raise BadUsage(f"`{flags.subcommand}` needs --tpu_name NAME or --backend gke; Ctrl-C stops a local job")
            return self._launch_locally()
        if flags.subcommand:
            self._manage_gke() if flags.backend == "gke" else self._manage_tpu()
        else:
            self._launch_on_gke() if flags.backend == "gke" else self._launch_on_tpu()
        return 0

    def _launch_locally(self) -> int:
        flags, console = self._flags, self._around.console
        given = given_variables(flags.environment, self._around.variables, console)
        if not flags.dry_run:
            return run_local(flags.command, flags.local, flags.devices_per_host, given)
        console.keep_secret(value for name, value in given.items() if is_secret(name))
        for index in range(flags.local):
            own = host_environment(given, index, flags.local, "PORT", flags.devices_per_host)
            words = ["env", *(f"{name}={value}" for name, value in own.items()), *flags.command]
            console.show_command(shlex.join(words))
        console.comment_only()
        console.say("Dry run: nothing was started. PORT stands for a free port.")
        return 0

    def _launch_on_tpu(self) -> None:
        flags = self._flags
        place = TpuLocation(flags.tpu_name, *self._zone_and_project())
        capacity = parse_capacity(flags.capacity_type or "on-demand")
        tpu = TpuOptions(place, parse_tpu_type(flags.tpu_type), capacity, flags.version, flags.service_account)
        image, source, options = self._code_and_job()
        tools = self._tools(PrintedCommands(self._around.console, SimulatedTpu(tpu)))
        job: HostJob
        if image.use_docker:
            job = DockerJob(options.run_id, self._image(image, Registry(place.region, place.project), source, tools))
        else:
            job = BareJob(options.run_id)
        launch = TpuVmLaunch(tpu, options, job, source, tools)
        try:
            launch.run()
        except KeyboardInterrupt:
            launch.interrupted()
            raise

    def _launch_on_gke(self) -> None:
        flags = self._flags
        zone, project = ("", "") if flags.image and not flags.cluster else self._zone_and_project()
        gke = GkeOptions(
            parse_tpu_type(flags.tpu_type),
            flags.cluster,
            zone,
            project,
            flags.namespace,
            flags.queue,
            parse_capacity(flags.capacity_type or "on-demand"),
            flags.service_account or "default",
        )
        image, source, options = self._code_and_job()
        tools = self._tools(PrintedCommands(self._around.console, SimulatedCluster(options.run_id, gke.tpu_type.hosts)))
        uri = self._image(image, Registry(_region(zone), project), source, tools)
        job = self._gke_job(options.run_id, tools)
        try:
            job.start(gke, options, uri)
            if options.foreground:
                job.follow()
            else:
                job.tell_how_to_follow()
        except KeyboardInterrupt:
            job.interrupted()
            raise

    def _manage_tpu(self) -> None:
        flags = self._flags
        place = TpuLocation(flags.tpu_name, *self._zone_and_project())
        tools = self._tools(PrintedCommands(self._around.console, SimulatedTpu()))
        tpu = ExistingTpu(place, flags.run_id, tools)
        if flags.subcommand == "logs":
            tpu.logs(flags.foreground)
        else:
            {"status": tpu.status, "stop": tpu.stop, "clean": tpu.clean}[flags.subcommand]()

    def _manage_gke(self) -> None:
        flags = self._flags
        if not flags.run_id:
            raise BadUsage(f"`{flags.subcommand} --backend gke` needs --run_id, the name of the JobSet")
        tools = self._tools(PrintedCommands(self._around.console, SimulatedCluster(flags.run_id, 1, is_there=True)))
        job = self._gke_job(flags.run_id, tools)
        if flags.subcommand == "logs" and flags.foreground:
            job.follow()
        else:
            verbs = {"logs": job.print_lines, "status": job.status, "stop": job.delete, "clean": job.delete}
            verbs[flags.subcommand]()

    def _gke_job(self, name: str, tools: LaunchContext) -> GkeJob:
        flags = self._flags
        if flags.cluster:
            zone, project = self._zone_and_project()
            where = ["--location", zone, "--project", project, "--quiet"]
            done = tools.commands.run(["gcloud", "container", "clusters", "get-credentials", flags.cluster, *where])
            if done.code != 0:
                raise LaunchError(f"the cluster {flags.cluster} cannot be reached: {done.err.strip()}")
        kubectl = Kubectl(tools.commands, flags.namespace, tools.clock, tools.timing.poll)
        return GkeJob(name, flags.namespace, kubectl, tools)

    def _tools(self, printed: PrintedCommands) -> LaunchContext:
        around, flags = self._around, self._flags
        timing = around.timing
        if not flags.subcommand:
            timing = dataclasses.replace(timing, start=flags.start_timeout)
        commands: Commands = self._local_commands
        if flags.dry_run:
            commands = printed
            around.console.comment_only()
        return LaunchContext(commands, around.clock, around.console, timing, around.logs, flags.dry_run)

    def _zone_and_project(self) -> tuple[str, str]:
        zone = self._flags.zone or config_value(self._local_commands, "compute/zone")
        project = self._flags.project or config_value(self._local_commands, "project")
        if not zone:
            raise BadUsage("Zone must be specified or set in gcloud config: --zone ZONE, such as us-central1-a")
        if not project:
            raise BadUsage("Project must be specified or set in gcloud config: --project PROJECT")
        return zone, project

    def _code_and_job(self) -> tuple[ImageOptions, Source | None, JobOptions]:
        """Return the image, the sources that are shipped (None with an existing image), and the job."""
        flags = self._flags
        image = ImageOptions(flags.image, flags.docker_repository, flags.image_name, not flags.no_docker)
        source = None if image.uri else read_source(self._around.root, self._local_commands)
        return image, source, self._job_options(source)

    def _image(self, options: ImageOptions, registry: Registry, source: Source | None, tools: LaunchContext) -> str:
        if source is None:
            return options.uri
        return ensure_image(registry, options, source, tools.commands, tools.console)

    def _job_options(self, source: Source | None) -> JobOptions:
        flags, console = self._flags, self._around.console
        if source is not None:
            check_shipped(flags.command, source)
        given = job_environment(flags.environment, self._around.variables, console)
        console.keep_secret(value for name, value in given.items() if is_secret(name))
        commit = {} if source is None else {"GIT_COMMIT": source.commit}
        options = JobOptions(
            command=flags.command,
            environment=commit | given,
            run_id=flags.run_id,
            retries=flags.retries,
            foreground=flags.foreground,
            autodelete=flags.autodelete,
        )
        variables = {"RUN_ID": options.run_id, **options.environment}
        return dataclasses.replace(options, environment=variables)


def _region(zone: str) -> str:
    """Return the region of a zone; a region is returned unchanged."""
    return zone.rpartition("-")[0] if zone[-2:-1] == "-" else zone


def _exit_on_signal(signal_number: int, frame: object) -> NoReturn:
    """Exit without asking when the terminal closes or a scheduler sends SIGTERM; the job keeps running."""
    raise SystemExit(128 + signal_number)


def main(words: Sequence[str], around: LaunchEnvironment) -> int:
    """Run the launcher and return its exit code."""
    flags = parse(words)
    try:
        return Application(flags, around).run()
    except LaunchError as error:
        around.console.complain(f"Error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        around.console.complain("Interrupted.")
        return INTERRUPTED


def main_of_process(root: pathlib.Path, variables: Mapping[str, str]) -> int:
    """Run the launcher as the main program of this process."""
    # A shell starts background commands with SIGINT ignored, and Python keeps it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    return main(sys.argv[1:], LaunchEnvironment(root, variables))
