"""What a job is on a host, however it is run: shell scripts, each of which may run twice without harm."""

import dataclasses
from typing import Protocol

from launcher.options import JobOptions

# What a script ends with when its input did not come whole: sysexits.h calls it a temporary failure.
CUT = 75
# When a container has ended that never ran, as docker says it.
_NEVER = "0001-01-01T00:00:00Z"
ROOT = '"$HOME"/.simpo-launch'


def folder_of(run_id: str) -> str:
    """Where a job keeps its files on a host, as a shell reads it."""
    return f"{ROOT}/{run_id}"


def numbered_lines_from(first: int) -> str:
    """A filter that passes lines on at once, each with its number, from some number on.

    Numbers tell lines that come a second time after a broken connection.
    """
    # Not `sed -n '{first},$p'`: to know the last line it holds each one back until the next has come.
    seen = f" | sed -u '1,{first - 1}d'" if first > 1 else ""
    return f"grep -a --line-buffered -n ''{seen}"


class HostJob(Protocol):
    """One job's scripts."""

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
    """Writes the input into a file that nobody else can read; ends with CUT if it did not come whole."""
    return f"umask 077 && cat > {file} && {{ [ $(wc -c < {file}) -eq {size} ] || exit {CUT}; }}"


def name_current(run_id: str, kind: str) -> str:
    """Notes which job runs here last, for `logs`, `status` and `stop`."""
    return f"echo {run_id} {kind} > {ROOT}/current"


def tell_current() -> str:
    """Tells which job ran here last."""
    return f"cat {ROOT}/current 2> /dev/null | sed 's/^/@launch current /'"


def tell_jobs() -> str:
    """Tells the jobs that are on this host, and whether they run."""
    form = '@launch job {{.Label "simpo-launch"}} {{.State}}'
    return (
        f"sudo docker ps --all --filter label=simpo-launch --format '{form}' 2> /dev/null; "
        f'for pid in {ROOT}/*/pid; do if [ -e "$pid" ] && kill -0 "$(cat "$pid")" 2> /dev/null; then '
        'echo "@launch job $(basename "$(dirname "$pid")") running"; fi; done; echo \'@launch told\''
    )


@dataclasses.dataclass(frozen=True)
class HostState:
    """How a job stands on a host: `running`, `exited`, `absent`, or docker's other words."""

    word: str
    exit_code: int = 0
    is_out_of_memory: bool = False
    ended: str = ""
    """When, in UTC as in RFC 3339 without its Z, so that the order of texts is that of times; "" if not known."""

    @property
    def is_running(self) -> bool:
        """Whether it may still write lines."""
        return self.word in ("running", "restarting", "paused")


def parse_state(facts: tuple[str, ...]) -> HostState | None:
    """The state that a script told; None if it told none."""
    for fact in facts:
        words = fact.split()
        if len(words) in (4, 5) and words[0] == "state":
            ended = "" if words[4:] == [_NEVER] else "".join(words[4:]).removesuffix("Z")
            return HostState(words[1], int(words[2]), words[3] == "true", ended)
    return None
