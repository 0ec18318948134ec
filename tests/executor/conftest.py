"""Each executor test that asks for `prefix` runs on a local folder and on an object store (fsspec's in-memory one)."""

import uuid
from pathlib import Path

import fsspec
import pytest


@pytest.fixture(params=["local", "memory"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path):
    """A prefix of its own for one test; it does not exist yet."""
    if request.param == "local":
        yield str(tmp_path / "runs")
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(url):
        filesystem.rm(url, recursive=True)
