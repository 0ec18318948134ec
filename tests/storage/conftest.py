"""Each storage test runs against a local folder and against an object store (fsspec's in-memory one)."""

import uuid
from pathlib import Path

import fsspec
import pytest


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path):
    """A place of its own for one test, removed afterwards."""
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(url):
        filesystem.rm(url, recursive=True)


@pytest.fixture(params=["local", "memory", "gcs"])
def any_folder(request: pytest.FixtureRequest, tmp_path: Path):
    """As `folder`, and on a server of Google Cloud Storage over HTTP."""
    if request.param == "local":
        return str(tmp_path / "store")
    return request.getfixturevalue("gcs_here") if request.param == "gcs" else f"memory://{uuid.uuid4().hex}"
