"""Commands of this machine: run, read line by line, or only printed."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Protocol

from launcher.console import Console
from launcher.errors import BadUsage

_MISSING_PROGRAM = {
    "gcloud": "install the Google Cloud CLI, then run `gcloud auth login` (infra/README.md, step 1)",
    "kubectl": "install it with `gcloud components install kubectl gke-gcloud-auth-plugin`",
    "docker": "install docker, give --image, or give --no_docker, which ships the sources and needs none",
    "git": "install git; the launcher ships what git tracks",
}


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has ended."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str


class Stream(Protocol):
    """A command whose lines are read while it runs."""

    def lines(self) -> Iterator[str]:
        """Its standard output. A line that lacks its end was cut off."""
        ...

    @property
    def has_succeeded(self) -> bool:
        """Whether it has ended by itself, and well."""
        ...

    def close(self) -> None:
        """Ends the command; whoever reads its lines sees their end."""
        ...


class Commands(Protocol):
    """How commands are run."""

    def run(self, argv: Sequence[str], stdin: bytes | None = None, about_stdin: str = "") -> Done:
        """Runs a command to its end; `about_stdin` says what its input is, in place of it."""
        ...

    def open(self, argv: Sequence[str]) -> Stream:
        """Starts a command whose lines are wanted while it runs."""
        ...


class _ProcessStream:
    def __init__(self, argv: Sequence[str]) -> None:
        # A session of its own: Ctrl-C asks us first, and closing reaches the ssh below gcloud too.
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
            # Bytes end their lines at a line feed only; a progress bar's carriage returns stay in the line.
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
    """Runs them."""

    def run(self, argv: Sequence[str], stdin: bytes | None = None, about_stdin: str = "") -> Done:
        del about_stdin
        try:
            done = subprocess.run(list(argv), input=stdin or b"", capture_output=True, check=False)
        except FileNotFoundError as error:
            raise _missing(argv[0]) from error
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        return Done(tuple(argv), done.returncode, out, err)

    def open(self, argv: Sequence[str]) -> Stream:
        try:
            return _ProcessStream(argv)
        except FileNotFoundError as error:
            raise _missing(argv[0]) from error


def _missing(program: str) -> BadUsage:
    return BadUsage(f"there is no program {program!r} here; {_MISSING_PROGRAM[program]}")


class Pretence(Protocol):
    """What commands would answer if all went well."""

    def answer(self, argv: Sequence[str]) -> Done: ...


class _EmptyStream:
    def lines(self) -> Iterator[str]:
        return iter(())

    @property
    def has_succeeded(self) -> bool:
        return True

    def close(self) -> None:
        pass


class PrintedCommands:
    """Prints them, and goes on as if each had done what it is for."""

    def __init__(self, console: Console, pretence: Pretence) -> None:
        self._console = console
        self._pretence = pretence

    def run(self, argv: Sequence[str], stdin: bytes | None = None, about_stdin: str = "") -> Done:
        del stdin
        self._console.show_command(shlex.join(argv) + (f"  < {about_stdin}" if about_stdin else ""))
        return self._pretence.answer(argv)

    def open(self, argv: Sequence[str]) -> Stream:
        self._console.show_command(shlex.join(argv))
        self._pretence.answer(argv)
        return _EmptyStream()
