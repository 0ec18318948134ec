"""What a listing says of one file."""

from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class FileEntry:
    """One file of a listing."""

    relative_path: str
    num_bytes: int
    crc32c: str | None = None
    """8 hex digits, when the store keeps it (Google Cloud Storage does)."""
    version: str | None = field(default=None, compare=False)
    """What `conditional` calls this content of the file; None when the store does not tell without reading it."""
    modified: float | None = field(default=None, compare=False)
    """Unix time of the last write, by the store's clock."""
