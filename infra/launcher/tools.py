"""What a launch works with."""

import dataclasses
import pathlib
from collections.abc import Sequence

from launcher.clock import Clock
from launcher.commands import Commands
from launcher.console import Console
from launcher.options import Timing
from launcher.outcome import Feed

FINISHED = "Job finished with no error."
DRY = "Dry run: nothing was changed."


@dataclasses.dataclass(frozen=True)
class Tools:
    """Hands, clock and voice; `is_dry` if commands are only printed, `logs` is where lines of hosts are kept."""

    commands: Commands
    clock: Clock
    console: Console
    timing: Timing
    logs: pathlib.Path
    is_dry: bool = False

    def tell_success(self) -> None:
        """The last line of a job that ended well on every host."""
        self.console.say(DRY if self.is_dry else FINISHED)


def follow_dry(feeds: Sequence[Feed]) -> None:
    """Prints what following would run."""
    for feed in feeds:
        list(feed.lines(1))
        feed.state()
