"""Where a run came from: code, command, user, hosts and package versions.

Never in it: environment variables. What looks like a secret in the command is blotted out (see secrets.py).
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

from simpo_pipeline.executor.records.secrets import blotted_words

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
    """What is recorded of a run besides its steps."""

    argv: tuple[str, ...]
    user: str
    host_name: str
    process_count: int
    git_commit: str | None
    """Of the repository that holds the script; None outside of any."""
    git_dirty: bool | None
    """Whether tracked files differ from that commit."""
    python_version: str
    packages: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The fields, as the records show them."""
        return dataclasses.asdict(self)


def find_provenance(process_count: int) -> Provenance:
    """Of this process and its job; what cannot be found out is None."""
    commit, dirty = _git_state(_script_folder())
    return Provenance(
        argv=tuple(blotted_words(sys.argv)),
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
    """What git says; None without git, outside of a repository, or where it takes too long."""
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
