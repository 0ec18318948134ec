"""A feed of one host of a TPU VM, read over ssh."""

from collections.abc import Iterator

from launcher.commands import Commands, Stream
from launcher.errors import LaunchError
from launcher.gcloud import Gcloud
from launcher.host_job import HostJob, HostState, parse_state
from launcher.hosts import Hosts

# Each stream begins with this mark. When the connection breaks, gcloud repeats the command by itself, and the partial
# line before the break joins the first line of the repetition. The mark at its end distinguishes it from a whole line.
_START = "@launch lines"


class SshFeed:
    """Reads the lines and the state of one host."""

    def __init__(self, host: int, job: HostJob, hosts: Hosts, gcloud: Gcloud, commands: Commands) -> None:
        self._host = host
        self._job = job
        self._hosts = hosts
        self._gcloud = gcloud
        self._commands = commands
        self._stream: Stream | None = None
        self._is_closed = False

    @property
    def host(self) -> int:
        return self._host

    def lines(self, first: int, follow: bool = True) -> Iterator[tuple[int, str]]:
        script = f"echo '{_START}'; {self._job.lines(first, follow)}"
        self._stream = self._commands.open(self._gcloud.ssh(self._host, script))
        if self._is_closed:
            self._stream.close()
        for line in self._stream.lines():
            number, _, text = line.partition(":")
            # A line without a newline, or with the mark at its end, was cut off with the connection. It is sent again.
            is_whole = line.endswith("\n") and not line.endswith(f"{_START}\n")
            # A repetition begins with lines that were already received.
            if is_whole and number.isdecimal() and int(number) >= first:
                first = int(number) + 1
                yield int(number), text.rstrip("\n")

    def state(self) -> HostState | None:
        state = parse_state(self._hosts.ask(self._host, self._job.state()).facts)
        return HostState("lost") if state is None and self._is_tpu_lost() else state

    @property
    def was_cut(self) -> bool:
        return self._stream is None or not self._stream.has_succeeded

    def close(self) -> None:
        self._is_closed = True
        if self._stream is not None:
            self._stream.close()

    def _is_tpu_lost(self) -> bool:
        try:
            node = self._gcloud.node()
        except LaunchError:
            return False
        return node is None or node.state != "READY"


def feeds_of(hosts: Hosts, job: HostJob, gcloud: Gcloud, commands: Commands) -> list[SshFeed]:
    """Return a feed for each host."""
    return [SshFeed(host, job, hosts, gcloud, commands) for host in range(hosts.count)]
