"""Each executor test that asks for `prefix` runs on a local folder and on an object store (fsspec's in-memory one)."""

import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
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


@pytest.fixture
def start_program(python: list[str]) -> Callable[..., tuple[subprocess.Popen[str], int]]:
    """Starts a script that prints its pid and waits for a line; gives its client, to wait for, and that pid."""

    def start(program: Path, *words: str, environment: Mapping[str, str]) -> tuple[subprocess.Popen[str], int]:
        pipe = subprocess.PIPE
        command = [*python, str(program), *words]
        client = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert client.stdout is not None
        first = client.stdout.readline()
        assert first, client.communicate()[1]
        return client, int(first)

    return start
