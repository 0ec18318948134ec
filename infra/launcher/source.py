"""The sources that are shipped to the hosts: the files that git tracks, in their current state."""

import dataclasses
import hashlib
import io
import os
import pathlib
import tarfile
from collections.abc import Sequence

from launcher.commands import Commands
from launcher.errors import BadUsage
from launcher.gcloud import require

_TAG_LETTERS = 16


@dataclasses.dataclass(frozen=True)
class Source:
    """The tracked files of a repository.

    Attributes:
        archive: A tar file with the same bytes for the same files.
        commit: The commit that is checked out, with `-dirty` appended if tracked files differ from it.
        files: Paths relative to the repository's root.
    """

    root: pathlib.Path
    archive: bytes
    commit: str
    files: frozenset[str]

    @property
    def tag(self) -> str:
        """A tag that identifies exactly these contents."""
        return hashlib.sha256(self.archive).hexdigest()[:_TAG_LETTERS]


def read_source(root: pathlib.Path, commands: Commands) -> Source:
    """Pack the tracked files of the repository at `root`."""
    git = ["git", "-C", str(root), "--no-optional-locks"]
    listed = require(commands.run([*git, "ls-files", "-z"])).out.split("\0")
    files = sorted(name for name in listed if name and (root / name).is_file())
    commit = require(commands.run([*git, "rev-parse", "HEAD"])).out.strip()
    changed = require(commands.run([*git, "status", "--porcelain", "--untracked-files=no"])).out.strip()
    return Source(root, _pack(root, files), commit + ("-dirty" if changed else ""), frozenset(files))


def _pack(root: pathlib.Path, files: Sequence[str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in files:
            contents = (root / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(contents)
            entry.mode = 0o755 if (root / name).stat().st_mode & 0o100 else 0o644
            archive.addfile(entry, io.BytesIO(contents))
    return packed.getvalue()


def check_shipped(command: Sequence[str], source: Source) -> None:
    """Check that every local file that the command names is shipped to the hosts.

    Raises:
        BadUsage: the command names a local file that the hosts would not have.
    """
    # Unlike pathlib's, os.path.isfile is False for words that cannot be file names.
    for word in command:
        path = pathlib.Path(word.partition("=")[2] if word.startswith("-") else word)
        if path.is_absolute() and os.path.isfile(path) and word != command[0]:
            raise BadUsage(
                f"the command names {str(path)!r}, a file on this machine that the hosts do not have; move it into the "
                "repository, `git add` it and give its path relative to the repository"
            )
        if (
            path.name
            and not path.is_absolute()
            and os.path.isfile(source.root / path)
            and str(path) not in source.files
        ):
            raise BadUsage(
                f"the command names {str(path)!r}, which git does not track, so it is not shipped to the hosts; "
                f"`git add {path}` first"
            )
