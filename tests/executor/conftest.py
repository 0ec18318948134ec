"""Each executor test that asks for `prefix` runs on a local folder and on an object store (fsspec's in-memory one)."""

import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from simpo_pipeline.executor.main import executor_main
from simpo_pipeline.executor.step import ExecutorStep


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


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A script's `executor_main` in a folder of its own: steps and flags to exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MARIN_PREFIX", raising=False)

    def run(steps: Sequence[ExecutorStep], *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["experiment.py", *flags])
        code: Any = 0
        try:
            executor_main(steps=steps)
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return code, out, err

    return run
