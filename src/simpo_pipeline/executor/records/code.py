"""Fingerprints of the source of step functions, so that a plan can say that code changed since a step ran.

They are recorded, but never part of an identity: most changes of code change no output. Only the module of the function
and the module of its body count, not what these import. No module is imported to find its source.
"""

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, cast

from simpo_pipeline.executor.step import BODY_MODULE


class SourceFingerprints:
    """Fingerprints of source files. Each file is read once."""

    def __init__(self) -> None:
        self._by_file: dict[Path, str | None] = {}

    def of(self, function: Any) -> dict[str, str]:
        """Return the SHA-256 (hex) of the source of the modules of a step function, by module name.

        A module without readable source, such as one that was typed into a shell, is left out.
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
                self._by_file[file] = hashlib.sha256(file.read_bytes()).hexdigest()
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
        except (ImportError, ValueError):
            return None
        origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def changed_modules(recorded: Any, now: dict[str, str]) -> list[str]:
    """Return the modules whose source differs from the recorded one; empty if one of the two is unknown."""
    if not isinstance(recorded, dict) or not recorded or not now:
        return []
    then = cast(dict[str, Any], recorded)
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
