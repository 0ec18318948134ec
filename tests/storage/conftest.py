"""Every storage test runs on each kind of store: a local folder, fsspec's in-memory one, and Google Cloud Storage."""

import uuid
from pathlib import Path

import fsspec
import pytest

# aiohttp warns about every upload by gcsfs of more than 1 MiB.
GCS = pytest.param("gcs", marks=pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"))


@pytest.fixture(params=["local", "memory", GCS])
def folder(request: pytest.FixtureRequest, tmp_path: Path):
    """A folder for one test. For Google Cloud Storage, it is on a test server that speaks its protocol over HTTP."""
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    if request.param == "gcs":
        yield request.getfixturevalue("gcs_here")
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(url):
        filesystem.rm(url, recursive=True)
