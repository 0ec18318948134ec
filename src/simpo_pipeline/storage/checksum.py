"""CRC32C, the checksum Google Cloud Storage keeps for every object."""

from typing import Any, cast

import google_crc32c

from simpo_pipeline.storage.files import open_read
from simpo_pipeline.storage.filesystem import storage_border

_CHUNK_BYTES = 1 << 20


def crc32c_of(path: str) -> str:
    """The CRC32C of a file as 8 hex digits, read in pieces of 1 MiB.

    Raises:
        PathNotFoundError: there is no such file.
    """
    extend = cast(Any, google_crc32c).extend
    checksum = 0
    with open_read(path) as file, storage_border("read", path):
        while chunk := file.read(_CHUNK_BYTES):
            checksum = extend(checksum, chunk)
    return f"{checksum:08x}"


def crc32c_of_bytes(data: bytes) -> str:
    """The CRC32C of a file's content as 8 hex digits."""
    return f"{cast(Any, google_crc32c).value(data):08x}"
