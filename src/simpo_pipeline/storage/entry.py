"""One file of a listing."""

from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class FileEntry:
    """The path, size and metadata of one file, as the storage lists them."""

    relative_path: str
    num_bytes: int
    crc32c: str | None = None
    """8 hex digits; None if the storage has no checksum. Google Cloud Storage has one."""
    version: str | None = field(default=None, compare=False)
    """The version of the file, as in conditional.py; None if it is unknown until the file is read."""
    modified: float | None = field(default=None, compare=False)
    """Unix time of the last write, by the clock of the storage."""
