"""Shell scripts on every host of a TPU at once.

gcloud repeats a command by itself when its connection breaks, and passes the input on only once. So every script may
run twice without harm, checks that its input came whole, and tells facts in lines that begin with a mark.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable

from launcher.clock import Clock
from launcher.commands import Commands, Done
from launcher.errors import LaunchError, Unreachable
from launcher.gcloud import Gcloud, advice_for
from launcher.host_job import CUT
from launcher.options import Timing

# What ssh ends with when the connection is to blame.
SSH_BROKEN = 255
MARK = "@launch "


@dataclasses.dataclass(frozen=True)
class HostAnswer:
    """What a script said on one host, by the lines that begin with the mark."""

    host: int
    code: int
    facts: tuple[str, ...]
    error: str


def answer_of(host: int, done: Done) -> HostAnswer:
    """The marked lines of a script's output."""
    facts = tuple(line.removeprefix(MARK) for line in done.out.splitlines() if line.startswith(MARK))
    return HostAnswer(host, done.code, facts, done.err.strip() or done.out.strip())


class Hosts:
    """The hosts of one TPU, by their numbers."""

    def __init__(
        self, commands: Commands, gcloud: Gcloud, count: int, timing: Timing, clock: Clock, at_once: int = 0
    ) -> None:
        self.count = count
        self._at_once = at_once or count
        self._commands = commands
        self._gcloud = gcloud
        self._timing = timing
        self._clock = clock

    def ask(self, host: int, script: str, stdin: bytes | None = None, about_stdin: str = "") -> HostAnswer:
        """Runs a script on one host, once."""
        return answer_of(host, self._commands.run(self._gcloud.ssh(host, script), stdin, about_stdin))

    def require(self, what: str, script: str, stdin: bytes | None = None, about_stdin: str = "") -> list[HostAnswer]:
        """Runs a script on every host; a broken connection is tried again for `timing.start` seconds.

        Raises:
            Unreachable: a host could not be reached.
            LaunchError: the script failed on a host.
        """
        deadline = self._clock.now() + self._timing.start

        def on(host: int) -> HostAnswer:
            while True:
                answer = self.ask(host, script, stdin, about_stdin)
                if answer.code not in (SSH_BROKEN, CUT) or self._clock.now() >= deadline:
                    return answer
                self._clock.sleep(self._timing.poll)

        # The first alone: gcloud may have to make a key and give it to the TPU, once for all hosts.
        answers = [on(0), *self._on_each(on, range(1, self.count))]
        for answer in answers:
            self._refuse_failed(what, answer)
        return answers

    def attempt(self, script: str) -> None:
        """Runs a script on every host once, wherever that succeeds."""
        self._on_each(lambda host: self.ask(host, script), range(self.count))

    def _on_each(self, act: Callable[[int], HostAnswer], hosts: range) -> list[HostAnswer]:
        with concurrent.futures.ThreadPoolExecutor(self._at_once) as pool:
            return list(pool.map(act, hosts))

    def _refuse_failed(self, what: str, answer: HostAnswer) -> None:
        if answer.code == SSH_BROKEN:
            raise Unreachable(
                f"{what}: host {answer.host} could not be reached by ssh for {self._timing.start:.0f} s: {answer.error}"
                "\nDoes the network let port 22 in (`gcloud compute firewall-rules list`)?"
            )
        if answer.code != 0:
            advice = advice_for(answer.error)
            raise LaunchError(
                f"{what}: host {answer.host} ended with exit code {answer.code}: {answer.error}"
                + (f"\n{advice}" if advice else "")
            )
