"""The shared dependencies of a launch."""

import dataclasses
import pathlib
from collections.abc import Sequence

from launcher.clock import Clock
from launcher.commands import Commands
from launcher.console import Console
from launcher.options import PollTiming
from launcher.outcome import Feed, Following, HostResult

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

    def follow(self, feeds: Sequence[Feed], folder: pathlib.Path) -> HostResult | None:
        """Follow a job on all its hosts until it finishes, and keep their lines in `folder`.

        A dry run only prints the commands that this would run.

        Returns:
            As `Following.first_failed`.
        """
        if not self.is_dry:
            return Following(feeds, self.timing, self.clock, self.console, folder).first_failed()
        for feed in feeds:
            list(feed.lines(1))
            feed.state()
        return None
