"""The shared dependencies of a launch."""

import dataclasses
import pathlib
from collections.abc import Sequence

from launcher.clock import Clock
from launcher.commands import Commands
from launcher.console import Console
from launcher.options import PollTiming
from launcher.outcome import Feed

FINISHED = "Job finished with no error."
DRY = "Dry run: nothing was changed."


@dataclasses.dataclass(frozen=True)
class LaunchContext:
    """Dependencies of a launch. `is_dry`: commands are only printed. `logs`: folder for the output of the hosts."""

    commands: Commands
    clock: Clock
    console: Console
    timing: PollTiming
    logs: pathlib.Path
    is_dry: bool = False

    def tell_success(self) -> None:
        """Print the last line of a job that succeeded on every host."""
        self.console.say(DRY if self.is_dry else FINISHED)


def follow_dry(feeds: Sequence[Feed]) -> None:
    """Print the commands that following the job would run."""
    for feed in feeds:
        list(feed.lines(1))
        feed.state()
