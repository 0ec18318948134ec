"""Errors of a launch.

LaunchError
├── BadUsage          the command line is wrong; nothing was started      exit code 2
├── CommandFailed     gcloud, docker or kubectl failed
├── TpuLost           the TPU was preempted or failed; another attempt may help
├── TpuGone           someone deleted or stopped the TPU; it is not re-created
├── Unreachable       hosts did not respond although the TPU is healthy
├── Busy              another job, or this one, is already running there
└── JobFailed         the command failed on a host                        that host's exit code
"""

import shlex
from collections.abc import Sequence


class LaunchError(Exception):
    """A failed launch, with an error that the user can act on."""

    exit_code = 1


class BadUsage(LaunchError, ValueError):
    """The command line is wrong."""

    exit_code = 2


class CommandFailed(LaunchError):
    """A local command failed."""

    def __init__(self, argv: Sequence[str], code: int, output: str, advice: str = "") -> None:
        shown = shlex.join(argv[:6]) + (" ..." if len(argv) > 6 else "")
        said = output.strip() or "(no output)"
        super().__init__(f"`{shown}` exited with code {code}: {said}" + (f"\n{advice}" if advice else ""))
        self.output = output


class TpuLost(LaunchError):
    """The TPU was preempted, failed or could not be created."""


class TpuGone(LaunchError):
    """Someone deleted or stopped the TPU."""


class Unreachable(LaunchError):
    """Hosts of a healthy TPU do not respond."""


class Busy(LaunchError):
    """A job is already running where this one would start."""


class JobFailed(LaunchError):
    """The command failed on a host."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
