"""Local commands: run to completion, read line by line, or only printed."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Protocol

from launcher.clock import Clock
from launcher.console import Console
from launcher.errors import BadUsage

_MAX_RETRIES = 5
_MISSING_PROGRAM = {
    "gcloud": "install the Google Cloud CLI, then run `gcloud auth login` (infra/README.md, step 1)",
    "kubectl": "install it with `gcloud components install kubectl gke-gcloud-auth-plugin`",
    "docker": "install docker, give --image, or give --no_docker, which ships the sources and does not need docker",
    "git": "install git; the launcher ships the files that git tracks",
}


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """The result of a finished command."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str


class Stream(Protocol):
    """A command whose output is read while it runs."""

    def lines(self) -> Iterator[str]:
        """Yield the lines of standard output. A line without a trailing newline was cut off."""
        ...

    @property
    def has_succeeded(self) -> bool:
        """Whether the command has finished by itself and succeeded."""
        ...

    def close(self) -> None:
        """Stop the command. A reader of its lines then reaches their end."""
        ...


class Commands(Protocol):
    """A way to run commands."""

    def run(self, argv: Sequence[str], stdin: bytes | None = None, about_stdin: str = "") -> CommandResult:
        """Run a command to completion. `about_stdin` describes its input where the command is only printed."""
        ...

    def open(self, argv: Sequence[str]) -> Stream:
        """Start a command whose output is read while it runs."""
        ...


class _ProcessStream:
    def __init__(self, argv: Sequence[str]) -> None:
        # A separate session: Ctrl-C reaches only the launcher, and closing also reaches the ssh process below gcloud.
        self._process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def lines(self) -> Iterator[str]:
        assert self._process.stdout is not None
        with self._process.stdout:
            # Bytes are split at line feeds only; the carriage returns of a progress bar stay in the line.
            for line in self._process.stdout:
                yield line.decode("utf-8", "replace")
        self._process.wait()

    @property
    def has_succeeded(self) -> bool:
        return self._process.poll() == 0

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)


class RealCommands:
    """Runs commands on this machine."""

    def run(self, argv: Sequence[str], stdin: bytes | None = None, about_stdin: str = "") -> CommandResult:
        del about_stdin
        try:
            done = subprocess.run(list(argv), input=stdin or b"", capture_output=True, check=False)
        except FileNotFoundError as error:
            raise _missing(argv[0]) from error
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        return CommandResult(tuple(argv), done.returncode, out, err)

    def open(self, argv: Sequence[str]) -> Stream:
        try:
            return _ProcessStream(argv)
        except FileNotFoundError as error:
            raise _missing(argv[0]) from error


def run_with_retries(
    commands: Commands, argv: Sequence[str], transient: Sequence[str], clock: Clock, poll_seconds: float
) -> CommandResult:
    """Run a command, and run it again while it fails with one of the transient errors, a few times at most."""
    done = commands.run(argv)
    for _ in range(_MAX_RETRIES):
        if done.code == 0 or not any(sign in done.err for sign in transient):
            break
        clock.sleep(poll_seconds)
        done = commands.run(argv)
    return done


def _missing(program: str) -> BadUsage:
    return BadUsage(f"program {program!r} was not found; {_MISSING_PROGRAM[program]}")


class SimulatedOutput(Protocol):
    """Simulated output of commands that succeed."""

    def answer(self, argv: Sequence[str]) -> CommandResult: ...


class _EmptyStream:
    def lines(self) -> Iterator[str]:
        return iter(())

    @property
    def has_succeeded(self) -> bool:
        return True

    def close(self) -> None:
        pass


class PrintedCommands:
    """Prints commands instead of running them, and returns simulated results."""

    def __init__(self, console: Console, pretence: SimulatedOutput) -> None:
        self._console = console
        self._pretence = pretence

    def run(self, argv: Sequence[str], stdin: bytes | None = None, about_stdin: str = "") -> CommandResult:
        del stdin
        self._console.show_command(shlex.join(argv) + (f"  < {about_stdin}" if about_stdin else ""))
        return self._pretence.answer(argv)

    def open(self, argv: Sequence[str]) -> Stream:
        self._console.show_command(shlex.join(argv))
        self._pretence.answer(argv)
        return _EmptyStream()
