"""A job without docker, as POSIX shell scripts: the tracked files and a virtual environment on each host."""

import dataclasses
import shlex

from launcher.host_job import folder_of, numbered_lines_from, receive
from launcher.options import JobOptions

_STOP_SECONDS = 30
# The same as in the Dockerfile and in preflights: another version would select other versions of jax and libtpu.
_PYTHON = "3.11"


@dataclasses.dataclass(frozen=True)
class BareJob:
    """A job that runs as a session of processes, with its own folder on each host."""

    run_id: str

    def receive_source(self, size: int) -> str:
        """Return a script that replaces the sources with the tar file from its input."""
        folder = folder_of(self.run_id)
        return (
            f"mkdir -p {folder} && cd {folder} && {receive('source.tar', size)} && rm -rf source && mkdir source && "
            "tar -xf source.tar -C source && rm source.tar"
        )

    def prepare(self) -> str:
        """Return a script that sets up the virtual environment.

        Done beforehand, so that all hosts can start within seconds of each other.
        """
        return (
            f'cd {folder_of(self.run_id)}/source && PATH="$HOME/.local/bin:$PATH" && '
            "{ command -v uv > /dev/null || python3 -m pip install --user --quiet uv; } && "
            f"uv sync --quiet --python {_PYTHON} --extra tpu --no-default-groups"
        )

    def remove_stale(self) -> str:
        """Return a script that renames the log of this job's last attempt and removes its pid and exit code."""
        folder = folder_of(self.run_id)
        return (
            f"mkdir -p {folder} && cd {folder} && "
            'if [ -e log ]; then n=1; while [ -e "kept-$n.log" ]; do n=$((n + 1)); done; mv log "kept-$n.log"; fi && '
            "rm -f pid exit_code"
        )

    def environment_text(self, job: JobOptions) -> str:
        """Return the variables as shell assignments."""
        return "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(job.environment.items()))

    def start(self, job: JobOptions, environment_size: int) -> str:
        """Return a script that starts the command in a new session, unless it was already started.

        The script reads the variables from its input.
        """
        inner = f"{shlex.join(job.command)} > ../log 2>&1 < /dev/null; echo $? > ../exit_code"
        return (
            f"cd {folder_of(self.run_id)}/source && trap 'rm -f ../environment' EXIT; trap 'exit 1' HUP INT TERM; "
            f"if [ ! -e ../pid ]; then {receive('../environment', environment_size)} && "
            'set -a && . ../environment && set +a && PATH="$PWD/.venv/bin:$HOME/.local/bin:$PATH" && : > ../log && '
            f"{{ setsid nohup sh -c {shlex.quote(inner)} > /dev/null 2>&1 < /dev/null & }} && echo $! > ../pid; fi"
        )

    def state(self) -> str:
        """Return a script that reports whether the job is running, and how it finished.

        A session that finished without writing an exit code was killed.
        """
        return (
            f"cd {folder_of(self.run_id)} 2> /dev/null && if [ -s exit_code ]; then "
            'echo "@launch state exited $(cat exit_code) false $(date -u -r exit_code +%Y-%m-%dT%H:%M:%S.%N)"; '
            "elif [ -e pid ] && kill -0 \"$(cat pid)\" 2> /dev/null; then echo '@launch state running 0 false'; "
            "elif [ -e pid ]; then echo '@launch state exited 137 false'; "
            "else echo '@launch state absent 0 false'; fi || echo '@launch state absent 0 false'"
        )

    def lines(self, first: int, follow: bool) -> str:
        """Return a script that prints the job's numbered output lines."""
        read = 'tail -n +1 --pid="$(cat pid)" -f log' if follow else "cat log"
        return f"cd {folder_of(self.run_id)} && {read} 2> /dev/null | {numbered_lines_from(first)}"

    def stop(self) -> str:
        """Return a script that terminates the session, and kills it after `_STOP_SECONDS`."""
        return (
            f"cd {folder_of(self.run_id)} 2> /dev/null && pid=$(cat pid 2> /dev/null) && kill -s TERM -- -$pid && "
            f"for _ in $(seq {_STOP_SECONDS}); do kill -s 0 -- -$pid 2> /dev/null || break; sleep 1; done; "
            "kill -s KILL -- -$pid 2> /dev/null; echo '@launch stopped'"
        )
