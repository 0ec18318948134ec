"""Provenance of a run: code, command, user, host and package versions.

Environment variables are never recorded. Parts of the command that look like secrets are redacted (see secrets.py).
"""

import dataclasses
import getpass
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from simpo_pipeline.executor.records.secrets import redact_command_line

_PACKAGES = (
    "simpo-pipeline",
    "jax",
    "jaxlib",
    "libtpu",
    "equinox",
    "haliax",
    "optax",
    "numpy",
    "transformers",
    "fsspec",
    "gcsfs",
    "draccus",
)
_GIT_SECONDS = 10.0


@dataclass(frozen=True)
class Provenance:
    """The information recorded about a run, apart from its steps."""

    argv: tuple[str, ...]
    user: str
    host_name: str
    process_count: int
    git_commit: str | None
    """Commit of the repository that contains the script. None outside of a repository."""
    git_dirty: bool | None
    """Whether tracked files differ from that commit."""
    python_version: str
    packages: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the fields in the form that the records store."""
        return dataclasses.asdict(self)


def find_provenance(process_count: int) -> Provenance:
    """Return the provenance of this process and its job. Git fields that cannot be determined are None."""
    commit, dirty = _git_state(_script_folder())
    return Provenance(
        argv=tuple(redact_command_line(sys.argv)),
        user=_user(),
        host_name=socket.gethostname(),
        process_count=process_count,
        git_commit=commit,
        git_dirty=dirty,
        python_version=platform.python_version(),
        packages=_package_versions(),
    )


def _script_folder() -> Path:
    script = Path(sys.argv[0] or ".")
    return script.parent if script.is_file() else Path.cwd()


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None, None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, bool(status) if status is not None else None


def _git(folder: Path, *words: str) -> str | None:
    """Return the output of git. None if git is missing, fails (outside of a repository) or takes too long."""
    command = ["git", "-C", str(folder), "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"


def _package_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def script_name() -> str:
    """Return the name of the script that was started."""
    return Path(sys.argv[0]).stem or "python"
