"""What the launcher says, without the secrets it knows."""

import pathlib
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TextIO

# A shorter value may be a part of any word.
_SHORTEST_SECRET = 6


def _ask_on_terminal(question: str) -> str | None:
    """The answer; None where nobody can be asked."""
    if not sys.stdin.isatty():
        return None
    try:
        return input(question)
    except EOFError:
        return None


class Console:
    """Prints from any thread, whole lines only, with every known secret masked."""

    def __init__(self, ask: Callable[[str], str | None] = _ask_on_terminal) -> None:
        self._ask = ask
        self._secrets: tuple[str, ...] = ()
        self._mark = ""
        self._lock = threading.Lock()

    def keep_secret(self, values: Iterable[str]) -> None:
        """No line shows these values from now on."""
        known = {*self._secrets, *(value for value in values if len(value) >= _SHORTEST_SECRET)}
        self._secrets = tuple(sorted(known, key=len, reverse=True))

    def masked(self, text: str) -> str:
        """The text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def comment_only(self) -> None:
        """From now on `say` marks its lines as a shell's comments, beside commands that are shown."""
        self._mark = "# "

    def show_command(self, text: str) -> None:
        """A command that a dry run leaves out."""
        self._print(text, sys.stdout)

    def say(self, text: str) -> None:
        """A line of the launcher's own or of a host."""
        self._print(self._mark + text.replace("\n", f"\n{self._mark}"), sys.stdout)

    def complain(self, text: str) -> None:
        """A line on standard error."""
        self._print(text, sys.stderr)

    def confirm(self, question: str) -> bool:
        """Asks; no answer, and nobody to ask, is a no."""
        answer = self._ask(f"{question} [y/N] ")
        return answer is not None and answer.strip().lower() in ("y", "yes")

    def _print(self, text: str, stream: TextIO) -> None:
        with self._lock:
            print(self.masked(text), file=stream, flush=True)


class LineFile:
    """A host's lines in a file of this machine, so that they outlive the host."""

    def __init__(self, path: pathlib.Path, console: Console) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._console = console

    def write(self, line: str) -> None:
        """Adds a line; it is on disk when this returns."""
        self._file.write(f"{self._console.masked(line)}\n")
        self._file.flush()

    def close(self) -> None:
        """No more lines come."""
        self._file.close()
