"""Shell scripts that run on every host of a TPU at once.

gcloud repeats a command by itself when the connection breaks, but forwards the input only once. Therefore every script
may safely run twice, checks that its input is complete, and reports facts in lines that begin with a mark.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable

from launcher.clock import Clock
from launcher.commands import CommandResult, Commands
from launcher.errors import LaunchError, Unreachable
from launcher.gcloud import Gcloud, advice_for
from launcher.host_job import INCOMPLETE_INPUT
from launcher.options import PollTiming

# Exit code of ssh when the connection failed.
SSH_BROKEN = 255
MARK = "@launch "


@dataclasses.dataclass(frozen=True)
class HostAnswer:
    """The output of a script on one host. `facts` are the lines that began with the mark."""

    host: int
    code: int
    facts: tuple[str, ...]
    error: str


def answer_of(host: int, done: CommandResult) -> HostAnswer:
    """Extract the marked lines from the output of a script."""
    facts = tuple(line.removeprefix(MARK) for line in done.out.splitlines() if line.startswith(MARK))
    return HostAnswer(host, done.code, facts, done.err.strip() or done.out.strip())


class Hosts:
    """The hosts of one TPU, identified by their indices."""

    def __init__(
        self, commands: Commands, gcloud: Gcloud, count: int, timing: PollTiming, clock: Clock, at_once: int = 0
    ) -> None:
        self.count = count
        self._at_once = at_once or count
        self._commands = commands
        self._gcloud = gcloud
        self._timing = timing
        self._clock = clock

    def ask(self, host: int, script: str, stdin: bytes | None = None, about_stdin: str = "") -> HostAnswer:
        """Run a script once on one host."""
        return answer_of(host, self._commands.run(self._gcloud.ssh(host, script), stdin, about_stdin))

    def require(self, what: str, script: str, stdin: bytes | None = None, about_stdin: str = "") -> list[HostAnswer]:
        """Run a script on every host. A broken connection is retried for `timing.start` seconds.

        Raises:
            Unreachable: a host could not be reached.
            LaunchError: the script failed on a host.
        """
        deadline = self._clock.now() + self._timing.start

        def on(host: int) -> HostAnswer:
            while True:
                answer = self.ask(host, script, stdin, about_stdin)
                if answer.code not in (SSH_BROKEN, INCOMPLETE_INPUT) or self._clock.now() >= deadline:
                    return answer
                self._clock.sleep(self._timing.poll)

        # Host 0 first and alone: gcloud may have to create a key and add it to the TPU, once for all hosts.
        answers = [on(0), *self._on_each(on, range(1, self.count))]
        for answer in answers:
            self._raise_if_failed(what, answer)
        return answers

    def attempt(self, script: str) -> None:
        """Run a script once on every host, and ignore failures."""
        self._on_each(lambda host: self.ask(host, script), range(self.count))

    def _on_each(self, act: Callable[[int], HostAnswer], hosts: range) -> list[HostAnswer]:
        with concurrent.futures.ThreadPoolExecutor(self._at_once) as pool:
            return list(pool.map(act, hosts))

    def _raise_if_failed(self, what: str, answer: HostAnswer) -> None:
        if answer.code == SSH_BROKEN:
            raise Unreachable(
                f"{what}: host {answer.host} could not be reached by ssh for {self._timing.start:.0f} s: {answer.error}"
                "\nDoes the network allow port 22 (`gcloud compute firewall-rules list`)?"
            )
        if answer.code != 0:
            advice = advice_for(answer.error)
            raise LaunchError(
                f"{what}: host {answer.host} exited with code {answer.code}: {answer.error}"
                + (f"\n{advice}" if advice else "")
            )
