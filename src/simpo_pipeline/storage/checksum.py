"""CRC32C, the checksum that Google Cloud Storage stores for every object."""

from typing import Any, cast

import google_crc32c

from simpo_pipeline.storage.files import open_read
from simpo_pipeline.storage.filesystem import storage_border

_CHUNK_BYTES = 1 << 20


def crc32c_of(path: str) -> str:
    """Return the CRC32C of a file as 8 hex digits. The file is read in chunks of 1 MiB.

    Raises:
        PathNotFoundError: The file does not exist.
    """
    extend = cast(Any, google_crc32c).extend
    checksum = 0
    with open_read(path) as file, storage_border("read", path):
        while chunk := file.read(_CHUNK_BYTES):
            checksum = extend(checksum, chunk)
    return f"{checksum:08x}"


def crc32c_of_bytes(data: bytes) -> str:
    """Return the CRC32C of `data` as 8 hex digits."""
    return f"{cast(Any, google_crc32c).value(data):08x}"
