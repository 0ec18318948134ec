"""Fixtures of the executor tests: a test with `prefix` runs on a local folder and on fsspec's in-memory store."""

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
    """Return a prefix for one test alone. It does not exist yet."""
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
    """Return a function that runs `executor_main` in an empty folder and returns its exit code, output and errors."""
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
    """Return a function that starts a script and returns the process to wait for and the pid that the script prints.

    The script prints its pid first and then waits for a line on standard input.
    """

    def start(program: Path, *words: str, environment: Mapping[str, str]) -> tuple[subprocess.Popen[str], int]:
        pipe = subprocess.PIPE
        command = [*python, str(program), *words]
        client = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert client.stdout is not None
        first = client.stdout.readline()
        assert first, client.communicate()[1]
        return client, int(first)

    return start
