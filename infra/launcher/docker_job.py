"""A job as a container on each host, as POSIX shell scripts.

The container is named after the run, so two jobs never touch each other's containers. It runs detached: it keeps
running when the connection breaks or the launcher exits. Exited containers remain, with their logs, until the same job
starts again.
"""

import dataclasses
import shlex

from launcher.host_job import folder_of, numbered_lines_from, receive
from launcher.options import JobOptions

LABEL = "simpo-launch"
# JAX and the data loader use shared memory.
_SHARED_MEMORY = "32gb"
_STOP_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class DockerJob:
    """A job that runs in containers of one image."""

    run_id: str
    image: str = ""

    @property
    def container(self) -> str:
        """Name of the container on every host."""
        return f"simpo-{self.run_id}"

    def prepare(self) -> str:
        """Return a script that pulls the image.

        Done beforehand, so that all hosts can start within seconds of each other.
        """
        registry = self.image.partition("/")[0]
        # Only Google's registries accept the credentials of the TPU's service account.
        is_google = registry.endswith(("-docker.pkg.dev", "gcr.io"))
        login = [f"sudo gcloud auth configure-docker {shlex.quote(registry)} --quiet"] if is_google else []
        return " && ".join([*login, f"sudo docker pull --quiet {shlex.quote(self.image)}"])

    def remove_stale(self) -> str:
        """Return a script that saves the logs of this job's exited container and removes it."""
        name, folder = self.container, folder_of(self.run_id)
        return (
            f"mkdir -p {folder} && "
            f"for id in $(sudo docker ps --all --quiet --filter name=^{name}$); do "
            f"sudo docker logs $id > {folder}/$id.log 2>&1; sudo docker rm $id > /dev/null || exit 1; done"
        )

    def environment_text(self, job: JobOptions) -> str:
        """Return the variables in the format of docker's `--env-file`."""
        return "".join(f"{name}={value}\n" for name, value in sorted(job.environment.items()))

    def start(self, job: JobOptions, environment_size: int) -> str:
        """Return a script that starts the container unless it exists.

        The script reads the variables from its input, and deletes their file when it exits.
        """
        file = f"{folder_of(self.run_id)}/environment"
        # --init: a command that runs as process 1 would not react to SIGTERM.
        options = ["--detach", "--init", "--name", self.container, "--label", f"{LABEL}={self.run_id}"]
        options += ["--privileged", "--network", "host", "--shm-size", _SHARED_MEMORY]
        run = f"sudo docker run {shlex.join(options)} --env-file {file} {shlex.join([self.image, *job.command])}"
        return (
            f"trap 'rm -f {file}' EXIT; trap 'exit 1' HUP INT TERM; "
            f"sudo docker container inspect {self.container} > /dev/null 2>&1 || "
            f"{{ {receive(file, environment_size)} && {run} > /dev/null; }}"
        )

    def state(self) -> str:
        """Return a script that reports whether the container is running, and how it finished."""
        form = "@launch state {{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}} {{.State.FinishedAt}}"
        inspect = f"sudo docker container inspect --format {shlex.quote(form)} {self.container}"
        return f"{inspect} 2> /dev/null || echo '@launch state absent 0 false'"

    def lines(self, first: int, follow: bool) -> str:
        """Return a script that prints the container's numbered output lines."""
        flag = "--follow " if follow else ""
        return f"sudo docker logs {flag}{self.container} 2>&1 | {numbered_lines_from(first)}"

    def stop(self) -> str:
        """Return a script that terminates the container, and kills it after `_STOP_SECONDS`."""
        name = self.container
        return (
            f"if sudo docker container inspect {name} > /dev/null 2>&1; "
            f"then sudo docker stop -t {_STOP_SECONDS} {name} > /dev/null || exit 1; fi; echo '@launch stopped'"
        )
