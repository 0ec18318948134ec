"""The interface of a job on a host: shell scripts, each of which may safely run twice."""

import dataclasses
from typing import Protocol

from launcher.options import JobOptions

# Exit code of a script whose input arrived incomplete: a temporary failure in sysexits.h.
INCOMPLETE_INPUT = 75
# Docker's finish time of a container that has never run.
_NEVER = "0001-01-01T00:00:00Z"
ROOT = '"$HOME"/.simpo-launch'


def folder_of(run_id: str) -> str:
    """Return the folder of a job's files on a host, as a shell expression."""
    return f"{ROOT}/{run_id}"


def numbered_lines_from(first: int) -> str:
    """Return a filter that prints each line at once, prefixed with its number, from line `first` on.

    The numbers identify lines that are sent again after a broken connection.
    """
    # Not `sed -n '{first},$p'`: to detect the last line, it holds each line back until the next one arrives.
    seen = f" | sed -u '1,{first - 1}d'" if first > 1 else ""
    return f"grep -a --line-buffered -n ''{seen}"


class HostJob(Protocol):
    """The shell scripts of one job."""

    @property
    def run_id(self) -> str: ...

    def prepare(self) -> str: ...

    def remove_stale(self) -> str: ...

    def environment_text(self, job: JobOptions) -> str: ...

    def start(self, job: JobOptions, environment_size: int) -> str: ...

    def state(self) -> str: ...

    def lines(self, first: int, follow: bool) -> str: ...

    def stop(self) -> str: ...


def receive(file: str, size: int) -> str:
    """Return a script that writes its input to a file only the owner can read, or exits with INCOMPLETE_INPUT."""
    return f"umask 077 && cat > {file} && {{ [ $(wc -c < {file}) -eq {size} ] || exit {INCOMPLETE_INPUT}; }}"


def name_current(run_id: str, kind: str) -> str:
    """Return a script that records the last job on this host, for `logs`, `status` and `stop`."""
    return f"echo {run_id} {kind} > {ROOT}/current"


def report_current_script() -> str:
    """Return a script that reports the last job on this host."""
    return f"cat {ROOT}/current 2> /dev/null | sed 's/^/@launch current /'"


def report_jobs_script() -> str:
    """Return a script that reports the jobs on this host, and whether they are running."""
    form = '@launch job {{.Label "simpo-launch"}} {{.State}}'
    return (
        f"sudo docker ps --all --filter label=simpo-launch --format '{form}' 2> /dev/null; "
        f'for pid in {ROOT}/*/pid; do if [ -e "$pid" ] && kill -0 "$(cat "$pid")" 2> /dev/null; then '
        'echo "@launch job $(basename "$(dirname "$pid")") running"; fi; done; echo \'@launch told\''
    )


@dataclasses.dataclass(frozen=True)
class HostState:
    """The state of a job on a host: `running`, `exited`, `absent`, or another state of docker."""

    word: str
    exit_code: int = 0
    is_out_of_memory: bool = False
    ended: str = ""
    """Finish time in UTC, as in RFC 3339 without the Z, so that text order is time order; "" if unknown."""

    @property
    def is_running(self) -> bool:
        """Whether the job may still produce output."""
        return self.word in ("running", "restarting", "paused")


def parse_state(facts: tuple[str, ...]) -> HostState | None:
    """Return the state that a script reported, or None if it reported none."""
    for fact in facts:
        words = fact.split()
        if len(words) in (4, 5) and words[0] == "state":
            ended = "" if words[4:] == [_NEVER] else "".join(words[4:]).removesuffix("Z")
            return HostState(words[1], int(words[2]), words[3] == "true", ended)
    return None
