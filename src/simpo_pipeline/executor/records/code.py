"""Fingerprints of the source of step functions, so that a plan can say that code changed since a step ran.

They are recorded beside the outputs, but never part of an identity: most changes of code change no output. Only the
module of the function and the module of its body count, not what these import. Comments, docstrings and line breaks do
not count, because they change nothing. No module is imported to find its source, only the packages that contain it.
"""

import functools
import hashlib
import importlib.util
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from simpo_pipeline.executor.step import BODY_MODULE

_UNREAD_TOKENS = (tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
_BLOCK_TOKENS = (tokenize.INDENT, tokenize.DEDENT)


class SourceFingerprints:
    """Fingerprints of source files. Each file is read once."""

    def __init__(self) -> None:
        self._by_file: dict[Path, str | None] = {}

    def of(self, function: Any) -> dict[str, str]:
        """Return the SHA-256 (hex) of the source of the modules of a step function, by module name.

        A module without readable source, such as a notebook, is left out.
        """
        while isinstance(function, functools.partial):
            function = cast("functools.partial[Any]", function).func
        modules = getattr(function, "__module__", None), getattr(function, BODY_MODULE, None)
        found = {name: self._of_module(name) for name in modules if isinstance(name, str)}
        return {name: fingerprint for name, fingerprint in found.items() if fingerprint is not None}

    def _of_module(self, name: str) -> str | None:
        file = _source_file(name)
        if file is None:
            return None
        if file not in self._by_file:
            try:
                self._by_file[file] = _fingerprint(file.read_bytes())
            except OSError:  # the module came from an archive, or its file is gone
                self._by_file[file] = None
        return self._by_file[file]


def _source_file(module: str) -> Path | None:
    loaded = sys.modules.get(module)
    if loaded is not None:
        origin = getattr(loaded, "__file__", None)
    else:
        try:
            spec = importlib.util.find_spec(module)
        except Exception:  # whatever a package raises when it is imported, the step itself raises it again
            return None
        origin = spec.origin if spec is not None else None
    return Path(origin) if isinstance(origin, str) and origin.endswith(".py") else None


def _fingerprint(source: bytes) -> str:
    try:
        # By tokens, because threads cannot parse at the same time in every version of Python.
        data = repr(list(_statements(source))).encode(errors="backslashreplace")
    except (SyntaxError, ValueError, tokenize.TokenError):  # it is no Python, for example while it is being edited
        data = source
    return hashlib.sha256(data).hexdigest()


def _statements(source: bytes) -> Iterator[list[str]]:
    """Yield the tokens of each logical line, and the beginning and end of each block."""
    line: list[tokenize.TokenInfo] = []
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type in _BLOCK_TOKENS:
            yield [tokenize.tok_name[token.type]]
        elif token.type != tokenize.NEWLINE:
            line += [] if token.type in _UNREAD_TOKENS else [token]
        else:
            if any(part.type != tokenize.STRING for part in line):  # a docstring is a line of its own
                yield [part.string for part in line]
            line = []
