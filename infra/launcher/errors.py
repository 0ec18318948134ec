"""What can go wrong with a launch.

LaunchError
├── BadUsage          the words are wrong, nothing was started            exit code 2
├── CommandFailed     gcloud, docker or kubectl said no
├── TpuLost           the TPU was preempted or broke; another attempt may help
├── TpuGone           somebody deleted or stopped the TPU; nothing is made anew
├── Unreachable       hosts did not answer although the TPU is healthy
├── Busy              another job, or this one, is running there already
└── JobFailed         the command ended with an error on a host           that host's exit code
"""

import shlex
from collections.abc import Sequence


class LaunchError(Exception):
    """A launch that ends with an error that a user can act on."""

    exit_code = 1


class BadUsage(LaunchError, ValueError):
    """The words of the command line are wrong."""

    exit_code = 2


class CommandFailed(LaunchError):
    """A command of this machine ended with an error."""

    def __init__(self, argv: Sequence[str], code: int, output: str, advice: str = "") -> None:
        shown = shlex.join(argv[:6]) + (" ..." if len(argv) > 6 else "")
        said = output.strip() or "(it wrote nothing)"
        super().__init__(f"`{shown}` ended with exit code {code}: {said}" + (f"\n{advice}" if advice else ""))
        self.output = output


class TpuLost(LaunchError):
    """The TPU was preempted, broke or could not be made."""


class TpuGone(LaunchError):
    """The TPU was deleted or stopped by somebody."""


class Unreachable(LaunchError):
    """Hosts of a healthy TPU do not answer."""


class Busy(LaunchError):
    """A job is running where this one was to start."""


class JobFailed(LaunchError):
    """The command failed on a host."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
