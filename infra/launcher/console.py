"""The output of the launcher, with known secrets masked."""

import pathlib
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TextIO

# A shorter value could be part of any word.
_SHORTEST_SECRET = 6


def _ask_on_terminal(question: str) -> str | None:
    """Return the user's answer, or None without a terminal or at end of input."""
    if not sys.stdin.isatty():
        return None
    try:
        return input(question)
    except EOFError:
        return None


class Console:
    """Prints whole lines from any thread, with every known secret masked."""

    def __init__(self, ask: Callable[[str], str | None] = _ask_on_terminal) -> None:
        self._ask = ask
        self._secrets: tuple[str, ...] = ()
        self._mark = ""
        self._lock = threading.Lock()

    def keep_secret(self, values: Iterable[str]) -> None:
        """Mask these values in all further output."""
        known = {*self._secrets, *(value for value in values if len(value) >= _SHORTEST_SECRET)}
        self._secrets = tuple(sorted(known, key=len, reverse=True))

    def masked(self, text: str) -> str:
        """Return the text with secrets masked."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def comment_only(self) -> None:
        """Make `say` print shell comments from now on, so that they differ from printed commands."""
        self._mark = "# "

    def show_command(self, text: str) -> None:
        """Print a command that a dry run does not run."""
        self._print(text, sys.stdout)

    def say(self, text: str) -> None:
        """Print a message of the launcher or a line of a host."""
        self._print(self._mark + text.replace("\n", f"\n{self._mark}"), sys.stdout)

    def complain(self, text: str) -> None:
        """Print a message to standard error."""
        self._print(text, sys.stderr)

    def confirm(self, question: str) -> bool:
        """Ask a yes-or-no question. Without an answer or a terminal, the result is False."""
        answer = self._ask(f"{question} [y/N] ")
        return answer is not None and answer.strip().lower() in ("y", "yes")

    def _print(self, text: str, stream: TextIO) -> None:
        with self._lock:
            print(self.masked(text), file=stream, flush=True)


class LineFile:
    """A local file with the output of a host, so that it outlives the host."""

    def __init__(self, path: pathlib.Path, console: Console) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._console = console

    def write(self, line: str) -> None:
        """Append a line and flush it to the file."""
        self._file.write(f"{self._console.masked(line)}\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
